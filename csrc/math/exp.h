// exp of a number that is not positive, in float32, without a branch or a library call so that loops over it vectorise.
#pragma once

#include "macros.h"

namespace qk::math {

// exp(a) for a <= 0, within 1.1 ulp (all floats tried); 0 below -87 (exp(-87) is about the smallest normal float); NaN
// stays NaN.
QK_HD float exp_of_nonpositive(float a) {
  constexpr float kLowest = -87.0f;
  constexpr float kInvLn2 = 1.44269502f;
  constexpr float kLn2High = 0.693359375f;    // 10 bits: its product with an integer up to 126 is exact
  constexpr float kLn2Low = -2.12194440e-4f;  // ln 2 - kLn2High
  constexpr float kRound = 12582912.0f;       // 1.5 * 2^23: adding it rounds to an integer kept in the low bits
  const float clamped = a < kLowest ? kLowest : a;
  const float shifted = QK_FMA(clamped, kInvLn2, kRound);
  const float k = shifted - kRound;
  float r = QK_FMA(k, -kLn2High, clamped);
  r = QK_FMA(k, -kLn2Low, r);  // |r| <= ln 2 / 2
  // (exp(r) - 1 - r) / r^2, minimax on that interval, relative error of exp below 5e-9
  float q = 0.00138144649f;
  q = QK_FMA(q, r, 0.00836878084f);
  q = QK_FMA(q, r, 0.0416683927f);
  q = QK_FMA(q, r, 0.166665196f);
  q = QK_FMA(q, r, 0.49999994f);
  const float p = QK_FMA(r * r, q, r) + 1.0f;
  const float scale = float_of((bits_of(shifted) << 23) + 0x3f800000u);  // 2^k; garbage for NaN, where p is NaN
  const float e = p * scale;
  return a < kLowest ? 0.0f : e;
}

}  // namespace qk::math
