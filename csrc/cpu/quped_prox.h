// The second half of quped_step over a run of elements of one row: nearest center, prox, clamp, and what is counted of
// the new weights.
//
// Up to 16 centers: a binary search in registers, one-hot words of cell and side, counted by position (quped_counts.h).
// Bound by its 30 to 50 vector operations a vector in cache. More centers: a comparison a midpoint and a table of
// counters, bound by the comparisons.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../math/prox_weights.h"
#include "chunk.h"
#include "quped_cells.h"
#include "quped_counts.h"

namespace qk::cpu {

constexpr int kPart = 1024;      // elements whose moved weights wait in L1
constexpr int kMaxCellBits = 4;  // 16 centers: one register of each table
constexpr int kPartVectors = kPart / kVec;

struct Prox {
  bool l1;
  float strength;  // l1: t; l2: the share of the way
  float bound;     // of |x|; infinite without clamp
  bool again;      // whether the new weight may lie in another cell than the moved one

  Prox(bool l1_, bool clamp, float t, const Cells& cells)
      : l1(l1_),
        strength(l1_ ? t : math::prox_l2_share(t)),
        bound(clamp ? 1.0f : std::numeric_limits<float>::infinity()),
        again(clamp) {
    // The prox leaves no cell, but a center that is its own lower midpoint, an ulp from the next, is not in its cell.
    for (int k = 1; k < cells.levels; ++k) {
      again = again || (cells.first[k] == k && !math::is_above(cells.values[k], cells.midpoints[k - 1]));
    }
  }
};

// What one span finds out, by center.
struct SpanTotals {
  int64_t members[kMaxLevels] = {};
  int64_t above[kMaxLevels] = {};
  int64_t below[kMaxLevels] = {};
  double sums[kMaxLevels] = {};         // of x - c over the members
  double center_grad[kMaxLevels] = {};  //
  double distance = 0.0;
};

// One run of elements: moved weights in, new weights out; cells and gaps of the new weights where they are kept.
struct Part {
  alignas(64) float moved[kPart];
  alignas(64) int32_t cell[kPart];  // midpoints passed: of equal centers not yet the first
  alignas(64) float gap[kPart];     // x - c
};

template <bool kL1>
QK_HD Vec prox(Vec y, Vec q, Vec strength) {
  const Vec gap = y - q;
  const Ints sign = splat(INT32_MIN);
  if constexpr (kL1) {
    const Vec size = float_of(bits_of(gap) & splat(INT32_MAX));
    const Vec toward = float_of(bits_of(strength) | (bits_of(gap) & sign));
    return select(size <= strength, q, y - toward);
  } else {
    const Vec moved = y - gap * strength;
    const Vec from_above = select(moved < q, q, moved), from_below = select(moved > q, q, moved);
    return select(gap > splat(0.0f), from_above, from_below);
  }
}

// Rows of up to 2^kBits centers.
template <int kBits>
class NarrowRow {
 public:
  NarrowRow(const Cells& cells, const Prox& how) : table_(cells), how_(how) {}

  // Cells of n elements at x, the last vector filled up.
  void find(const float* x, int n, int32_t* cell) const {
    const CellSearch<kBits> search(table_);
    int i = 0;
    for (; i + kVec <= n; i += kVec) {
      store(search.find(load(x + i)), cell + i);
    }
    if (i < n) {
      store(search.find(load_some(x + i, n - i)), cell + i);
    }
  }

  template <bool kKeep>
  void run(Part& part, int n, float* x, float* distance) {
    with_flag(how_.l1, [&](auto l1) {
      with_flag(how_.again, [&](auto again) { run_as<l1.value, again.value, kKeep>(part, n, x, distance); });
    });
  }

  void flush(SpanTotals& totals) {
    int64_t counts[32] = {};
    if constexpr (kBits <= 3) {
      words_.flush(counts, 0xffffffu);
      for (int k = 0; k < kField; ++k) {
        totals.members[k] += counts[k];
        totals.above[k] += counts[kField + k];
        totals.below[k] += counts[2 * kField + k];
      }
    } else {
      words_.flush(counts, ~0u);
      for (int k = 0; k < kField; ++k) {
        totals.above[k] += counts[k];
        totals.below[k] += counts[kField + k];
      }
      std::fill_n(counts, 32, 0);
      members_.flush(counts, ~0u);
      for (int k = 0; k < kField; ++k) {
        totals.members[k] += counts[k] + counts[kField + k];
      }
    }
  }

