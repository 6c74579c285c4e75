// init_centers. k-means: sort, merge equal values, find the optimal boundaries (exact_kmeans.h), average each run;
// bound by the sort, and by the layers of the program where m is large. Quantiles: the sort. The others: one read of x.
// Rows in parallel; one row is one task.

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "../kernels.h"
#include "chunk.h"
#include "kmeans_row.h"
#include "rows.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "init_centers";
constexpr const char* kNotFinite = "a NaN or an infinity";

bool is_finite(float value) { return (math::bits_of(value) & 0x7fffffffu) < 0x7f800000u; }

template <class T>
int64_t load_keys(const T* x, int64_t length, Key* keys) {
  bool finite = true;
  for_each_chunk(0, length, [&](auto size, int64_t begin, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) float value[Size];
    alignas(64) Key key[Size];
    load_chunk<Size>(x + begin, valid, 0.0f, value);
    bool all = true;
    for (int i = 0; i < Size; ++i) {
      key[i] = key_of(value[i]);
      all &= is_finite(value[i]);
    }
    finite = finite && all;
    std::memcpy(keys + begin, key, static_cast<size_t>(valid) * sizeof(Key));
  });
  QK_CHECK(finite, text(kOp, ": x must be finite"), kNotFinite);
  return length;
}

// Leaves out what has no weight.
template <class T, class W>
int64_t load_keys(const T* x, const W* weights, int64_t length, WeightedKey* keys) {
  bool finite = true, allowed = true;
  int64_t count = 0;
  for_each_chunk(0, length, [&](auto size, int64_t begin, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) float value[Size], weight[Size];
    load_chunk<Size>(x + begin, valid, 0.0f, value);
    load_chunk<Size>(weights + begin, valid, 0.0f, weight);
    for (int i = 0; i < valid; ++i) {
      finite &= is_finite(value[i]);
      allowed &= is_finite(weight[i]) && weight[i] >= 0.0f;
      keys[count] = WeightedKey{key_of(value[i])} << 32 | math::bits_of(weight[i]);
      count += weight[i] > 0.0f ? 1 : 0;
    }
  });
  QK_CHECK(finite, text(kOp, ": x must be finite"), kNotFinite);
  QK_CHECK(allowed, text(kOp, ": weights must be finite and not negative"), "one that is not");
  QK_CHECK(count > 0, text(kOp, ": weights must have a positive entry in every row"), "a row of zeros");
  return count;
}

// Quantiles (k + 1/2) / m, linear between neighbours: the middles of m equally full parts.
void quantiles_of_row(const Key* keys, int64_t count, int levels, float* centers) {
  for (int k = 0; k < levels; ++k) {
    const double share = (k + 0.5) / levels;
    const double position = std::clamp(share * static_cast<double>(count) - 0.5, 0.0, static_cast<double>(count - 1));
    const auto below = static_cast<int64_t>(position);
    const float weight = static_cast<float>(position - static_cast<double>(below));
    const float low = value_of(keys[below]), high = value_of(keys[std::min(below + 1, count - 1)]);
    centers[k] = std::clamp(low * (1.0f - weight) + high * weight, low, high);
  }
}

struct Summary {
  float least = std::numeric_limits<float>::infinity(), most = -std::numeric_limits<float>::infinity();
  double negative_sum = 0.0, other_sum = 0.0;
  int64_t negative_count = 0;
};

template <class T>
Summary summary_of_row(const T* x, int64_t length) {
  Summary summary;
  bool finite = true;
  for_each_chunk(0, length, [&](auto size, int64_t begin, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) float value[Size];
    load_chunk<Size>(x + begin, valid, 0.0f, value);
    for (int i = 0; i < valid; ++i) {
      finite &= is_finite(value[i]);
      summary.least = std::min(summary.least, value[i]);
      summary.most = std::max(summary.most, value[i]);
      const bool negative = value[i] < 0.0f;
      summary.negative_count += negative ? 1 : 0;
      summary.negative_sum += negative ? static_cast<double>(value[i]) : 0.0;
      summary.other_sum += negative ? 0.0 : static_cast<double>(value[i]);
    }
  });
  QK_CHECK(finite, text(kOp, ": x must be finite"), kNotFinite);
  return summary;
}

void linspace_of_row(const Summary& row, int levels, float* centers) {
  for (int k = 0; k < levels; ++k) {
    const float share = static_cast<float>(static_cast<double>(k) / (levels - 1));
    centers[k] = std::clamp(row.least * (1.0f - share) + row.most * share, row.least, row.most);
  }
  std::sort(centers, centers + levels);  // neighbours an ulp apart can fall out of order
}

