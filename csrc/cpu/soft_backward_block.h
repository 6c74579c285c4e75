// The gradient of soft_quantize over one block of a row, for every kernel that needs it.
//
// grad_x = g sum_j P d_j h_j, h_j = s_j (1 - s_j);  grad_c_k = A_k - A_{k+1} - (P d_k B_k + P d_{k+1} B_{k+1}) / 2 with
// A_j = sum g s_j, B_j = sum g h_j, s_1 = 1, s_{m+1} = 0. The sums are float32 in sixteen lanes over a block, float64
// from there on. Bound by the multipliers: eight operations a midpoint, the reciprocal's three among them, and the
// exponential's six.
#pragma once

#include <algorithm>
#include <cstring>

#include "chunk.h"
#include "rows.h"
#include "soft_row.h"

namespace qk::cpu {

struct SoftLanes {
  alignas(64) float total[kVec];  // of sum g
  struct alignas(64) {
    float rising[kVec];  // of A_j
    float bump[kVec];    // of B_j
  } midpoint[kMaxMidpoints];
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
  auto* lane = lanes.midpoint;
  for_each_midpoint<kKind>(row, clamped, [&](const SoftMidpoint& midpoint, const Vec(&power)[N]) {
    const Vec factor = splat(midpoint.factor), steep = splat(midpoint.steep);
    Vec rising = load(lane->rising), bump = load(lane->bump);
    for (int i = 0; i < N; ++i) {
      const Vec y = power[i] * factor;
      const Vec s = reciprocal(one + y);
      const Vec gs = g[i] * s;
      const Vec gh = gs * (y * s);
      grad_x[i] = fma(steep, gh, grad_x[i]);
      rising = rising + gs;
      bump = bump + gh;
    }
    store(rising, lane->rising);
    store(bump, lane->bump);
    ++lane;
  });
  for (int i = 0; i < N; ++i) {
    if (any(x[i] != clamped[i])) {  // far out S is flat, where h keeps its floor; NaN stays
      const Vec zero = splat(0.0f);
      grad_x[i] = select(splat(row.x_max) < x[i], zero, select(x[i] < splat(row.x_min), zero, grad_x[i]));
    }
  }
}

template <Groups kKind, class T, class Out>
void soft_backward_block_of(const SoftRow& row, const T* grad, const T* x, int64_t n, Out* grad_x, SoftLanes& lanes) {
  constexpr int kStep = kInterleave * kVec;
  for (; n >= kStep; n -= kStep, grad += kStep, x += kStep, grad_x += kStep) {
    Vec g[kInterleave], value[kInterleave], slope[kInterleave];
    for (int i = 0; i < kInterleave; ++i) {
      g[i] = load(grad + i * kVec);
      value[i] = load(x + i * kVec);
    }
    soft_backward_vectors<kKind>(row, g, value, slope, lanes);
    for (int i = 0; i < kInterleave; ++i) {
      store(slope[i], grad_x + i * kVec);
    }
  }
  for (; n > 0; n -= kVec, grad += kVec, x += kVec, grad_x += kVec) {
    const int valid = static_cast<int>(std::min<int64_t>(kVec, n));
    const Vec g[1] = {load_some(grad, valid)};  // zeros behind the last: they add nothing to a sum
    const Vec value[1] = {load_some(x, valid)};
    Vec slope[1];
    soft_backward_vectors<kKind>(row, g, value, slope, lanes);
    store_some(slope[0], valid, grad_x);
  }
}

// grad_x[i] = grad[i] dS/dx for n <= kBlock elements of a row, and sum_i grad[i] dS/dc_k added to sums[k], k < m. The
// row keeps all midpoints.
template <class T, class Out>
void soft_backward_block(const SoftRow& row, const T* grad, const T* x, int64_t n, Out* grad_x, double* sums) {
  SoftLanes lanes;
  std::memset(lanes.total, 0, sizeof lanes.total);
  std::memset(lanes.midpoint, 0, sizeof lanes.midpoint[0] * static_cast<size_t>(row.midpoints));
  switch (row.kind) {
    case Groups::kOne:
      soft_backward_block_of<Groups::kOne>(row, grad, x, n, grad_x, lanes);
      break;
    case Groups::kShared:
      soft_backward_block_of<Groups::kShared>(row, grad, x, n, grad_x, lanes);
      break;
    case Groups::kOwn:
      soft_backward_block_of<Groups::kOwn>(row, grad, x, n, grad_x, lanes);
      break;
  }
  double below = sum_of_lanes(lanes.total);  // A_k
  double bump_below = 0.0;                   // P d_k B_k
  for (int j = 0; j < row.midpoints; ++j) {
    const double above = sum_of_lanes(lanes.midpoint[j].rising);
    const double bump_above = static_cast<double>(row.midpoint[j].steep) * sum_of_lanes(lanes.midpoint[j].bump);
    sums[j] += below - above - 0.5 * (bump_below + bump_above);
    below = above;
    bump_below = bump_above;
  }
  sums[row.midpoints] += below - 0.5 * bump_below;
}

}  // namespace qk::cpu
