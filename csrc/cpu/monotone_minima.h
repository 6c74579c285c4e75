// One layer of the k-means program: best[t] = min_c before[c] + error(between c and t) for every target t.
//
// The squared error is concave Monge, error(a, c) + error(b, d) <= error(a, d) + error(b, c) for a <= b <= c <= d, and
// stays so with error = 0 where the run is empty or reversed, so the best c never falls as t grows: divide and conquer.
// Bound by the division, eight at a time with AVX-512.
//
// Rounding: if every before[c] + error is off by at most e, a choice at one target that is wrong by 2e misleads those
// beside it by 2e (Monge), and so on down the levels: best[t] is at most (2 levels + 1) e above the true minimum.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "centered_positions.h"

namespace qk::cpu {

// Forward: runs begin at a candidate and end at a target. Backward: the other way round.
template <bool Forward>
class MonotoneMinima {
 public:
  // strict: candidate c is at position c, target t at position t + shift, and runs must not be empty.
  MonotoneMinima(const Positions& candidates, const double* before, const Positions& targets, double* best)
      : candidates_(candidates), before_(before), targets_(targets), best_(best) {}

  void run() { divide(0, targets_.count() - 1, 0, candidates_.count() - 1); }

  void run_strictly(int64_t shift) {
    strict_ = true;
    shift_ = shift;
    run();
  }

 private:
  static constexpr int kScan = 32;
  static constexpr int kWide = 8;

  void divide(int64_t target_from, int64_t target_to, int64_t from, int64_t to) {
    if (target_from > target_to) {
      return;
    }
    const int64_t target = target_from + (target_to - target_from) / 2;
    int64_t first = from, last = to;
    if (strict_ && Forward) {
      last = std::min(last, target + shift_ - 1);
    } else if (strict_) {
      first = std::max(first, target + shift_ + 1);
    }
    const int64_t chosen = scan(target, first, last);
    divide(target_from, target - 1, from, chosen);
    divide(target + 1, target_to, chosen, to);
  }

  double total(int64_t c, double weight, double first, double second) const {
    constexpr double kSign = Forward ? 1.0 : -1.0;
    return before_[c] + squared_error(kSign * (weight - candidates_.weight[static_cast<size_t>(c)]),
                                      kSign * (first - candidates_.first[static_cast<size_t>(c)]),
                                      kSign * (second - candidates_.second[static_cast<size_t>(c)]));
  }

  // The first best candidate in [first, last] of one target.
  int64_t scan(int64_t target, int64_t first, int64_t last) {
    const auto t = static_cast<size_t>(target);
    const double weight = targets_.weight[t], sum = targets_.first[t], squares = targets_.second[t];
    double least = std::numeric_limits<double>::infinity();
    int64_t chosen = first, c = first;
    for (; c + kScan <= last + 1; c += kScan) {
      alignas(64) double value[kScan];
      for (int i = 0; i < kScan; ++i) {
        value[i] = total(c + i, weight, sum, squares);
      }
      alignas(64) double lane[kWide];
      for (int l = 0; l < kWide; ++l) {
        lane[l] = value[l];
      }
      for (int i = kWide; i < kScan; i += kWide) {
        for (int l = 0; l < kWide; ++l) {
          lane[l] = value[i + l] < lane[l] ? value[i + l] : lane[l];
        }
      }
      const double here = *std::min_element(lane, lane + kWide);
      if (here < least) {
        least = here;
        chosen = c + (std::find(value, value + kScan, here) - value);
      }
    }
    for (; c <= last; ++c) {
      const double here = total(c, weight, sum, squares);
      if (here < least) {
        least = here;
        chosen = c;
      }
    }
    best_[target] = least;
    return chosen;
  }

  const Positions& candidates_;
  const double* before_;
  const Positions& targets_;
  double* best_;
  bool strict_ = false;
  int64_t shift_ = 0;
};

}  // namespace qk::cpu
