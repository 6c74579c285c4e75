// distance_backward: the slope of each element into grad_x, minus its sum over each cell into grad_centers, in one
// pass.

#include "../kernels.h"
#include "../math/distance.h"
#include "cells.h"
#include "chunk.h"
#include "row_sums.h"
#include "rows.h"
#include "sum_by_code.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "distance_backward";

template <class T, class Slope>
void run_span(float grad, const T* x, const Cells& cells, const Span& span, T* grad_x, double* sums, Slope slope) {
  CodeSums by_code(cells.levels, sums);
  for_each_block(span, [&](const Span& block) {
    for_each_chunk(block.begin, block.end, [&](auto size, int64_t begin, int valid) {
      constexpr int Size = decltype(size)::value;
      alignas(64) float value[Size];
      alignas(64) int32_t code[Size];
      load_chunk<Size>(x + begin, valid, 0.0f, value);
      codes_of<Size>(cells, value, code);
      for (int i = 0; i < Size; ++i) {
        value[i] = grad * slope(value[i] - cells.values[code[i]]);
      }
      store_chunk<Size>(value, valid, grad_x + begin);
      for (int i = valid; i < Size; ++i) {
        value[i] = 0.0f;
      }
      by_code.add<Size>(value, code, valid);
    });
    by_code.end_block();
  });
}

}  // namespace

void distance_backward(int threads, View grad, View x, View centers, const std::string& norm, View grad_x,
                       View grad_centers) {
  QK_CHECK(norm == "l1" || norm == "l2", text(kOp, ": norm must be 'l1' or 'l2'"), "'" + norm + "'");
  QK_CHECK(grad.numel() == 1, text(kOp, ": grad must have one element"), "shape " + shape_of(grad.sizes));
  const Rows rows = rows_of(kOp, x, centers);
  check_same_dtype(kOp, "grad_x", grad_x, x);
  check_same(kOp, "grad_centers", grad_centers, centers);
  const float scale = *grad.as<float>();
  auto* sums = grad_centers.as<float>();
  for_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    sum_rows(threads, rows, 2 * rows.levels, sums, [&](const Span& span, double* partial) {
      const Cells cells(rows.centers_of(span.row), rows.levels);
      const auto run = [&](auto slope) { run_span(scale, x.as<T>(), cells, span, grad_x.as<T>(), partial, slope); };
      if (norm == "l1") {
        run([](float gap) { return math::distance_l1_slope(gap); });
      } else {
        run([](float gap) { return math::distance_l2_slope(gap); });
      }
    });
  });
  for (int64_t i = 0; i < grad_centers.numel(); ++i) {
    sums[i] = -sums[i];
  }
}

}  // namespace qk::cpu
