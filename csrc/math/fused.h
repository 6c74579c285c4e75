// a * b + c rounded once on every target, for formulas that must repeat torch's arithmetic to the bit: its vectorised
// CPU kernels fuse wherever an operation takes a factor (add with alpha, addcmul, lerp).
#pragma once

#include "macros.h"

namespace qk::math {

#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)

QK_HD float fused(float a, float b, float c) { return QK_FMA(a, b, c); }

#else

// The product is exact in double. The sum is rounded to odd there (its last bit set where anything was lost), which
// rounds to float as the exact sum would: 53 bits are more than 2 * 24 + 1. Boldo and Melquiond 2008.
QK_HD float fused(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = static_cast<double>(c);
  const double sum = product + addend;
  const double part = sum - product;
  const double lost = (product - (sum - part)) + (addend - part);  // exact; NaN where the sum is not finite
  uint64_t bits;
  memcpy(&bits, &sum, sizeof bits);
  const bool inexact = lost > 0.0 || lost < 0.0;
  const bool away = (lost > 0.0) == (sum > 0.0);  // the exact sum lies further from zero
  const uint64_t toward = away ? 1u : ~uint64_t{0};
  bits += inexact && (bits & 1u) == 0 ? toward : 0u;
  double odd;
  memcpy(&odd, &bits, sizeof odd);
  return static_cast<float>(odd);
}

#endif

}  // namespace qk::math
