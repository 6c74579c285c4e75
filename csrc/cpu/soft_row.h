// SoftRow: what soft_quantize and its gradient need of one row of centers, computed once.
//
// y_j = exp(-P (x - t_j)) gives s_j = sigmoid(P (x - t_j)) = 1 / (1 + y_j) and 1 - s_j = y_j s_j without cancellation.
// In powers of two y_j = 2^(w_j - rate x), w_j = rate t_j, where rate is P log2(e) rounded once: that moves z = P (x -
// t_j) by half a unit roundoff of itself. 2^(-rate x) is computed once an element; midpoints within kGroupBits powers
// of two of each other form a group, which scales it into the range of float32 and multiplies by 2^w_j from a table:
// y_j = E_g K_j with E_g = 2^(w_g - rate x) kept within 2^+-kReach and K_j = 2^(w_j - w_g). So neither overflow nor
// denormal numbers occur, and s_j and 1 - s_j stop changing below 2^(kGroupBits / 2 - kReach) = 2^-64.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "../math/macros.h"
#include "exp2.h"
#include "rows.h"

namespace qk::cpu {

constexpr int kReach = 80;
constexpr int kGroupBits = 32;
constexpr int kOwnReach = 125;  // of a midpoint with an exponential of its own: all of the normal numbers
constexpr int kMaxMidpoints = kMaxLevels - 1;

// A midpoint between equal centers adds nothing to S; its sigmoid still counts in their gradients.
enum class Midpoints { kDistinct, kAll };

// How 2^(w_g - rate x) is formed.
enum class Groups {
  kOne,     // one group: x is clamped, which keeps E within range
  kShared,  // several: the exponent is clamped for each
  kOwn      // P t_j or P d_j too large for one reference: an exponential for each midpoint
};

inline float in_float(double a) {
  return static_cast<float>(std::clamp(a, -static_cast<double>(FLT_MAX), static_cast<double>(FLT_MAX)));
}

// Added to the bits of a float, multiplies it by 2^power.
inline int32_t to_exponent_field(double power) {
  return static_cast<int32_t>(static_cast<uint32_t>(static_cast<int32_t>(power)) << 23);
}

struct SoftMidpoint {
  float factor;    // K_j
  float position;  // t_j
  float step;      // d_j
  float steep;     // P d_j
};

struct SoftGroup {
  int first, end;       // its midpoints
  int32_t times;        // 2^w_g relative to that of the first group, added to the exponent field
  int32_t least, most;  // bounds of the steps
};

struct SoftRow {
  int midpoints = 0;  // kept ones
  float sharpness;
  float lowest, highest;  // the outer centers
  Groups kind;
  float rate;          // P log2(e) / stretch
  float x_min, x_max;  // past these no sigmoid changes
  float stretch;       // of x - t_j, so that rate is finite for any P: 1, else kOwn
  float reach;         // as x_max for the stretched x - t_j: kOwn alone
  Exp2Table table;
  int groups = 0;
  SoftGroup group[kMaxMidpoints];
  SoftMidpoint midpoint[kMaxMidpoints];
  double exponent[kMaxMidpoints];  // w_j
  double reference = 0.0;          // the power of two that the table stands for at x = 0

  SoftRow(const float* centers, int levels, float sharpness_, Midpoints which)
      : sharpness(sharpness_),
        lowest(centers[0]),
        highest(centers[levels - 1]),
        rate(static_cast<float>(sharpness_ / stretch_of(sharpness_) * kLog2E)),
        stretch(stretch_of(sharpness_)),
        table() {
    exponent[0] = 0.0;
    bool near = stretch == 1.0f;  // a NaN is not near
    for (int j = 0; j + 1 < levels; ++j) {
      const double low = centers[j], high = centers[j + 1];
      // The last is kept where all are equal, so that there is a sigmoid for NaN to pass through.
      if (which == Midpoints::kDistinct && low == high && !(j + 2 == levels && midpoints == 0)) {
        continue;
      }
      const double t = 0.5 * (low + high);
      exponent[midpoints] = rate * t;
      // The second keeps P d_j 2^-64, what is left of the slope far out, too small to be seen.
      near = near && std::fabs(rate * t) < kMaxExponent - 2 * kReach && rate * (high - low) < kMaxExponent;
      midpoint[midpoints] = {1.0f, static_cast<float>(t), static_cast<float>(high - low),
                             static_cast<float>(sharpness_ * (high - low))};
      ++midpoints;
    }
    reach = in_float(kOwnReach / static_cast<double>(rate));
    if (near) {
      share();
    } else {
      stand_alone();
    }
  }

