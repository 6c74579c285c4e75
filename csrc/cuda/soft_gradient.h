// The gradient of soft_quantize over the elements of a thread, and that of the centers out of its sums. For
// soft_quantize_backward and quped_step.
//
// grad_x = g sum_j P d_j h_j, h_j = s_j (1 - s_j);  grad_c_k = A_k - A_{k+1} - (P d_k B_k + P d_{k+1} B_{k+1}) / 2 with
// A_j = sum g s_j, B_j = sum g h_j, s_1 = 1, s_{m+1} = 0. One reciprocal a midpoint and one exponential for three: a
// shared reciprocal would lose h far from its midpoint, where sums of many elements still need it.
#pragma once

#include "columns.h"
#include "soft_group.h"

namespace qk::cuda {

// Columns of a row's sums: that of g, then of each group A_1..A_3 and B_1..B_3.
QK_HD int soft_columns(int groups) { return 1 + 2 * kGroup * groups; }
QK_HD int rising_column(int j) { return 1 + j / kGroup * 2 * kGroup + j % kGroup; }
QK_HD int bump_column(int j) { return rising_column(j) + kGroup; }

// Up to so many groups each thread has its own columns: 17 KB.
constexpr int kGroupsOfThreads = 5;

// x stretched; g 0 for elements that do not exist.
template <int kCount, class Sums>
__device__ __forceinline__ void soft_gradient(const BackwardGroup* table, int groups, const SoftRate& rate,
                                              const float (&x)[kCount], const float (&g)[kCount],
                                              float (&grad_x)[kCount], Sums& sums) {
  float total = 0.0f;
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    grad_x[e] = 0.0f;
    total += g[e];
  }
  sums.add(0, total);
  for (int at = 0; at < groups; ++at) {
    const BackwardGroup group = table[at];
    const bool shared = group.most >= 0.0f;
    float power[kCount];
    if (shared) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        power[e] = exp2_approx(min_or_nan(rate.exponent(x[e], group.reference), group.most));
      }
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float rising = 0.0f, bump = 0.0f;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const float y = shared
                            ? power[e] * group.factor[i]
                            : exp2_approx(min_or_nan(rate.exponent(x[e], group.position[i]), BackwardGroup::kOwnMost));
        const float s = rcp_approx(1.0f + y);
        const float gs = g[e] * s;
        const float gh = gs * (y * s);
        grad_x[e] = QK_FMA(group.steep[i], gh, grad_x[e]);
        rising += gs;
        bump += gh;
      }
      sums.add(1 + 2 * kGroup * at + i, rising);
      sums.add(1 + 2 * kGroup * at + kGroup + i, bump);
    }
  }
}

// grad_c_k from a row's sums: sum_of(column).
template <class SumOf>
__device__ float center_gradient(const float* centers, int levels, float sharpness, int k, SumOf&& sum_of) {
  const auto midpoint = [&](int j) {  // P d_j B_j
    return static_cast<double>(sharpness) * (static_cast<double>(centers[j + 1]) - static_cast<double>(centers[j])) *
           static_cast<double>(sum_of(bump_column(j)));
  };
  const double below = static_cast<double>(k == 0 ? sum_of(0) : sum_of(rising_column(k - 1)));
  const double above = k + 1 < levels ? static_cast<double>(sum_of(rising_column(k))) : 0.0;
  const double bumps = (k > 0 ? midpoint(k - 1) : 0.0) + (k + 1 < levels ? midpoint(k) : 0.0);
  return static_cast<float>(below - above - 0.5 * bumps);
}

}  // namespace qk::cuda