  bool full() const { return words_.full(); }

 private:
  // Up to 8 centers a word has members, above and below in fields of 8 bits; else above and below in 16, and members in
  // words of their own, two vectors a word.
  static constexpr int kField = kBits <= 3 ? 8 : 16;

  template <bool kL1, bool kAgain, bool kKeep>
  void run_as(Part& part, int n, float* x, float* distance) {
    alignas(64) int32_t words[kPart];
    alignas(64) int32_t members[kBits <= 3 ? kVec : kPart];
    const CellSearch<kBits> search(table_);
    const Vec strength = splat(how_.strength);
    Vec total = load(distance);
    const auto one = [&](int i, Mask valid, bool whole) {
      const Vec y = load(part.moved + i);
      Ints cell = search.find(y);
      Vec center = search.center(cell);
      Vec value = prox<kL1>(y, center, strength);
      if constexpr (kAgain) {
        value = smaller(splat(how_.bound), larger(splat(-how_.bound), value));  // NaN stays
        cell = search.find(value);
        center = search.center(cell);
      } else if constexpr (!kL1) {
        cell = keep(value <= value, cell);  // an infinite weight has become NaN, whose code is 0
      }
      Vec gap = value - center;
      if (!whole) {
        gap = keep(valid, gap);
        store_some(value, n - i, x + i);
      } else {
        store(value, x + i);
      }
      if constexpr (kKeep) {
        store(cell, part.cell + i);
        store(gap, part.gap + i);
      }
      total = kL1 ? total + float_of(bits_of(gap) & splat(INT32_MAX)) : fma(gap, gap, total);
      const Mask above = gap > splat(0.0f), below = gap < splat(0.0f);
      if constexpr (kBits <= 3) {
        Ints fields = select(above, splat(int32_t{1 + (1 << kField)}), splat(int32_t{1}));
        fields = select(below, splat(int32_t{1 + (1 << 2 * kField)}), fields);
        const Ints word = shift_left(fields, cell);
        store(whole ? word : keep(valid, word), words + i);
      } else {
        Ints member = shift_left(splat(int32_t{1}), cell);
        member = whole ? member : keep(valid, member);
        store(member, members + i);
        store(keep(above, member) | keep(below, shift_left<kField>(member)), words + i);
      }
    };
    const Mask all = first_lanes(kVec);
    int i = 0;
    for (; i + kVec <= n; i += kVec) {
      one(i, all, true);
    }
    if (i < n) {
      one(i, first_lanes(n - i), false);
      i += kVec;
    }
    store(total, distance);
    const int used = i / kVec;
    const int vectors = (used + kWordGroup - 1) / kWordGroup * kWordGroup;
    std::memset(words + used * kVec, 0, static_cast<size_t>(vectors - used) * kVec * sizeof(int32_t));
    words_.add(words, vectors);
    if constexpr (kBits > 3) {
      std::memset(members + used * kVec, 0, static_cast<size_t>(vectors - used) * kVec * sizeof(int32_t));
      add_members(members, vectors);
    }
  }

  // Two vectors of members a word.
  void add_members(int32_t* members, int vectors) {
    for (int i = 0; i < vectors / 2; ++i) {
      const Ints low = load(members + 2 * i * kVec), high = load(members + (2 * i + 1) * kVec);
      store(low | shift_left<kField>(high), members + i * kVec);
    }
    const int pairs = (vectors / 2 + kWordGroup - 1) / kWordGroup * kWordGroup;
    std::memset(members + vectors / 2 * kVec, 0, static_cast<size_t>(pairs - vectors / 2) * kVec * sizeof(int32_t));
    members_.add(members, pairs);
  }

  CellTable<kBits> table_;
  Prox how_;
  PositionalCounts words_;
  PositionalCounts members_;
};

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

  template <bool kKeep>
  void run(Part& part, int n, float* x, float* distance) {
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