 private:
  static constexpr double kLog2E = 1.4426950408889634;

  static float stretch_of(float sharpness) { return sharpness > FLT_MAX / 2 ? 4.0f : 1.0f; }

  void share() {
    const double base = std::floor(exponent[0]);
    const double offset = exponent[0] - base;  // the table carries the fraction of w_1, so that K_1 is a power of two
    double power[kMaxMidpoints] = {};
    for (int j = 0; j < midpoints;) {
      int end = j + 1;
      while (end < midpoints && std::fabs(exponent[end] - exponent[j]) <= kGroupBits) {
        ++end;
      }
      power[groups] = std::rint(0.5 * (exponent[j] + exponent[end - 1]) - offset);
      const auto center = static_cast<int32_t>(power[groups]);
      group[groups] = {j, end, to_exponent_field(power[groups] - power[0]), steps_of(-center - kReach),
                       steps_of(-center + kReach)};
      for (; j < end; ++j) {
        midpoint[j].factor = static_cast<float>(std::exp2(exponent[j] - offset - power[groups]));
      }
      ++groups;
    }
    table = Exp2Table(offset, to_exponent_field(power[0]));
    reference = offset + power[0];
    kind = groups == 1 ? Groups::kOne : Groups::kShared;
    x_min = in_float((power[0] - kReach) / rate);
    x_max = in_float((power[groups - 1] + kReach) / rate);
  }

  void stand_alone() {
    kind = Groups::kOwn;
    x_min = -FLT_MAX;
    x_max = FLT_MAX;
  }
};

// Finite, and no further out than changes anything; NaN stays.
QK_HD Vec clamp_to(const SoftRow& row, Vec x) { return smaller(splat(row.x_max), larger(splat(row.x_min), x)); }

// body(midpoint, E) for every midpoint in order, with E[i] K_j = exp(-P (x[i] - t_j)); x as clamp_to gives it. The body
// is given E, not y_j, so that it may fuse the product.
template <Groups kKind, int N, class Body>
QK_HD void for_each_midpoint(const SoftRow& row, const Vec (&x)[N], Body&& body) {
  const Table table(row.table.entry);
  const Vec rate = splat(-row.rate);
  const SoftMidpoint* midpoint = row.midpoint;
  const SoftMidpoint* const last = row.midpoint + row.midpoints;
  Vec powers[N];
  if constexpr (kKind == Groups::kOwn) {
    const Vec most = splat(row.reach), least = splat(-row.reach), stretch = splat(row.stretch);
    for (; midpoint != last; ++midpoint) {
      for (int i = 0; i < N; ++i) {
        const Vec distance = (x[i] - splat(midpoint->position)) * stretch;
        const Exp2 e = exp2_of_product(rate, smaller(most, larger(least, distance)));
        powers[i] = exp2_of(e.mantissa, lookup(table, e.steps) + shift_to_exponent(e.steps));
      }
      body(*midpoint, powers);
    }
  } else if constexpr (kKind == Groups::kOne) {
    for (int i = 0; i < N; ++i) {
      const Exp2 e = exp2_of_product(rate, x[i]);
      powers[i] = exp2_of(e.mantissa, lookup(table, e.steps) + shift_to_exponent(e.steps));
    }
    for (; midpoint != last; ++midpoint) {
      body(*midpoint, powers);
    }
  } else {
    Exp2 e[N];
    Ints entry[N];
    for (int i = 0; i < N; ++i) {
      e[i] = exp2_of_product(rate, x[i]);
      entry[i] = lookup(table, e[i].steps);
    }
    for (const SoftGroup* group = row.group; midpoint != last; ++group) {
      const Ints least = splat(group->least), most = splat(group->most), times = splat(group->times);
      for (int i = 0; i < N; ++i) {
        const Ints steps = smaller(most, larger(least, e[i].steps));
        powers[i] = exp2_of(e[i].mantissa, entry[i] + (shift_to_exponent(steps) + times));
      }
      for (const SoftMidpoint* const end = row.midpoint + group->end; midpoint != end; ++midpoint) {
        body(*midpoint, powers);
      }
    }
  }
}

}  // namespace qk::cpu
