// foreach_soft_quantize and its backward: soft_quantize of each tensor of a list. Bound as soft_quantize is; the list
// saves the cost of a call a tensor, which is all there is to save on small layers.

#include "../kernels.h"
#include "span_list.h"

namespace qk::cpu {

void foreach_soft_quantize(int threads, Views x, Views centers, Views sharpness, Views out) {
  constexpr const char* kOp = "foreach_soft_quantize";
  check_count(kOp, "centers", centers.size(), x.size());
  check_count(kOp, "sharpness", sharpness.size(), x.size());
  check_count(kOp, "out", out.size(), x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    soft_quantize(threads, x[i], centers[i], sharpness[i], out[i]);
  }
}

void foreach_soft_quantize_backward(int threads, Views grad, Views x, Views centers, Views sharpness, Views grad_x,
                                    Views grad_centers) {
  constexpr const char* kOp = "foreach_soft_quantize_backward";
  check_count(kOp, "x", x.size(), grad.size());
  check_count(kOp, "centers", centers.size(), grad.size());
  check_count(kOp, "sharpness", sharpness.size(), grad.size());
  check_count(kOp, "grad_x", grad_x.size(), grad.size());
  check_count(kOp, "grad_centers", grad_centers.size(), grad.size());
  for (size_t i = 0; i < x.size(); ++i) {
    soft_quantize_backward(threads, grad[i], x[i], centers[i], sharpness[i], grad_x[i], grad_centers[i]);
  }
}

}  // namespace qk::cpu
