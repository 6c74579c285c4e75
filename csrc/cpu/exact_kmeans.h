// ExactKmeans: the partition of sorted weighted values into m runs with the least squared error, the global optimum.
//
// Let D_k(b) be the least error of the first b values in k runs and E_k(b) that of the others in m - k; the optimum is
// min_b D_k(b) + E_k(b) for every k. Boundary k, the number of values before run k + 1, is known to lie in a window,
// at first all of them. A round narrows all windows:
//   1. Each window is cut into cells. If boundaries k - 1 and k lie in cells [a, a'] and [b, b'], run k contains the
//      values between a' and b and costs at least their error. So L_k(cell) = min over cells of layer k - 1 of
//      L_{k-1} + error(a', b) is at most D_k anywhere in the cell; R_k, from the other end, is at most E_k.
//   2. Any partition bounds the optimum from above: the cells with the least L + R, improved by Lloyd's iteration.
//   3. A cell with L + R above it, by more than rounding explains, holds no optimal boundary. The hull of the others is
//      the new window.
// Cells grow in number until the windows are short, or every cell is a single position. What is left is solved
// exactly: D from the left and E from the right to the middle boundary, which is then fixed, and the halves likewise
// (Hirschberg 1975), so memory does not grow with m.
//
// Rounding. Run k's sums are taken about s, a center near its mean, from a base inside the span of its windows: with
// A = max|x - s| and W the weight of that span they are at most W, A W and A^2 W. Each is one sum stored with 105 bits,
// rounded (u), and at most 31 terms (4 u each, added without loss) rounded again: off by 6 u, and differences by
// d = 13 u W (1, A, A^2). Where 2 d <= w, first^2 / w is off by (5 + 2) d A^2 and two roundings, the error by
// (8 d + 3 u W) A^2; where w is smaller both the true and the computed error lie in [0, 3 d A^2]. kEntryError = 112
// covers it. The stored sums add relative_error(). A layer multiplies that by 2 levels + 1 (monotone_minima.h) and its
// additions by 1 + m / 32. The result's error is so within twice rounding() of the optimum, where rounding() is that of
// the last, short windows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "centered_positions.h"
#include "lloyd.h"
#include "monotone_minima.h"
#include "weighted_values.h"

namespace qk::cpu {

class ExactKmeans {
 public:
  // levels: m >= 2, fewer than there are values.
  ExactKmeans(const WeightedValues& data, int levels) : data_(data), levels_(levels) {
    low_.push_back(0);
    high_.push_back(0);
    for (int k = 1; k < levels; ++k) {
      low_.push_back(k);
      high_.push_back(data.count() - (levels - k));
    }
    low_.push_back(data.count());
    high_.push_back(data.count());
    for (int k = 0; k <= levels; ++k) {
      best_.push_back(data.count() * k / levels);
    }
    best_error_ = error_of(data_, best_);
  }

  // The m + 1 boundaries: run k holds values [boundary k, boundary k + 1).
  std::vector<int64_t> solve() {
    offer(best_);
    int64_t cells = kFirstCells;
    for (int64_t width = total_width(); width > kShort * levels_ && cells * levels_ <= kMostCells;) {
      if (round(cells)) {
        break;
      }
      const int64_t before = std::exchange(width, total_width());
      cells *= 2 * width > before ? 4 : 1;
    }
    std::vector<int64_t> boundaries(best_.size());
    boundaries.back() = data_.count();
    split(boundaries, 0, levels_);
    return boundaries;
  }

 private:
  static constexpr int64_t kFirstCells = 512;
  static constexpr int64_t kMostCells = int64_t{1} << 27;  // 1 GiB of bounds
  static constexpr int64_t kShort = 16;                    // mean length of a window not worth a round
  static constexpr double kUnit = 0x1p-53;
  static constexpr double kEntryError = 112.0;

  // A window cut into cells; cell i is [left[i], right[i]].
  struct Cells {
    std::vector<int64_t> left, right;
    bool single = true;  // each is one position
  };

