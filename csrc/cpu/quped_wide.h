// The second half of quped_step for rows of more than 16 centers: a comparison a midpoint and a table of counters,
// bound by the comparisons.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/prox_weights.h"
#include "chunk.h"
#include "quped_part.h"

namespace qk::cpu {

// Rows of more centers than a register has lanes.
class WideRow {
 public:
  WideRow(const Cells& cells, const Prox& how) : cells_(cells), how_(how) {}

  void find(const float* x, int n, int32_t* cell) const {
    for_each_chunk(0, n, [&](auto size, int64_t begin, int valid) {
      constexpr int Size = decltype(size)::value;
      alignas(64) float value[Size];
      load_chunk<Size>(x + begin, valid, 0.0f, value);
      codes_of<Size>(cells_, value, cell + begin);
    });
  }

  bool streams() const { return false; }

  template <class Source>
  void run(const Source&, Part& part, int n, float* x, uint8_t* codes, float* distance) {
    find(part.moved, n, part.cell);
    for (int i = 0; i < n; ++i) {
      const float y = part.moved[i], q = cells_.values[part.cell[i]];
      part.moved[i] = how_.l1 ? math::prox_l1(y, q, how_.strength) : math::prox_l2(y, q, how_.strength);
    }
    if (how_.again) {
      for (int i = 0; i < n; ++i) {
        const float low = part.moved[i] < -how_.bound ? -how_.bound : part.moved[i];
        part.moved[i] = low > how_.bound ? how_.bound : low;
      }
      find(part.moved, n, part.cell);
    }
    for (int i = 0; i < n; ++i) {
      part.cell[i] = part.moved[i] != part.moved[i] ? 0 : part.cell[i];  // an infinite weight that has become NaN
      part.gap[i] = part.moved[i] - cells_.values[part.cell[i]];
    }
    for (int i = 0; i < n; ++i) {
      const float size = how_.l1 ? math::float_of(math::bits_of(part.gap[i]) & 0x7fffffffu) : part.gap[i] * part.gap[i];
      distance[i % kVec] += size;
    }
    for (int i = 0; i < n; ++i) {
      const int side = part.gap[i] > 0.0f ? 1 : part.gap[i] < 0.0f ? 2 : 0;
      ++counts_[side][part.cell[i]];
    }
    std::memcpy(x, part.moved, static_cast<size_t>(n) * sizeof(float));
    for (int i = 0; codes != nullptr && i < n; ++i) {
      codes[i] = static_cast<uint8_t>(part.cell[i]);
    }
  }

  void flush(SpanTotals& totals) {
    for (int k = 0; k < cells_.levels; ++k) {
      totals.members[k] += counts_[0][k] + counts_[1][k] + counts_[2][k];
      totals.above[k] += counts_[1][k];
      totals.below[k] += counts_[2][k];
    }
    std::memset(counts_, 0, sizeof counts_);
  }

  bool full() const { return false; }

 private:
  const Cells& cells_;
  Prox how_;
  int64_t counts_[3][kMaxLevels] = {};  // on the center, above, below
};

}  // namespace qk::cpu
