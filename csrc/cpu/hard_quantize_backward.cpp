// hard_quantize_backward: grad summed over each cell's members, the cells found again from x; grad_x is grad or zero.

#include <cstring>

#include "../kernels.h"
#include "cells.h"
#include "chunk.h"
#include "row_sums.h"
#include "rows.h"
#include "sum_by_code.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "hard_quantize_backward";

template <class T>
void add_block(const T* grad, const T* x, const Cells& cells, const Span& block, CodeSums& sums) {
  for_each_chunk(block.begin, block.end, [&](auto size, int64_t begin, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) float value[Size];
    alignas(64) float g[Size];
    alignas(64) int32_t code[Size];
    load_chunk<Size>(x + begin, valid, 0.0f, value);
    load_chunk<Size>(grad + begin, valid, 0.0f, g);
    codes_of<Size>(cells, value, code);
    sums.add<Size>(g, code, valid);
  });
  sums.end_block();
}

template <class T>
void write_grad_x(const T* grad, bool straight_through, const Span& span, T* grad_x) {
  const size_t bytes = static_cast<size_t>(span.end - span.begin) * sizeof(T);
  if (bytes == 0) {
    return;
  }
  if (straight_through) {
    std::memcpy(grad_x + span.begin, grad + span.begin, bytes);
  } else {
    std::memset(grad_x + span.begin, 0, bytes);
  }
}

}  // namespace

void hard_quantize_backward(int threads, View grad, View x, View centers, bool straight_through, View grad_x,
                            View grad_centers) {
  const Rows rows = rows_of(kOp, x, centers);
  check_same_dtype(kOp, "grad", grad, x);
  check_same_dtype(kOp, "grad_x", grad_x, x);
  check_same(kOp, "grad_centers", grad_centers, centers);
  for_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    sum_rows(threads, rows, 2 * rows.levels, grad_centers.as<float>(), [&](const Span& span, double* sums) {
      const Cells cells(rows.centers_of(span.row), rows.levels);
      CodeSums by_code(rows.levels, sums);
      for_each_block(span, [&](const Span& block) { add_block(grad.as<T>(), x.as<T>(), cells, block, by_code); });
      write_grad_x(grad.as<T>(), straight_through, span, grad_x.as<T>());
    });
  });
}

}  // namespace qk::cpu
