// The gradient of soft_quantize from the two midpoints beside x, where a row's sharpness is large enough for that; the
// others follow from the same two exponentials.
//
// Of an x between two midpoints let y be exp(-P (x - t)) for the one below it, t, or exp(-P (t - x)) for the one above:
// y <= 1. A midpoint further out on that side by D has e = y r, r = exp(-P D), for its own exponential, and
//   s (above x; 1 - s below) = e / (1 + e) = e - e^2 + ...,   h = e / (1 + e)^2 = e - 2 e^2 + 3 e^3 - ...
// e is at most q = exp(-P g), g the smallest distance of two midpoints. The series alternate, so two terms are off by
// at most q^2 e and 3 q^2 e: where 3 q^2 <= 4 u, that is P g >= 8.2, by no more than ex2.approx alone may put into e.
// So each s_j and h_j is as good as one with its own exponential, relative to itself, and with it grad_x, a sum of
// positive P d_j h_j, and the gradient of a center however far from it all weights are, where a bound relative to g
// would not do.
//
// So grad_x / g is P d h of the two midpoints and y (sum_j P d_j r_j - 2 y sum_j P d_j r_j^2) of a side, whose sums the
// table of the cell has. A center's gradient is g (s_below - s_above) - (P d h g of both) / 2 by its two midpoints:
// the two beside x reach three centers, and what lies further out is linear in the sums of g y and g y^2 over a cell.
#pragma once

#include "soft_gradient.h"
#include "soft_window.h"

namespace qk::cuda {

// A block's sums take 5 m + 2 columns of 512 bytes: with so many centers all it shares stays within the 99 KB that
// every GPU from 8.0 on gives a block.
constexpr int kMostGradientWindowLevels = 37;

// Whether the row may be computed so, by one thread.
__device__ inline bool gradient_window_suffices(const float* c, int levels, float sharpness) {
  const double q = exp2(-kLog2E * static_cast<double>(sharpness) * smallest_gap(c, levels));
  return 3.0 * q * q <= 4.0 * 0x1p-24;
}

// What a cell of the line, the elements between midpoint k - 1 and midpoint k, needs; words of tables that lanes read
// at places of their own without conflicts, up to 16 cells.
struct GradientWindow {
  float2* position;  // [levels] of the midpoints below and above, stretched
  float2* steep;     // P d of both
  float2* below;     // coefficients of y and y^2 for the midpoints further below
  float2* above;
  double* ratio;  // [levels] exp(-P (t_j - t_{j-1})) for j > 0
  float* edges;   // [2^steps - 1], infinite past the last

  static QK_HD int words(int levels, int steps) { return 10 * levels + (1 << steps); }

  __device__ GradientWindow(char* memory, int levels)
      : position(reinterpret_cast<float2*>(memory)),
        steep(position + levels),
        below(steep + levels),
        above(below + levels),
        ratio(reinterpret_cast<double*>(above + levels)),
        edges(reinterpret_cast<float*>(ratio + levels)) {}

  __device__ void fill(const float* c, int levels, int steps, float sharpness, float stretch, int thread,
                       int threads) const {
    const double P = sharpness;
    const auto middle = [&](int j) { return 0.5 * static_cast<double>(c[j]) + 0.5 * static_cast<double>(c[j + 1]); };
    const auto slope = [&](int j) { return P * (static_cast<double>(c[j + 1]) - static_cast<double>(c[j])); };
    const auto apart = [&](double distance) { return exp2(-kLog2E * P * distance); };
    // Of the midpoints from j on, by `by`, past the one at t.
    const auto beyond = [&](double t, int j, int by) {
      double first = 0.0, second = 0.0;
      for (; j >= 0 && j + 1 < levels; j += by) {
        const double r = apart(fabs(middle(j) - t));
        if (!(r >= kLeast)) {
          break;
        }
        first += slope(j) * r;
        second -= 2.0 * slope(j) * r * r;
      }
      return make_float2(static_cast<float>(first), static_cast<float>(second));
    };
    for (int k = thread; k < levels; k += threads) {
      const bool has_below = k > 0, has_above = k + 1 < levels;
      position[k] = make_float2(has_below ? midpoint_position(c, k - 1, stretch) : -kFarAway,
                                has_above ? midpoint_position(c, k, stretch) : kFarAway);
      steep[k] = make_float2(has_below ? static_cast<float>(slope(k - 1)) : 0.0f,
                             has_above ? static_cast<float>(slope(k)) : 0.0f);
      below[k] = has_below ? beyond(middle(k - 1), k - 2, -1) : make_float2(0.0f, 0.0f);
      above[k] = has_above ? beyond(middle(k), k + 1, 1) : make_float2(0.0f, 0.0f);
      ratio[k] = has_below && has_above ? apart(middle(k) - middle(k - 1)) : 0.0;
    }
    for (int k = thread; k + 1 < 1 << steps; k += threads) {
      edges[k] = k + 1 < levels ? midpoint_position(c, k, stretch) : INFINITY;
    }
  }

