// packed_embedding_backward: grad summed over the elements of each code of the rows looked up.
//
// Tokens are taken in the order of their rows, equal ones in their own, so that those that add to one row of centers
// follow one another. Parts of that order are summed at once, in float64 across rows of the table, and parts of one row
// of centers are added in order: where parts begin follows from the indices and the shape alone. Bound by the passes of
// CodeSums over the gradient, one a center up to sixteen.

#include <algorithm>
#include <numeric>

#include "../kernels.h"
#include "packed_rows.h"
#include "sum_by_code.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "packed_embedding_backward";
constexpr int64_t kParts = 128;  // about as many at most of one row of centers, beside one for each that is met

// Tokens [first, last) of the sorted order, and the rows of centers [low, high] they add to.
struct Part {
  int64_t first, last;
  int64_t low, high;
  int64_t sums;  // of its partial sums, where they begin
};

// Cuts where no row of centers continues, and within a single one after enough terms.
std::vector<Part> parts_of(const PackedRows& table, const std::vector<int64_t>& order) {
  const int64_t enough = std::max(kBlock * 8, table.tokens * table.width / kParts);
  std::vector<Part> parts;
  int64_t sums = 0;
  for (int64_t i = 0; i < table.tokens; ++i) {
    const int64_t begin = table.index[order[static_cast<size_t>(i)]] * table.width;
    const int64_t low = begin / table.rows.length, high = (begin + table.width - 1) / table.rows.length;
    if (!parts.empty()) {
      Part& part = parts.back();
      const bool single = part.low == high;
      const bool full = single && (i - part.first) * table.width >= enough;
      if (low <= part.high && !full) {
        sums += high - part.high;
        part.last = i + 1;
        part.high = high;
        continue;
      }
    }
    parts.push_back({i, i + 1, low, high, sums});
    sums += high - low + 1;
  }
  return parts;
}

template <class T>
void sum_part(const PackedRows& table, const std::vector<int64_t>& order, const Part& part, const T* grad,
              double* sums) {
  const int levels = table.rows.levels;
  LanesByShift by_shift(table.codes.bits);
  alignas(64) uint8_t unpacked[kBlock];
  for (int64_t i = part.first; i < part.last; ++i) {
    const int64_t token = order[static_cast<size_t>(i)];
    table.for_each_piece(table.index[token], [&](int64_t row, int64_t begin, int64_t count, int64_t offset) {
      CodeSums by_code(levels, sums + (row - part.low) * levels);
      for (int64_t at = 0; at < count; at += kBlock) {
        const int64_t length = std::min(kBlock, count - at);
        table.codes.unpack(by_shift, begin + at, length, unpacked);
        add_block(grad + token * table.width + offset + at, unpacked, length, by_code);
      }
    });
  }
}

// Adds the parts of each row of centers in order and rounds once. Only parts that follow one another share rows.
void add_parts(const std::vector<Part>& parts, const std::vector<double>& sums, int levels, float* out) {
  for (size_t i = 0; i < parts.size();) {
    size_t next = i + 1;
    int64_t high = parts[i].high;
    while (next < parts.size() && parts[next].low <= high) {
      high = std::max(high, parts[next++].high);
    }
    for (int64_t row = parts[i].low; row <= high; ++row) {
      for (int k = 0; k < levels; ++k) {
        double sum = 0.0;
        for (size_t j = i; j < next; ++j) {
          if (row <= parts[j].high) {  // a cut part begins with the row it was cut in
            sum += sums[static_cast<size_t>((parts[j].sums + row - parts[j].low) * levels + k)];
          }
        }
        out[row * levels + k] = static_cast<float>(sum);
      }
    }
    i = next;
  }
}

}  // namespace

void packed_embedding_backward(int threads, View grad, View indices, View packed, View centers, int64_t bits,
                               const std::vector<int64_t>& shape, View grad_centers) {
  const PackedRows table = packed_rows_of(kOp, threads, indices, packed, centers, bits, shape);
  QK_CHECK(grad.numel() == table.tokens * table.width, text(kOp, ": grad must have ", table.width, " values an index"),
           shape_of(grad.sizes));
  QK_CHECK(grad_centers.sizes == centers.sizes, text(kOp, ": grad_centers must have shape ", shape_of(centers.sizes)),
           shape_of(grad_centers.sizes));
  std::fill_n(grad_centers.as<float>(), grad_centers.numel(), 0.0f);
  if (grad.numel() == 0) {
    return;
  }
  std::vector<int64_t> order(static_cast<size_t>(table.tokens));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return table.index[a] < table.index[b]; });
  const std::vector<Part> parts = parts_of(table, order);
  const int levels = table.rows.levels;
  std::vector<double> sums(
      static_cast<size_t>((parts.back().sums + parts.back().high - parts.back().low + 1) * levels));
  for_float_type(grad.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t terms = std::max<int64_t>(grad.numel() / static_cast<int64_t>(parts.size()) * levels, 1);
    parallel_for(threads, static_cast<int64_t>(parts.size()), std::max<int64_t>(kGrain / terms, 1),
                 [&](int64_t first, int64_t last) {
                   for (int64_t i = first; i < last; ++i) {
                     const Part& part = parts[static_cast<size_t>(i)];
                     sum_part(table, order, part, grad.as<T>(), sums.data() + part.sums * levels);
                   }
                 });
  });
  add_parts(parts, sums, levels, grad_centers.as<float>());
}

}  // namespace qk::cpu