// A side without weights takes the other's mean.
void signed_means_of_row(const Summary& row, int64_t length, float* centers) {
  const int64_t counts[2] = {row.negative_count, length - row.negative_count};
  const double sums[2] = {row.negative_sum, row.other_sum};
  for (int side = 0; side < 2; ++side) {
    const int from = counts[side] > 0 ? side : 1 - side;
    const double mean = sums[from] / static_cast<double>(counts[from]);
    centers[side] = std::clamp(static_cast<float>(mean), row.least, row.most);
  }
}

// body(first, last) for runs of rows of which each is worth a thread.
template <class Body>
void for_rows(int threads, int64_t rows, int64_t length, Body&& body) {
  parallel_for(threads, rows, std::max<int64_t>(kGrain / (16 * length), 1), body);
}

// load(row, keys) writes the keys of a row and returns how many; finish(row, keys, count) gets them sorted.
template <class AnyKey, class Load, class Finish>
void for_sorted_rows(int threads, int64_t rows, int64_t length, Load&& load, Finish&& finish) {
  for_rows(threads, rows, length, [&](int64_t first, int64_t last) {
    const auto sorter = std::make_unique<KeySorter<AnyKey>>(length);
    for (int64_t row = first; row < last; ++row) {
      const int64_t count = load(row, sorter->keys());
      sorter->sort(count);
      finish(row, sorter->keys(), count);
    }
  });
}

template <class T>
void run(int threads, const T* x, int64_t rows, int64_t length, int levels, const std::string& method, float* centers) {
  const auto load = [&](int64_t row, Key* keys) { return load_keys(x + row * length, length, keys); };
  if (method == "kmeans") {
    for_sorted_rows<Key>(threads, rows, length, load, [&](int64_t row, const Key* keys, int64_t count) {
      kmeans_of_row(merge(keys, count), levels, centers + row * levels);
    });
  } else if (method == "quantile") {
    for_sorted_rows<Key>(threads, rows, length, load, [&](int64_t row, const Key* keys, int64_t count) {
      quantiles_of_row(keys, count, levels, centers + row * levels);
    });
  } else {
    for_rows(threads, rows, length, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const Summary summary = summary_of_row(x + row * length, length);
        if (method == "linspace") {
          linspace_of_row(summary, levels, centers + row * levels);
        } else {
          signed_means_of_row(summary, length, centers + row * levels);
        }
      }
    });
  }
}

template <class T>
void run_weighted(int threads, const T* x, const TensorView& weights, int64_t rows, int64_t length, int levels,
                  float* centers) {
  for_float_type(weights.dtype, [&](auto type) {
    const auto* weight = weights.as<decltype(type)>();
    for_sorted_rows<WeightedKey>(
        threads, rows, length,
        [&](int64_t row, WeightedKey* keys) {
          return load_keys(x + row * length, weight + row * length, length, keys);
        },
        [&](int64_t row, const WeightedKey* keys, int64_t count) {
          kmeans_of_row(merge(keys, count), levels, centers + row * levels);
        });
  });
}

}  // namespace

void init_centers(int threads, View x, int64_t levels, int64_t num_groups, const std::string& method,
                  const std::optional<TensorView>& weights, View centers) {
  const int64_t numel = x.numel();
  QK_CHECK(levels >= 2 && levels <= kMaxLevels, text(kOp, ": levels must be between 2 and ", kMaxLevels), text(levels));
  QK_CHECK(num_groups >= 1 && numel > 0 && numel % num_groups == 0,
           text(kOp, ": num_groups must divide the ", numel, " elements of x evenly"), text(num_groups));
  QK_CHECK(method == "kmeans" || method == "linspace" || method == "quantile" || method == "signed_mean",
           text(kOp, ": method must be 'kmeans' or 'linspace' or 'quantile' or 'signed_mean'"), "'" + method + "'");
  QK_CHECK(method != "signed_mean" || levels == 2, text(kOp, ": method 'signed_mean' gives 2 levels"), text(levels));
  QK_CHECK(method == "kmeans" || !weights, text(kOp, ": weights are for method 'kmeans'"), "'" + method + "'");
  QK_CHECK(centers.numel() == num_groups * levels, text(kOp, ": centers must have ", num_groups * levels, " elements"),
           "shape " + shape_of(centers.sizes));
  const int64_t length = numel / num_groups;
  const int m = static_cast<int>(levels);
  for_float_type(x.dtype, [&](auto type) {
    const auto* values = x.as<decltype(type)>();
    if (weights) {
      check_same(kOp, "weights", *weights, x);
      run_weighted(threads, values, *weights, num_groups, length, m, centers.as<float>());
    } else {
      run(threads, values, num_groups, length, m, method, centers.as<float>());
    }
  });
}

}  // namespace qk::cpu