  // Midpoints below x, of at most 2^kSteps - 1; none for NaN.
  template <int kSteps>
  __device__ __forceinline__ int cell_of(float x) const {
    constexpr int kHalf = 1 << (kSteps - 1), kQuarter = kHalf / 2;
    const bool upper = x > edges[kHalf - 1];  // these three are the same for all x, and kept
    int k = upper ? kHalf : 0;
    k += x > (upper ? edges[kHalf + kQuarter - 1] : edges[kQuarter - 1]) ? kQuarter : 0;
#pragma unroll
    for (int step = kQuarter / 2; step > 0; step /= 2) {
      k += x > edges[k + step - 1] ? step : 0;
    }
    return k;
  }

  static constexpr double kLeast = 0x1p-90;  // as BackwardGroup::kFloor
};

// A thread's sums. Of each center, with one before the first and one behind the last for midpoints that do not exist:
// what the midpoints beside x give to it. Of each cell: g y and g y^2 of the midpoint below, then of that above.
class GradientWindowSums {
 public:
  static QK_HD int near_columns(int levels) { return levels + 2; }
  static QK_HD int columns(int levels) { return near_columns(levels) + 4 * levels; }

  __device__ GradientWindowSums(float* memory, int levels)
      : near_(memory + threadIdx.x),
        far_(reinterpret_cast<float4*>(memory + near_columns(levels) * kThreads) + threadIdx.x) {}

  __device__ __forceinline__ void add(int cell, float below, float own, float above, float4 far) const {
    float* const near = near_ + cell * kThreads;
    const float before = near[0], here = near[kThreads], behind = near[2 * kThreads];
    float4& held = far_[cell * kThreads];
    const float4 sum = held;
    near[0] = before + below;
    near[kThreads] = here + own;
    near[2 * kThreads] = behind + above;
    held = make_float4(sum.x + far.x, sum.y + far.y, sum.z + far.z, sum.w + far.w);
  }

  // totals[column] over the threads of a block that has one row. Between barriers.
  static __device__ void total(const Cut& cut, float* memory, int levels, float* totals) {
    const int near = near_columns(levels), lane = static_cast<int>(threadIdx.x) % kWarp;
    Columns<true>(memory).total(cut, near, totals);
    const auto* const far = reinterpret_cast<const float4*>(memory + near * kThreads);
    for (int cell = static_cast<int>(threadIdx.x) / kWarp; cell < levels; cell += kWarps) {
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int w = 0; w < kWarps; ++w) {
        const float4 held = far[cell * kThreads + w * kWarp + lane];
        sum = make_float4(sum.x + held.x, sum.y + held.y, sum.z + held.z, sum.w + held.w);
      }
      sum = make_float4(warp_sum(sum.x), warp_sum(sum.y), warp_sum(sum.z), warp_sum(sum.w));
      if (lane == 0) {
        float* const to = totals + near + 4 * cell;
        to[0] = sum.x;
        to[1] = sum.y;
        to[2] = sum.z;
        to[3] = sum.w;
      }
    }
  }

 private:
  float* near_;
  float4* far_;
};

