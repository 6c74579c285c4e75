// soft_quantize per element: S = c_1 + sum_j d_j sigmoid(P (x - t_j)), d_j = c_j - c_{j-1}, t_j the midpoint; and its
// gradients.
#pragma once

#include "cell.h"
#include "sigmoid.h"

namespace qk::math {

// One term of the sum.
QK_HD float soft_step(float x, float midpoint, float difference, float sharpness) {
  return difference * sigmoid(sharpness * (x - midpoint));
}

// Into [lowest, highest]: the sum of rounded terms can pass the ends, and at +inf may stop short of the last center.
QK_HD float soft_clamp(float sum, float x, float lowest, float highest) {
  const float above = sum < lowest ? lowest : sum;  // a comparison with NaN is false: NaN stays
  const float inside = above > highest ? highest : above;
  return x == float_of(0x7f800000u) ? highest : inside;
}

// dS/dc_k from the terms of midpoints k (below the center) and k + 1 (above it): s_k - s_{k+1} - (P/2) (d_k b_k +
// d_{k+1} b_{k+1}), b = s (1 - s). Taken per element, elements far from the cell add exact zeros and a long row loses
// nothing to cancellation.
QK_HD float center_slope(float s_below, float s_above, float db_below, float db_above, float half_sharpness) {
  return (s_below - s_above) - half_sharpness * (db_below + db_above);
}

}  // namespace qk::math
