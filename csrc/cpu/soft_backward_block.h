// The gradient of soft_quantize over one block of a row, for every kernel that needs it.
//
// grad_x = g sum_j P d_j h_j, h_j = s_j (1 - s_j);  grad_c_k = A_k - A_{k+1} - (P d_k B_k + P d_{k+1} B_{k+1}) / 2 with
// A_j = sum g s_j, B_j = sum g h_j, s_1 = 1, s_{m+1} = 0. The sums are float32 in sixteen lanes over a block, float64
// from there on. Bound by the multipliers: eight operations a midpoint, the reciprocal's three among them, and the
// exponential's six.
#pragma once

#include <cstring>

#include "chunk.h"
#include "rows.h"
#include "soft_row.h"

namespace qk::cpu {

struct SoftLanes {
  alignas(64) float total[kVec];                  // of sum g
  alignas(64) float rising[kMaxMidpoints][kVec];  // of A_j
  alignas(64) float bump[kMaxMidpoints][kVec];    // of B_j
};

template <Groups kKind, int N>
QK_HD void soft_backward_vectors(const SoftRow& row, const Vec (&g)[N], const Vec (&x)[N], Vec (&grad_x)[N],
                                 SoftLanes& lanes) {
  const Vec one = splat(1.0f);
  Vec clamped[N];
  Vec total = load(lanes.total);
  for (int i = 0; i < N; ++i) {
    clamped[i] = clamp_to(row, x[i]);
    grad_x[i] = splat(0.0f);
    total = total + g[i];
  }
  store(total, lanes.total);
  for_each_midpoint<kKind>(row, clamped, [&](int j, const Vec(&power)[N]) {
    const Vec factor = splat(row.factor[j]), steep = splat(row.steep[j]);
    Vec rising = load(lanes.rising[j]), bump = load(lanes.bump[j]);
    for (int i = 0; i < N; ++i) {
      const Vec y = power[i] * factor;
      const Vec s = reciprocal(one + y);
      const Vec gs = g[i] * s;
      const Vec gh = gs * (y * s);
      grad_x[i] = fma(steep, gh, grad_x[i]);
      rising = rising + gs;
      bump = bump + gh;
    }
    store(rising, lanes.rising[j]);
    store(bump, lanes.bump[j]);
  });
  for (int i = 0; i < N; ++i) {
    if (any(x[i] != clamped[i])) {  // far out S is flat, where h keeps its floor; NaN stays
      const Vec zero = splat(0.0f);
      grad_x[i] = select(splat(row.x_max) < x[i], zero, select(x[i] < splat(row.x_min), zero, grad_x[i]));
    }
  }
}

template <Groups kKind, class T, class Out>
void soft_backward_block_of(const SoftRow& row, const T* grad, const T* x, int64_t n, Out* grad_x, bool streamed,
                            SoftLanes& lanes) {
  int64_t begin = 0;
  for (; begin + kInterleave * kVec <= n; begin += kInterleave * kVec) {
    Vec g[kInterleave], value[kInterleave], slope[kInterleave];
    for (int i = 0; i < kInterleave; ++i) {
      g[i] = load(grad + begin + i * kVec);
      value[i] = load(x + begin + i * kVec);
    }
    soft_backward_vectors<kKind>(row, g, value, slope, lanes);
    for (int i = 0; i < kInterleave; ++i) {
      store_or_stream(slope[i], streamed, grad_x + begin + i * kVec);
    }
  }
  for (; begin < n; begin += kVec) {
    const int valid = static_cast<int>(std::min<int64_t>(kVec, n - begin));
    const Vec g[1] = {load_some(grad + begin, valid)};  // zeros behind the last: they add nothing to a sum
    const Vec value[1] = {load_some(x + begin, valid)};
    Vec slope[1];
    soft_backward_vectors<kKind>(row, g, value, slope, lanes);
    store_some(slope[0], valid, grad_x + begin);
  }
}

// grad_x[i] = grad[i] dS/dx for n <= kBlock elements of a row, and sum_i grad[i] dS/dc_k added to sums[k], k < m. The
// row keeps all midpoints.
template <class T, class Out>
void soft_backward_block(const SoftRow& row, const T* grad, const T* x, int64_t n, Out* grad_x, double* sums,
                         bool streamed = false) {
  SoftLanes lanes;
  const size_t used = sizeof lanes.rising[0] * static_cast<size_t>(row.midpoints);
  std::memset(lanes.total, 0, sizeof lanes.total);
  std::memset(lanes.rising, 0, used);
  std::memset(lanes.bump, 0, used);
  switch (row.kind) {
    case Groups::kOne:
      soft_backward_block_of<Groups::kOne>(row, grad, x, n, grad_x, streamed, lanes);
      break;
    case Groups::kShared:
      soft_backward_block_of<Groups::kShared>(row, grad, x, n, grad_x, streamed, lanes);
      break;
    case Groups::kOwn:
      soft_backward_block_of<Groups::kOwn>(row, grad, x, n, grad_x, streamed, lanes);
      break;
  }
  double below = sum_of_lanes(lanes.total);  // A_k
  double bump_below = 0.0;                   // P d_k B_k
  for (int j = 0; j < row.midpoints; ++j) {
    const double above = sum_of_lanes(lanes.rising[j]);
    const double bump_above = static_cast<double>(row.steep[j]) * sum_of_lanes(lanes.bump[j]);
    sums[j] += below - above - 0.5 * (bump_below + bump_above);
    below = above;
    bump_below = bump_above;
  }
  sums[row.midpoints] += below - 0.5 * bump_below;
}

}  // namespace qk::cpu
