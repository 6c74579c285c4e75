// The sums of a run of values about a center near its mean, at each of a list of positions: differences of these are
// what a squared error is computed from. exact_kmeans.h bounds how far they are off.
#pragma once

#include <cstdint>
#include <vector>

#include "weighted_values.h"

namespace qk::cpu {

// Centered sums before each of a list of ascending positions, relative to a base.
struct Positions {
  std::vector<double> weight, first, second;

  int64_t count() const { return static_cast<int64_t>(weight.size()); }
};

// The center that sums are about, and the sums before the position they are relative to.
struct Frame {
  double center;
  Moments base;
};

// A few terms more, with their roundings carried along but not into the next sum.
struct CenteredSums {
  DoubleDouble weight, first, second;

  CenteredSums() = default;
  explicit CenteredSums(const CenteredMoments& from) : weight{from.weight}, first{from.first}, second{from.second} {}

  void add(double offset, double mass) {
    const double pull = mass * offset;
    carry(weight, mass);
    carry(first, pull);
    carry(second, pull * offset);
  }

 private:
  static void carry(DoubleDouble& sum, double term) {
    const DoubleDouble next = two_sum(sum.high, term);
    sum = {next.high, sum.low + next.low};
  }
};

// at(i) for i in [0, count): ascending positions.
template <class At>
Positions positions_in(const WeightedValues& data, const Frame& frame, int64_t count, At&& at) {
  const auto size = static_cast<size_t>(count);
  Positions made{std::vector<double>(size), std::vector<double>(size), std::vector<double>(size)};
  int64_t here = data.count() + WeightedValues::kRun;  // far from all
  CenteredSums sums;
  for (size_t i = 0; i < size; ++i) {
    const int64_t position = at(i);
    if (position < here || position / WeightedValues::kRun > here / WeightedValues::kRun) {
      here = position / WeightedValues::kRun * WeightedValues::kRun;
      sums = CenteredSums(about(minus(data.stored(here), frame.base), frame.center));
    }
    for (; here < position; ++here) {
      sums.add(data.value(here) - frame.center, data.weight(here));
    }
    made.weight[i] = sums.weight.rounded();
    made.first[i] = sums.first.rounded();
    made.second[i] = sums.second.rounded();
  }
  return made;
}

}  // namespace qk::cpu
