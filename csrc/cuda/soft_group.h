// What a row of centers needs for S and its gradient, in groups of three midpoints: one exponential serves a group.
//
// With E = 2^(k (x - r)), k = -P log2 e and r the middle of the group, e_j = exp(-P (x - t_j)) = f_j E, f_j = 2^(k (r -
// t_j)). All coefficients are positive, so nothing cancels. A group is computed so where P |r - t_j| <= kReach: E then
// carries at most 3 u P |r - t_j| <= 15 u of error into e_j beside what P (x - t_j) itself costs, and u, f_j and E's
// function 6 u more. That is less than s_j's bound, whose 18 u count e_j with 1 - s_j. Else each e_j has its own
// exponential. Groups are made by the threads of a block when it starts, in float64.
#pragma once

#include "../math/cell.h"
#include "platform.h"

namespace qk::cuda {

constexpr int kGroup = 3;
constexpr double kReach = 5.0;
constexpr double kLog2E = 1.4426950408889634;
constexpr float kFarAway = 3.402823466e38f;  // of midpoints that do not exist: no x is above

QK_HD int groups_of(int levels) { return (levels - 1 + kGroup - 1) / kGroup; }

// x and positions are multiplied by `stretch`, 1 but for the largest sharpness, so that k is finite.
struct SoftRate {
  float stretch;
  float k;

  __device__ explicit SoftRate(float sharpness)
      : stretch(sharpness > 1.7e38f ? 4.0f : 1.0f),
        k(static_cast<float>(-kLog2E / stretch * static_cast<double>(sharpness))) {}

  __device__ __forceinline__ float exponent(float stretched, float position) const {
    return k * (stretched - position);
  }
};

struct GroupSource {
  int count;         // midpoints it has
  double t[kGroup];  // 0 where there is none
  double d[kGroup];
  double first, last;

  __device__ GroupSource(const float* centers, int levels, int group) : count(0), first(0.0), last(0.0) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int j = group * kGroup + i;
      t[i] = d[i] = 0.0;
      if (j + 1 < levels) {
        const double low = centers[j], high = centers[j + 1];
        t[i] = 0.5 * low + 0.5 * high;
        d[i] = high - low;
        first = i == 0 ? t[i] : first;
        last = t[i];
        count = i + 1;
      }
    }
  }
};

// `most` is negative where every midpoint has its own exponential.
struct GroupShape {
  float reference;         // r, stretched
  float most;              // E is at most 2^most, so that nothing overflows
  double factor[kGroup];   // f_j; 0 where there is no midpoint
  float position[kGroup];  // t_j, stretched

  // floor: S may stop changing where every s_j of the group is below 2^-floor.
  __device__ GroupShape(const GroupSource& source, float sharpness, float stretch, double floor) {
    const double rate = kLog2E * static_cast<double>(sharpness);
    reference = static_cast<float>((0.5 * source.first + 0.5 * source.last) * stretch);
    const double r = static_cast<double>(reference) / stretch;  // its rounding is in the factors
    const bool near = static_cast<double>(sharpness) * (source.last - source.first) <= 2.0 * kReach;
    most = near ? static_cast<float>(floor + rate * (r - source.first)) : -1.0f;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const bool exists = i < source.count;
      position[i] = exists ? static_cast<float>(source.t[i] * stretch) : kFarAway;
      factor[i] = exists && near ? exp2(rate * (source.t[i] - r)) : 0.0;
    }
  }
};

// sum_j d_j s_j = (n_0 + n_1 E + n_2 E^2) / (1 + a_1 E + a_2 E^2 + a_3 E^3)
struct alignas(16) ForwardGroup {
  float reference, most;
  float n[3], a[3];
  float position[3], step[3];  // for exponentials of their own
  float unused[2];

  static constexpr double kFloor = 30.0;    // s below 2^-30 move S by less than its rounding; E^3 stays below 2^119
  static constexpr float kOwnMost = 40.0f;  // three of these multiply

  __device__ ForwardGroup(const float* centers, int levels, int group, float sharpness, float stretch) {
    const GroupSource source(centers, levels, group);
    const GroupShape shape(source, sharpness, stretch, kFloor);
    reference = shape.reference;
    most = shape.most;
    const double f0 = shape.factor[0], f1 = shape.factor[1], f2 = shape.factor[2];
    const double d0 = source.d[0], d1 = source.d[1], d2 = source.d[2];
    n[0] = static_cast<float>(d0 + d1 + d2);
    n[1] = static_cast<float>(d0 * (f1 + f2) + d1 * (f0 + f2) + d2 * (f0 + f1));
    n[2] = static_cast<float>(d0 * f1 * f2 + d1 * f0 * f2 + d2 * f0 * f1);
    a[0] = static_cast<float>(f0 + f1 + f2);
    a[1] = static_cast<float>(f0 * f1 + f0 * f2 + f1 * f2);
    a[2] = static_cast<float>(f0 * f1 * f2);
    for (int i = 0; i < kGroup; ++i) {
      position[i] = shape.position[i];
      step[i] = static_cast<float>(source.d[i]);
    }
  }
};

// sum_j d_j s_j of a group, x stretched.
__device__ __forceinline__ float group_sum(const ForwardGroup& group, const SoftRate& rate, float x) {
  if (group.most >= 0.0f) {
    const float e = exp2_approx(min_or_nan(rate.exponent(x, group.reference), group.most));
    const float above = QK_FMA(e, QK_FMA(e, group.n[2], group.n[1]), group.n[0]);
    const float below = QK_FMA(e, QK_FMA(e, QK_FMA(e, group.a[2], group.a[1]), group.a[0]), 1.0f);
    return above * rcp_approx(below);
  }
  float y[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    y[i] = 1.0f + exp2_approx(min_or_nan(rate.exponent(x, group.position[i]), ForwardGroup::kOwnMost));
  }
  const float y01 = y[0] * y[1], y02 = y[0] * y[2], y12 = y[1] * y[2];
  const float above = QK_FMA(group.step[2], y01, QK_FMA(group.step[1], y02, group.step[0] * y12));
  return above * rcp_approx(y01 * y[2]);
}

struct alignas(16) BackwardGroup {
  float reference, most;
  float factor[3];
  float steep[3];  // P d_j
  float position[3];
  float unused;

  static constexpr double kFloor = 90.0;  // s and h below 2^-90 may stop changing; f_j E stays below 2^105
  static constexpr float kOwnMost = 100.0f;

  __device__ BackwardGroup(const float* centers, int levels, int group, float sharpness, float stretch) {
    const GroupSource source(centers, levels, group);
    const GroupShape shape(source, sharpness, stretch, kFloor);
    reference = shape.reference;
    most = shape.most;
    for (int i = 0; i < kGroup; ++i) {
      factor[i] = static_cast<float>(shape.factor[i]);
      steep[i] = static_cast<float>(static_cast<double>(sharpness) * source.d[i]);
      position[i] = shape.position[i];
    }
  }
};

}  // namespace qk::cuda
