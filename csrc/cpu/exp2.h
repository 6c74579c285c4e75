// 2^v for sixteen v at a time, in two parts: 2^v = mantissa * 2^steps, steps a multiple of 2^-kTableBits. The second
// part comes from a table in a register and an integer addition, so that other powers of two cost next to nothing.
//
// Within 1.5 ulp: the mantissa is rounded once and carries the polynomial's error, the table's entry and the product
// are rounded once each.
#pragma once

#include <cmath>

#include "simd.h"

namespace qk::cpu {

constexpr int kSteps = 1 << kTableBits;
// Adding it rounds to a multiple of 1 / kSteps, which is then found in the low bits: 1.5 times the power of two whose
// last place that is.
constexpr float kRound = 1.5f * static_cast<float>(1 << (23 - kTableBits));
constexpr int kStepsShift = 23 - kTableBits;
constexpr int32_t kMaxExponent = 1 << 17;  // |v| up to which kRound works

struct Exp2 {
  Vec mantissa;  // 2^(v - steps)
  Ints steps;    // kSteps times the rounded v, in the low bits
};

// 2^(rate x), |rate x| < kMaxExponent. With fused products rate x is never rounded; without them it is off by one unit
// roundoff of it.
QK_HD Exp2 exp2_of_product(Vec rate, Vec x) {
  const Vec shifted = fma(x, rate, splat(kRound));
  const Vec f = fma(x, rate, splat(kRound) - shifted);  // |f| <= 1 / (2 kSteps)
  // (2^f - 1) / f, minimax on that interval
  Vec q;
  if constexpr (kTableBits == 4) {  // relative error of 2^f below 1.6e-9
    q = fma(f, splat(0.0555021353f), splat(0.240234286f));
    q = fma(f, q, splat(0.693147182f));
  } else if constexpr (kTableBits == 3) {  // below 2.7e-8
    q = fma(f, splat(0.0554962233f), splat(0.240257636f));
    q = fma(f, q, splat(0.693147242f));
  } else {  // below 1.6e-8
    static_assert(kTableBits == 0 || kTableBits == 3 || kTableBits == 4, "no polynomial for this interval");
    q = fma(f, splat(0.000153533634f), splat(0.00133988739f));
    q = fma(f, q, splat(0.00961843692f));
    q = fma(f, q, splat(0.0555033237f));
    q = fma(f, q, splat(0.240226477f));
    q = fma(f, q, splat(0.693147182f));
  }
  return {fma(f, q, splat(1.0f)), bits_of(shifted)};
}

// What `steps` reads for a v of this value.
inline int32_t steps_of(int32_t exponent) { return static_cast<int32_t>(math::bits_of(kRound)) + exponent * kSteps; }

// Entry k: 2^(k / kSteps + offset), 0 <= offset < 1, less what k will add to the exponent field when steps are shifted
// there; `times`, a power of two in the exponent field, is added.
struct Exp2Table {
  alignas(64) int32_t entry[16] = {};

  explicit Exp2Table(double offset = 0.0, int32_t times = 0) {
    const double scale = std::exp2(offset);
    for (uint32_t k = 0; k < kSteps; ++k) {
      const auto power = static_cast<float>(scale * kSixteenthPowers[k * (16 / kSteps)]);
      entry[k] = static_cast<int32_t>(math::bits_of(power) - (k << kStepsShift) + static_cast<uint32_t>(times));
    }
  }

 private:
  static constexpr double kSixteenthPowers[16] = {
      1.0,
      1.0442737824274138,
      1.0905077326652577,
      1.1387886347566916,
      1.189207115002721,
      1.241857812073484,
      1.2968395546510096,
      1.3542555469368927,
      1.4142135623730951,
      1.4768261459394993,
      1.5422108254079407,
      1.6104903319492543,
      1.681792830507429,
      1.7562521603732995,
      1.8340080864093424,
      1.9152065613971474,
  };
};

QK_HD Ints shift_to_exponent(Ints steps) { return shift_left<kStepsShift>(steps); }

// mantissa times the power of two whose bits are lookup(table, steps) + shift_to_exponent(steps).
QK_HD Vec exp2_of(Vec mantissa, Ints power) { return mantissa * float_of(power); }

}  // namespace qk::cpu
