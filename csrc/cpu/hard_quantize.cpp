// hard_quantize: the nearest center by m - 1 comparisons and selections; its value, not its code, is carried along.

#include "../kernels.h"
#include "cells.h"
#include "chunk.h"
#include "rows.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "hard_quantize";

template <class T>
void run_span(const T* x, const Cells& cells, const Span& span, T* out) {
  for_each_chunk(span.begin, span.end, [&](auto size, int64_t begin, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) float value[Size];
    alignas(64) float nearest[Size];
    load_chunk<Size>(x + begin, valid, 0.0f, value);
    nearest_of<Size>(cells, value, nearest);
    store_chunk<Size>(nearest, valid, out + begin);
  });
}

}  // namespace

void hard_quantize(int threads, View x, View centers, bool /* straight_through: only the gradient depends on it */,
                   View out) {
  const Rows rows = rows_of(kOp, x, centers);
  check_same_dtype(kOp, "out", out, x);
  for_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_span(threads, spans_of(rows), rows.levels, [&](const Span& span) {
      run_span(x.as<T>(), Cells(rows.centers_of(span.row), rows.levels), span, out.as<T>());
    });
  });
}

}  // namespace qk::cpu
