// soft_quantize_backward: the sigmoids are computed again, nothing is stored between the passes, and one sweep gives
// both gradients. What bounds it stands in soft_backward_block.h.

#include "../kernels.h"
#include "row_sums.h"
#include "rows.h"
#include "soft_backward_block.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "soft_quantize_backward";
constexpr int64_t kWorkPerMidpoint = 4;

}  // namespace

void soft_quantize_backward(int threads, View grad, View x, View centers, View sharpness, View grad_x,
                            View grad_centers) {
  const Rows rows = rows_of(kOp, x, centers);
  const PerRow steepness = per_row(kOp, "sharpness", sharpness, rows);
  check_same_dtype(kOp, "grad", grad, x);
  check_same_dtype(kOp, "grad_x", grad_x, x);
  check_same(kOp, "grad_centers", grad_centers, centers);
  for_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    sum_rows(threads, rows, kWorkPerMidpoint * rows.levels, grad_centers.as<float>(),
             [&](const Span& span, double* sums) {
               const SoftRow row(rows.centers_of(span.row), rows.levels, steepness.of(span.row), Midpoints::kAll);
               const bool streamed = should_stream(grad_x.as<T>() + span.begin, x.numel());
               for_each_block(span, [&](const Span& block) {
                 soft_backward_block(row, grad.as<T>() + block.begin, x.as<T>() + block.begin, block.end - block.begin,
                                     grad_x.as<T>() + block.begin, sums, streamed);
               });
               if (streamed) {
                 end_stream();
               }
             });
  });
}

}  // namespace qk::cpu
