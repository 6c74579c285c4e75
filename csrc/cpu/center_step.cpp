// center_step: the centers' step of every row of every tensor: a few operations a center and an insertion sort of rows
// that are all but sorted. Small whatever the model; bound by the call.

#include <algorithm>

#include "../kernels.h"
#include "rows.h"
#include "span_list.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "center_step";
constexpr int64_t kWork = 16;  // elementary operations a center

enum class Move { kNone, kSquares, kCounted, kAuthors };

Move move_of(const std::string& norm, const std::string& method) {
  QK_CHECK(norm == "l1" || norm == "l2", text(kOp, ": norm must be 'l1' or 'l2'"), "'" + norm + "'");
  QK_CHECK(method == "none" || method == "counted" || method == "authors",
           text(kOp, ": method must be 'none', 'counted' or 'authors'"), "'" + method + "'");
  if (method == "none") {
    return Move::kNone;
  }
  if (norm == "l2") {
    return Move::kSquares;
  }
  return method == "counted" ? Move::kCounted : Move::kAuthors;
}

// Null where the move does not read it.
struct Item {
  float* centers;
  const float* gradient;
  const int64_t* counts;
  const float* sums;
  PerRow strength;
  int64_t rows;
  int levels;
};

// Ascending, NaN last.
void sort_row(float* values, int count) {
  const auto before = [](float a, float b) { return a < b || (b != b && a == a); };
  for (int i = 1; i < count; ++i) {
    const float value = values[i];
    int j = i;
    for (; j > 0 && before(value, values[j - 1]); --j) {
      values[j] = values[j - 1];
    }
    values[j] = value;
  }
}

// Every operation is rounded on its own, as in eager.
void move_row(const Item& item, int64_t row, Move move, float rate, float clip) {
  const int m = item.levels;
  float* c = item.centers + row * m;
  const int64_t* members = item.counts == nullptr ? nullptr : item.counts + row * 3 * m;
  const float t = move == Move::kNone ? 0.0f : item.strength.of(row);
  const float half = 1.0f / t * 0.5f;  // 1 / (2t)
  for (int k = 0; k < m; ++k) {
    const float h = item.gradient == nullptr ? 0.0f : item.gradient[row * m + k];
    const float low = h < -clip ? -clip : h;
    const float clipped = low > clip ? clip : low;  // NaN stays
    float moved = c[k] - rate * clipped;
    if (move == Move::kSquares) {
      const auto n = static_cast<float>(members[k]);
      moved += (item.sums[row * m + k] + n * (c[k] - moved)) / (half + std::max(n, 1.0f));
    } else if (move != Move::kNone) {
      const float pull = t * static_cast<float>(members[m + k] - members[2 * m + k]);
      moved = move == Move::kCounted ? moved + pull : moved - pull;
    }
    c[k] = moved;
  }
  sort_row(c, m);
}

}  // namespace

void center_step(int threads, Views centers, Views center_grad, Views counts, Views sums, Views strength, View rate,
                 const std::string& norm, const std::string& method, double clip) {
  const Move move = move_of(norm, method);
  const size_t count = centers.size();
  check_count(kOp, "center_grad", center_grad.size(), center_grad.empty() ? 0 : count);
  QK_CHECK(rate.numel() == static_cast<int64_t>(count), text(kOp, ": rate must hold ", count, " numbers"),
           std::to_string(rate.numel()));
  if (move != Move::kNone) {
    check_count(kOp, "counts", counts.size(), count);
    check_count(kOp, "strength", strength.size(), count);
  }
  if (move == Move::kSquares) {
    check_count(kOp, "sums", sums.size(), count);
  }
  std::vector<Item> items;
  std::vector<int64_t> first_row = {0};  // of each tensor, among those of all
  int64_t work = 0;
  for (size_t i = 0; i < count; ++i) {
    const View c = centers[i];
    QK_CHECK(c.dim() == 1 || c.dim() == 2, text(kOp, ": centers must be [m] or [G, m]"), "shape " + shape_of(c.sizes));
    const int64_t rows = c.dim() == 2 ? c.sizes[0] : 1;
    Item item{c.as<float>(), nullptr, nullptr, nullptr, {nullptr, 0}, rows, static_cast<int>(c.sizes.back())};
    if (!center_grad.empty()) {
      check_same(kOp, "center_grad", center_grad[i], c);
      item.gradient = center_grad[i].as<float>();
    }
    if (move != Move::kNone) {
      QK_CHECK(counts[i].numel() == 3 * c.numel(), text(kOp, ": counts must hold three a center"),
               "shape " + shape_of(counts[i].sizes));
      item.counts = counts[i].as<int64_t>();
      item.strength = per_row(kOp, "strength", strength[i], Rows{rows, 0, item.levels, item.centers});
    }
    if (move == Move::kSquares) {
      check_same(kOp, "sums", sums[i], c);
      item.sums = sums[i].as<float>();
    }
    items.push_back(item);
    first_row.push_back(first_row.back() + rows);
    work += c.numel() * kWork;
  }
  const int64_t rows = first_row.back();
  const int64_t grain = std::max<int64_t>(kGrain * rows / std::max<int64_t>(work, 1), 1);
  parallel_for(threads, rows, grain, [&](int64_t first, int64_t last) {
    size_t i = static_cast<size_t>(std::upper_bound(first_row.begin(), first_row.end(), first) - first_row.begin()) - 1;
    for (int64_t row = first; row < last; ++row) {
      while (row >= first_row[i + 1]) {
        ++i;
      }
      move_row(items[i], row - first_row[i], move, rate.as<float>()[i], static_cast<float>(clip));
    }
  });
}

}  // namespace qk::cpu
