// assign: m - 1 comparisons an element, counted; midpoints pass over a chunk in L1. Bound by the comparisons from m of
// about 8.

#include "../kernels.h"
#include "cells.h"
#include "chunk.h"
#include "rows.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "assign";

template <class T>
void run_span(const T* x, const Cells& cells, const Span& span, uint8_t* codes) {
  for_each_chunk(span.begin, span.end, [&](auto size, int64_t begin, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) float value[Size];
    alignas(64) int32_t code[Size];
    alignas(64) uint8_t narrow[Size];
    load_chunk<Size>(x + begin, valid, 0.0f, value);
    codes_of<Size>(cells, value, code);
    for (int i = 0; i < Size; ++i) {
      narrow[i] = static_cast<uint8_t>(code[i]);
    }
    std::memcpy(codes + begin, narrow, static_cast<size_t>(valid));
  });
}

}  // namespace

void assign(int threads, View x, View centers, View codes) {
  const Rows rows = rows_of(kOp, x, centers);
  check_same(kOp, "codes", codes, x);
  for_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_span(threads, spans_of(rows), rows.levels, [&](const Span& span) {
      run_span(x.as<T>(), Cells(rows.centers_of(span.row), rows.levels), span, codes.as<uint8_t>());
    });
  });
}

}  // namespace qk::cpu