  int64_t total_width() const {
    int64_t width = 0;
    for (size_t k = 0; k < low_.size(); ++k) {
      width += high_[k] - low_[k];
    }
    return width;
  }

  // Keeps what Lloyd's iteration makes of these boundaries where it is better. Any ascending ones would do.
  void offer(std::vector<int64_t> boundaries) {
    improve(data_, boundaries);
    const double error = error_of(data_, boundaries);
    if (error < best_error_) {
      best_error_ = error;
      best_ = std::move(boundaries);
    }
  }

  Frame frame_of(int k) const {
    WeightedValues::Cursor cursor(data_);
    return {mean_of(data_.between(best_[k - 1], best_[k])), cursor.at(best_[k - 1])};
  }

  Positions positions(const std::vector<int64_t>& at, const Frame& frame) const {
    return positions_in(data_, frame, static_cast<int64_t>(at.size()), [&at](size_t i) { return at[i]; });
  }

  // Most by which a sum L + R of computed bounds may exceed the true one.
  double rounding(int64_t most_cells) const {
    const auto square_of_most = [this](int64_t first, int64_t last, double center) {
      const double most = std::max(std::fabs(data_.value(first) - center), std::fabs(data_.value(last - 1) - center));
      return most * most;
    };
    const double all = data_.between(0, data_.count()).weight.rounded();
    const double stored = data_.relative_error() * square_of_most(0, data_.count(), 0.0) * all;
    double entries = 0.0;
    for (int k = 1; k <= levels_; ++k) {
      const double weight = data_.between(low_[k - 1], high_[k]).weight.rounded();
      const double center = mean_of(data_.between(best_[k - 1], best_[k]));
      entries += kEntryError * kUnit * square_of_most(low_[k - 1], high_[k], center) * weight + stored;
    }
    const double tree_levels = std::ceil(std::log2(static_cast<double>(most_cells) + 1.0)) + 1.0;
    return entries * (2.0 * tree_levels + 1.0) * (1.0 + levels_ / 32.0);
  }

  Cells cut(int k, int64_t cells) const {
    Cells made;
    const int64_t width = high_[k] - low_[k];
    if (width < cells) {
      for (int64_t at = low_[k]; at <= high_[k]; ++at) {
        made.left.push_back(at);
      }
      made.right = made.left;
      return made;
    }
    made.single = false;
    int64_t left = low_[k];
    for (int64_t i = 1; i <= cells; ++i) {
      int64_t right = low_[k] + width / cells * i + width % cells * i / cells;
      if (i < cells && width / cells >= 2 * WeightedValues::kRun) {
        right -= right % WeightedValues::kRun;  // where a sum is stored
      }
      made.left.push_back(left);
      made.right.push_back(right);
      left = right;
    }
    return made;
  }

  // One narrowing of all windows; true where all cells were single positions, so that no more can be learned.
  bool round(int64_t cells) {
    std::vector<Cells> layers;
    std::vector<std::vector<double>> bounds;
    bool single = true;
    for (int k = 0; k <= levels_; ++k) {
      layers.push_back(cut(k, cells));
      bounds.emplace_back(layers[k].left.size(), 0.0);
      single = single && layers[k].single;
    }
    for (int k = 1; k < levels_; ++k) {
      const Frame frame = frame_of(k);
      const Positions from = positions(layers[k - 1].right, frame), to = positions(layers[k].left, frame);
      MonotoneMinima<true>(from, bounds[k - 1].data(), to, bounds[k].data()).run();
    }
    std::vector<double> after(1, 0.0), here;  // R of layers k + 1 and k
    for (int k = levels_ - 1; k >= 1; --k) {
      const Frame frame = frame_of(k + 1);
      const Positions from = positions(layers[k + 1].left, frame), to = positions(layers[k].right, frame);
      here.assign(bounds[k].size(), 0.0);
      MonotoneMinima<false>(from, after.data(), to, here.data()).run();
      for (size_t i = 0; i < here.size(); ++i) {
        bounds[k][i] += here[i];
      }
      after.swap(here);
    }
    const double allowed = rounding(cells);  // with the frames of the bounds
    offer_least(layers, bounds);
    const double most = best_error_ * (1.0 + (levels_ + 8) * kUnit) + allowed;
    for (int k = 1; k < levels_; ++k) {
      keep(layers[k], bounds[k], most, k);
    }
    for (int k = 1; k < levels_; ++k) {
      low_[k] = std::max(low_[k], low_[k - 1] + 1);
    }
    for (int k = levels_ - 1; k >= 1; --k) {
      high_[k] = std::min(high_[k], high_[k + 1] - 1);
    }
    return single;
  }

