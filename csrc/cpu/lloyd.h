// Partitions of sorted values into runs, given by their boundaries: run k is [boundary k, boundary k + 1). Their
// squared error, and Lloyd's iteration, which finds a nearby local optimum in O(m log n) a step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "weighted_values.h"

namespace qk::cpu {

inline double mean_of(const Moments& sums) { return sums.first.rounded() / sums.weight.rounded(); }

// Each run's about its own mean, from sums of 105 bits.
inline double error_of(const WeightedValues& data, const std::vector<int64_t>& boundaries) {
  double error = 0.0;
  for (size_t k = 0; k + 1 < boundaries.size(); ++k) {
    const Moments sums = data.between(boundaries[k], boundaries[k + 1]);
    const CenteredMoments own = about(sums, mean_of(sums));
    error += squared_error(own.weight, own.first, own.second);
  }
  return error;
}

// Where boundary k may lie so that no run is empty, given the one before it.
inline int64_t allowed(const WeightedValues& data, const std::vector<int64_t>& boundaries, size_t k, int64_t wanted) {
  const auto after = static_cast<int64_t>(boundaries.size() - 1 - k);  // runs, of a value each at least
  return std::clamp(wanted, boundaries[k - 1] + 1, data.count() - after);
}

inline void ascend(const WeightedValues& data, std::vector<int64_t>& boundaries) {
  for (size_t k = 1; k + 1 < boundaries.size(); ++k) {
    boundaries[k] = allowed(data, boundaries, k, boundaries[k]);
  }
}

// Boundaries to the midpoints of the means, all at once, until they stay or have moved kSteps times.
inline void improve(const WeightedValues& data, std::vector<int64_t>& boundaries) {
  constexpr int kSteps = 50;
  const float* values = data.values();
  WeightedValues::Cursor cursor(data);
  std::vector<Moments> before;  // each boundary
  for (int64_t boundary : boundaries) {
    before.push_back(cursor.at(boundary));
  }
  bool moved = true;
  for (int step = 0; moved && step < kSteps; ++step) {
    moved = false;
    double left = mean_of(minus(before[1], before[0]));
    for (size_t k = 1; k + 1 < boundaries.size(); ++k) {
      const double right = mean_of(minus(before[k + 1], before[k]));
      const int64_t above = std::upper_bound(values, values + data.count(), 0.5 * left + 0.5 * right) - values;
      const int64_t boundary = allowed(data, boundaries, k, above);
      if (boundary != boundaries[k]) {
        moved = true;
        boundaries[k] = boundary;
        before[k] = cursor.at(boundary);
      }
      left = right;
    }
  }
  ascend(data, boundaries);
}

}  // namespace qk::cpu