// x stretched; g 0 for elements that do not exist.
template <int kSteps, int kCount>
__device__ __forceinline__ void soft_gradient_near(const GradientWindow& window, const SoftRate& rate,
                                                   const float (&x)[kCount], const float (&g)[kCount],
                                                   float (&grad_x)[kCount], const GradientWindowSums& sums) {
  constexpr int kTogether = 4;  // all that is read for them precedes what is written, which the compiler cannot tell
  static_assert(kCount % kTogether == 0, "whole parts");
  int cell[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    cell[e] = window.cell_of<kSteps>(x[e]);
  }
#pragma unroll
  for (int begin = 0; begin < kCount; begin += kTogether) {
    float below[kTogether], own[kTogether], above[kTogether];
    float4 far[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int e = begin + i, k = cell[e];
      const float2 t = window.position[k], steep = window.steep[k], lower = window.below[k], upper = window.above[k];
      // Neither exponent is positive but for an infinite x and a midpoint that does not exist.
      const float y_low = exp2_approx(min_or_nan(rate.exponent(x[e], t.x), 0.0f));
      const float y_high = exp2_approx(min_or_nan(rate.exponent(t.y, x[e]), 0.0f));
      const float s_low = rcp_approx(1.0f + y_low), rest_high = rcp_approx(1.0f + y_high);
      const float g_low = g[e] * y_low, g_high = g[e] * y_high;
      const float to_below = g_low * s_low, to_above = g_high * rest_high;  // g (1 - s) and g s
      const float bump_low = steep.x * (to_below * s_low), bump_high = steep.y * (to_above * rest_high);
      const float near = bump_low + bump_high;
      grad_x[e] =
          QK_FMA(g_high, QK_FMA(y_high, upper.y, upper.x), QK_FMA(g_low, QK_FMA(y_low, lower.y, lower.x), near));
      below[i] = QK_FMA(-0.5f, bump_low, to_below);
      above[i] = QK_FMA(-0.5f, bump_high, to_above);
      own[i] = QK_FMA(-0.5f, near, g[e] - (to_below + to_above));
      far[i] = make_float4(g_low, g_low * y_low, g_high, g_high * y_high);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      sums.add(cell[begin + i], below[i], own[i], above[i], far[i]);
    }
  }
}

// grad_c_k from a row's totals of GradientWindowSums.
__device__ inline float window_center_gradient(const GradientWindow& window, const float* totals, const float* c,
                                               int levels, float sharpness, int k) {
  const float* const far = totals + GradientWindowSums::near_columns(levels);
  double gradient = static_cast<double>(totals[k + 1]) + (k == 0 ? static_cast<double>(totals[0]) : 0.0) +
                    (k + 1 == levels ? static_cast<double>(totals[levels + 1]) : 0.0);
  // What cells that midpoint j is not beside add to g s_j, up to the g of those above, and to g h_j.
  const auto add_midpoint = [&](int j, double sign) {
    double rising = 0.0, bump = 0.0;
    const auto add_cell = [&](const float* sums, double side, double r) {
      const double first = r * static_cast<double>(sums[0]), second = r * r * static_cast<double>(sums[1]);
      rising += side * (first - second);
      bump += first - 2.0 * second;
    };
    double r = 1.0;
    for (int cell = j - 1; cell >= 0; --cell) {
      r *= window.ratio[cell + 1];
      add_cell(far + 4 * cell + 2, 1.0, r);
    }
    r = 1.0;
    for (int cell = j + 2; cell < levels; ++cell) {
      r *= window.ratio[cell - 1];
      add_cell(far + 4 * cell, -1.0, r);
    }
    const double steep = static_cast<double>(sharpness) * (static_cast<double>(c[j + 1]) - static_cast<double>(c[j]));
    gradient += sign * rising - 0.5 * steep * bump;
  };
  if (k > 0) {
    add_midpoint(k - 1, 1.0);
  }
  if (k + 1 < levels) {
    add_midpoint(k, -1.0);
  }
  return static_cast<float>(gradient);
}

}  // namespace qk::cuda