  void offer_least(const std::vector<Cells>& layers, const std::vector<std::vector<double>>& bounds) {
    std::vector<int64_t> boundaries = best_;
    for (int k = 1; k < levels_; ++k) {
      const auto i = std::min_element(bounds[k].begin(), bounds[k].end()) - bounds[k].begin();
      boundaries[k] = layers[k].left[i] + (layers[k].right[i] - layers[k].left[i]) / 2;
    }
    ascend(data_, boundaries);
    offer(std::move(boundaries));
  }

  void keep(const Cells& cells, const std::vector<double>& bounds, double most, int k) {
    const auto possible = [most](double bound) { return bound <= most; };
    const auto first = std::find_if(bounds.begin(), bounds.end(), possible);
    const auto last = std::find_if(bounds.rbegin(), bounds.rend(), possible);
    if (first == bounds.end()) {
      return;  // only where sums overflowed: nothing is known then
    }
    low_[k] = cells.left[first - bounds.begin()];
    high_[k] = cells.right[bounds.rend() - last - 1];
  }

  // Boundaries first and last are fixed; finds those between them.
  void split(std::vector<int64_t>& boundaries, int first, int last) const {
    if (last - first < 2) {
      return;
    }
    const int middle = first + (last - first) / 2;
    const auto low = [&](int k) {
      return k == first || k == last ? boundaries[k] : std::max(low_[k], boundaries[first] + (k - first));
    };
    const auto high = [&](int k) {
      return k == first || k == last ? boundaries[k] : std::min(high_[k], boundaries[last] - (last - k));
    };
    const auto window = [&](int k, const Frame& frame) {
      const int64_t begin = low(k);
      return positions_in(data_, frame, high(k) - begin + 1,
                          [begin](size_t i) { return begin + static_cast<int64_t>(i); });
    };
    std::vector<double> left(1, 0.0), right(1, 0.0), next;
    for (int k = first + 1; k <= middle; ++k) {
      const Frame frame = frame_of(k);
      const Positions from = window(k - 1, frame), to = window(k, frame);
      next.assign(to.weight.size(), 0.0);
      MonotoneMinima<true>(from, left.data(), to, next.data()).run_strictly(low(k) - low(k - 1));
      left.swap(next);
    }
    for (int k = last - 1; k >= middle; --k) {
      const Frame frame = frame_of(k + 1);
      const Positions from = window(k + 1, frame), to = window(k, frame);
      next.assign(to.weight.size(), 0.0);
      MonotoneMinima<false>(from, right.data(), to, next.data()).run_strictly(low(k) - low(k + 1));
      right.swap(next);
    }
    size_t best = 0;
    for (size_t i = 1; i < left.size(); ++i) {
      best = left[i] + right[i] < left[best] + right[best] ? i : best;
    }
    boundaries[middle] = low(middle) + static_cast<int64_t>(best);
    split(boundaries, first, middle);
    split(boundaries, middle, last);
  }

  const WeightedValues& data_;
  const int levels_;
  std::vector<int64_t> low_, high_;  // of boundary k, both inclusive
  std::vector<int64_t> best_;        // a partition and its error
  double best_error_ = 0.0;
};

}  // namespace qk::cpu
