// SoftWindow: soft_quantize from the midpoints near x alone, where a row has many and P is large.
//
// The line is cut into kBins bins. Midpoints further than kCut powers of two from a bin have s_j within 2^-kCut of 0 or
// 1 throughout it; all of them together move S by at most (c_m - c_1) 2^-kCut, a 32nd of the unit roundoff of the
// largest center. The few that remain make one fraction with positive coefficients, so nothing cancels: sum_i d_i / (1
// + K_i E) = (b_0 + b_1 E + ...) / (1 + a_1 E + a_2 E^2 + ...), whose coefficients are looked up by bin, in registers.
// Whether a row is computed so depends on its centers, its sharpness and its length, so all of its elements are.
#pragma once

#include <cmath>

#include "soft_row.h"

namespace qk::cpu {

struct SoftWindow {
  static constexpr int kCut = 30;
  static constexpr int kMaxTerms = 8;
  static constexpr int kTables = kBins > 0 ? kBins : 1;

  int terms = 0;                                      // of the denominator; 0: the row is not computed so
  float x_min, x_max;                                 // past these S is an outer center
  float bin_rate;                                     // bins per unit of x
  float bin_start;                                    // what rounds to a bin and puts its number into the low bits
  float width;                                        // c_m - c_1
  alignas(64) int32_t times[kTables];                 // the bin's power of two, in the exponent field
  alignas(64) float base[kTables];                    // c_1 and the steps below the bin
  alignas(64) float numerator[kMaxTerms][kTables];    // b_0, b_1, ... over the width
  alignas(64) float denominator[kMaxTerms][kTables];  // a_1, a_2, ...

  SoftWindow(const SoftRow& row, bool long_enough) {
    const int last = row.midpoints - 1;
    if (kBins == 0 || !long_enough || row.kind == Groups::kOwn || last < kLeast) {
      return;
    }
    const double low = row.exponent[0] - kCut - 1, high = row.exponent[last] + kCut + 1;
    const double span = (high - low) / (kTables - 2);
    const double start = std::rint(low / span);
    width = static_cast<float>(static_cast<double>(row.highest) - row.lowest);
    bin_rate = static_cast<float>(row.rate / span);
    bin_start = static_cast<float>(kWhole - start);
    x_min = in_float((low + 1) / row.rate);
    x_max = in_float((high - 1) / row.rate);
    int needed = 0;
    double below = row.lowest;
    int first = 0;
    for (int k = 0; k < kTables; ++k) {
      const double center = (k + start) * span;
      const double reach = (0.5 + kFuzz) * span + kCut;
      while (first <= last && row.exponent[first] < center - reach) {
        below += row.midpoint[first++].step;
      }
      int end = first;
      while (end <= last && row.exponent[end] <= center + reach) {
        ++end;
      }
      if (end - first > kMaxTerms || !expand(row, k, first, end, center, reach - kCut)) {
        return;
      }
      needed = std::max(needed, end - first);
      base[k] = static_cast<float>(below);
    }
    if (needed * kWorth <= row.midpoints) {
      terms = std::max(needed, 1);
    }
  }

  QK_HD Vec clamp(Vec x) const { return smaller(splat(x_max), larger(splat(x_min), x)); }

 private:
  static constexpr int kLeast = 5;
  // A term costs two lookups; with AVX2 each is three instructions.
  static constexpr int kWorth = kBins == 32 ? 1 : 2;
  static constexpr double kWhole = 12582912.0;  // 1.5 * 2^23: adding it rounds to a whole number
  static constexpr double kFuzz = 0x1p-6;       // bin_rate is rounded: a bin ends within a 64th of its width
  static constexpr double kMostBits = 120.0;
  static constexpr double kSmallest = 0x1p-100;  // below, a coefficient is next to nothing beside the leading 1

  // The coefficients of bin k; false where the denominator could leave the range of float32.
  bool expand(const SoftRow& row, int k, int first, int end, double center, double half) {
    const double whole = std::rint(center - row.reference);
    times[k] = to_exponent_field(whole);
    double a[kMaxTerms + 1] = {1.0}, b[kMaxTerms] = {};
    double bits = end - first;
    for (int j = first; j < end; ++j) {
      bits += std::max(0.0, row.exponent[j] - (center - half));
      const double factor = std::exp2(row.exponent[j] - row.reference - whole);
      const double share = row.midpoint[j].step / static_cast<double>(width);
      const int degree = j - first;
      // b / a + share / (1 + factor E)
      for (int i = degree; i >= 0; --i) {
        b[i] += share * a[i] + (i > 0 ? factor * b[i - 1] : 0.0);
      }
      for (int i = degree + 1; i > 0; --i) {
        a[i] += factor * a[i - 1];
      }
    }
    for (int i = 0; i < kMaxTerms; ++i) {
      numerator[i][k] = b[i] < kSmallest ? 0.0f : static_cast<float>(b[i]);
      denominator[i][k] = a[i + 1] < kSmallest ? 0.0f : static_cast<float>(a[i + 1]);
    }
    return bits < kMostBits;
  }
};

// S before it is held within the outer centers.
template <int N>
QK_HD void sums_near(const SoftRow& row, const SoftWindow& window, const Vec (&x)[N], Vec (&sum)[N]) {
  const Table table(row.table.entry);
  const BinTable times(window.times), base(window.base);
  const int last = window.terms - 1;
  Vec power[N], above[N], below[N];
  Ints bin[N];
  for (int i = 0; i < N; ++i) {
    const Vec clamped = window.clamp(x[i]);
    bin[i] = bits_of(fma(clamped, splat(window.bin_rate), splat(window.bin_start)));
    const Exp2 e = exp2_of_product(splat(-row.rate), clamped);
    power[i] = exp2_of(e.mantissa, lookup(table, e.steps) + (shift_to_exponent(e.steps) + lookup(times, bin[i])));
    above[i] = float_of(lookup(BinTable(window.numerator[last]), bin[i]));
    below[i] = float_of(lookup(BinTable(window.denominator[last]), bin[i]));
  }
  for (int t = last - 1; t >= 0; --t) {
    const BinTable numerator(window.numerator[t]), denominator(window.denominator[t]);
    for (int i = 0; i < N; ++i) {
      above[i] = fma(above[i], power[i], float_of(lookup(numerator, bin[i])));
      below[i] = fma(below[i], power[i], float_of(lookup(denominator, bin[i])));
    }
  }
  for (int i = 0; i < N; ++i) {
    const Vec share = above[i] * reciprocal(fma(below[i], power[i], splat(1.0f)));
    sum[i] = fma(share, splat(window.width), float_of(lookup(base, bin[i])));
  }
}

}  // namespace qk::cpu
