// k-means of one row from its sorted keys: equal values merged, the optimal boundaries found, each run averaged.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "exact_kmeans.h"
#include "sorted_keys.h"
#include "weighted_values.h"

namespace qk::cpu {

using Key = uint32_t;
using WeightedKey = uint64_t;  // the value's key above the bits of its weight: any order of elements sorts to the same

inline float value_in(Key key) { return value_of(key); }
inline float value_in(WeightedKey key) { return value_of(static_cast<Key>(key >> 32)); }
inline double weight_in(Key) { return 1.0; }
inline double weight_in(WeightedKey key) { return static_cast<double>(math::float_of(static_cast<uint32_t>(key))); }

// Sorted keys to distinct values, each with the sum of its weights in ascending order.
template <class AnyKey>
WeightedValues merge(const AnyKey* keys, int64_t count) {
  int64_t distinct = 1;
  for (int64_t i = 1; i < count; ++i) {
    distinct += value_in(keys[i]) != value_in(keys[i - 1]) ? 1 : 0;
  }
  std::unique_ptr<float[]> values(new float[static_cast<size_t>(distinct)]);
  std::unique_ptr<double[]> weights(new double[static_cast<size_t>(distinct)]);
  int64_t last = -1;
  for (int64_t i = 0; i < count; ++i) {
    const float value = value_in(keys[i]);
    if (last < 0 || value != values[last]) {
      values[++last] = value;
      weights[last] = 0.0;
    }
    weights[last] += weight_in(keys[i]);
  }
  return WeightedValues(distinct, std::move(values), std::move(weights));
}

// Over this run alone and about one of its values: nothing outside of it costs digits.
inline float mean_of_run(const WeightedValues& data, int64_t begin, int64_t end) {
  constexpr int kWide = 8;
  const double about = data.value(begin + (end - begin) / 2);
  double sums[kWide] = {}, weights[kWide] = {};
  int64_t i = begin;
  for (; i + kWide <= end; i += kWide) {
    for (int l = 0; l < kWide; ++l) {
      sums[l] += data.weight(i + l) * (data.value(i + l) - about);
      weights[l] += data.weight(i + l);
    }
  }
  for (; i < end; ++i) {
    sums[0] += data.weight(i) * (data.value(i) - about);
    weights[0] += data.weight(i);
  }
  double sum = 0.0, weight = 0.0;
  for (int l = 0; l < kWide; ++l) {
    sum += sums[l];
    weight += weights[l];
  }
  return std::clamp(static_cast<float>(about + sum / weight), data.values()[begin], data.values()[end - 1]);
}

inline void kmeans_of_row(const WeightedValues& data, int levels, float* centers) {
  if (data.count() <= levels) {
    for (int k = 0; k < levels; ++k) {
      centers[k] = data.values()[std::min<int64_t>(k, data.count() - 1)];
    }
    return;
  }
  const std::vector<int64_t> boundaries = ExactKmeans(data, levels).solve();
  for (int k = 0; k < levels; ++k) {
    centers[k] = mean_of_run(data, boundaries[k], boundaries[k + 1]);
  }
}

}  // namespace qk::cpu
