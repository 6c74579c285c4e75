// Double-double: the unevaluated sum of two float64, 105 bits, for running sums whose differences must keep their
// digits. The same bits on every instruction set: a product is split exactly with and without a fused multiply-add.
#pragma once

#include "../math/macros.h"

namespace qk::cpu {

struct DoubleDouble {
  double high = 0.0;
  double low = 0.0;

  double rounded() const { return high + low; }
};

// a + b exactly (Knuth).
QK_HD DoubleDouble two_sum(double a, double b) {
  const double sum = a + b;
  const double part = sum - a;
  return {sum, (a - (sum - part)) + (b - part)};
}

// a + b exactly, where |a| >= |b| or a = 0 (Dekker).
QK_HD DoubleDouble quick_two_sum(double a, double b) {
  const double sum = a + b;
  return {sum, b - (sum - a)};
}

// a b exactly, where nothing under- or overflows: here a product of three float32 at most.
QK_HD DoubleDouble two_product(double a, double b) {
  const double product = a * b;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return {product, __builtin_fma(a, b, -product)};
#else
  constexpr double kSplit = 134217729.0;  // 2^27 + 1 cuts 53 bits into 26 and 26 (Veltkamp)
  const double scaled_a = kSplit * a, scaled_b = kSplit * b;
  const double high_a = scaled_a - (scaled_a - a), high_b = scaled_b - (scaled_b - b);
  const double low_a = a - high_a, low_b = b - high_b;
  return {product, ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b};
#endif
}

// Off by at most 2^-104 (|a| + |b|); cheaper than plus(), for sums of many terms.
QK_HD DoubleDouble accumulate(const DoubleDouble& a, const DoubleDouble& b) {
  const DoubleDouble sum = two_sum(a.high, b.high);
  return quick_two_sum(sum.high, sum.low + (a.low + b.low));
}

// Off by at most 3 x 2^-106 |a + b|, whatever cancels (Joldes, Muller, Popescu 2017, AccurateDWPlusDW).
QK_HD DoubleDouble plus(const DoubleDouble& a, const DoubleDouble& b) {
  const DoubleDouble high = two_sum(a.high, b.high);
  const DoubleDouble low = two_sum(a.low, b.low);
  const DoubleDouble sum = quick_two_sum(high.high, high.low + low.high);
  return quick_two_sum(sum.high, sum.low + low.low);
}

QK_HD DoubleDouble minus(const DoubleDouble& a, const DoubleDouble& b) { return plus(a, {-b.high, -b.low}); }

// Off by at most 2^-104 |a b|.
QK_HD DoubleDouble times(const DoubleDouble& a, double b) {
  const DoubleDouble product = two_product(a.high, b);
  return quick_two_sum(product.high, product.low + a.low * b);
}

}  // namespace qk::cpu
