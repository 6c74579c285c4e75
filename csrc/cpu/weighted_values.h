// One row as sorted distinct values with their weights, and the sums k-means needs between any two positions.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "double_double.h"

namespace qk::cpu {

// Sums over a run of values: w, w x and w x^2.
struct Moments {
  DoubleDouble weight, first, second;
};

QK_HD Moments moments_of(double value, double weight) {
  const DoubleDouble first = two_product(weight, value);
  return {{weight, 0.0}, first, times(first, value)};
}

QK_HD Moments accumulate(const Moments& a, const Moments& b) {
  return {accumulate(a.weight, b.weight), accumulate(a.first, b.first), accumulate(a.second, b.second)};
}

inline Moments minus(const Moments& a, const Moments& b) {
  return {minus(a.weight, b.weight), minus(a.first, b.first), minus(a.second, b.second)};
}

// The same sums about a center, in float64: w, w (x - s) and w (x - s)^2.
struct CenteredMoments {
  double weight, first, second;
};

inline CenteredMoments about(const Moments& sums, double center) {
  const DoubleDouble first = minus(sums.first, times(sums.weight, center));
  const DoubleDouble second = minus(sums.second, times(plus(sums.first, first), center));
  return {sums.weight.rounded(), first.rounded(), second.rounded()};
}

// Squared error of a run from its own mean, never negative; 0 for an empty one.
QK_HD double squared_error(double weight, double first, double second) {
  const double error = second - first * first / weight;
  return weight > 0.0 && error > 0.0 ? error : 0.0;
}

class WeightedValues {
 public:
  static constexpr int64_t kRun = 32;  // values between two stored prefixes

  WeightedValues(int64_t count, std::unique_ptr<float[]> values, std::unique_ptr<double[]> weights)
      : count_(count), values_(std::move(values)), weights_(std::move(weights)) {
    prefix_.reserve(static_cast<size_t>(count / kRun + 1));
    prefix_.emplace_back();
    for (int64_t begin = 0; begin + kRun <= count; begin += kRun) {
      prefix_.push_back(accumulate(prefix_.back(), sum_of_run(begin)));
    }
  }

  int64_t count() const { return count_; }
  const float* values() const { return values_.get(); }
  double value(int64_t i) const { return static_cast<double>(values_[i]); }
  double weight(int64_t i) const { return weights_[i]; }

  // Sums over the first `position` values, a multiple of kRun.
  const Moments& stored(int64_t position) const { return prefix_[static_cast<size_t>(position / kRun)]; }

  // Sums over the first `position` values, whatever it is. Ascending positions that lie close together cost one step
  // each.
  class Cursor {
   public:
    explicit Cursor(const WeightedValues& data) : data_(data) {}

    const Moments& at(int64_t position) {
      if (position < position_ || position / kRun > position_ / kRun) {
        position_ = position / kRun * kRun;
        sums_ = data_.prefix_[static_cast<size_t>(position / kRun)];
      }
      for (; position_ < position; ++position_) {
        sums_ = accumulate(sums_, moments_of(data_.value(position_), data_.weight(position_)));
      }
      return sums_;
    }

   private:
    const WeightedValues& data_;
    int64_t position_ = 0;
    Moments sums_;
  };

  Moments between(int64_t begin, int64_t end) const {
    Cursor cursor(*this);
    const Moments before = cursor.at(begin);
    return minus(cursor.at(end), before);
  }

  // Every stored sum is off by at most this times max|x|^2 sum w: a chain of runs, the chain inside one and the terms,
  // each 2^-104, and the polynomial of about(), whose coefficients are at most 4.
  double relative_error() const { return static_cast<double>(count_ / kRun + 2 * kRun) * 0x1p-101; }

 private:
  // In lanes, so that it vectorises.
  Moments sum_of_run(int64_t begin) const {
    constexpr int kWide = 8;
    Moments lanes[kWide];
    for (int64_t i = begin; i < begin + kRun; i += kWide) {
      for (int l = 0; l < kWide; ++l) {
        lanes[l] = accumulate(lanes[l], moments_of(value(i + l), weight(i + l)));
      }
    }
    Moments sum = lanes[0];
    for (int l = 1; l < kWide; ++l) {
      sum = accumulate(sum, lanes[l]);
    }
    return sum;
  }

  int64_t count_;
  std::unique_ptr<float[]> values_;
  std::unique_ptr<double[]> weights_;
  std::vector<Moments> prefix_;  // before each run
};

}  // namespace qk::cpu
