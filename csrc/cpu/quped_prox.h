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
#include "quped_optimizer.h"

namespace qk::cpu {

constexpr int kPart = 1024;       // elements whose moved weights wait in L1
constexpr int kMaxCellBits = 4;   // 16 centers: one register of each table
constexpr int kGroup = 8 * kVec;  // elements whose words are added in registers
constexpr int kGroups = kPart / kGroup;
static_assert(kGroups == 8, "PositionalCounts takes eight carries");

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#define QK_UNROLL _Pragma("GCC unroll 4")  // the planes stay in registers
#else
#define QK_UNROLL
#endif

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
  explicit SpanTotals(int levels) {
    const int rounded = std::max(levels, 16);  // NarrowRow adds to all its fields
    for (int64_t* counts : {members, above, below}) {
      std::fill_n(counts, rounded, int64_t{0});
    }
    std::fill_n(sums, rounded, 0.0);
    std::fill_n(center_grad, rounded, 0.0);
  }

  int64_t members[kMaxLevels];
  int64_t above[kMaxLevels];
  int64_t below[kMaxLevels];
  double sums[kMaxLevels];         // of x - c over the members
  double center_grad[kMaxLevels];  //
  double distance = 0.0;
};

// One run of elements: moved weights in, new weights out; cells and gaps of the new weights for sums.
struct Part {
  alignas(64) float moved[kPart];
  alignas(64) int32_t cell[kPart];  // midpoints passed: of equal centers not yet the first
  alignas(64) float gap[kPart];     // x - c
};

// Moved weights that wait in a buffer, which is readable up to a whole vector. The next run's streams are fetched
// meanwhile: nothing else reads memory.
struct Buffered {
  static constexpr bool kBuffered = true;
  const float* moved;
  const float* next[4];  // repeated where there are fewer streams

  QK_HD Vec whole(int i) const {
    for (const float* stream : next) {
      fetch(stream + i);
    }
    return load(moved + i);
  }
  QK_HD Vec some(int i, int) const { return load(moved + i); }
};

template <bool kL1>
QK_HD Vec prox(Vec y, Vec q, Vec strength) {
  const Vec gap = y - q;
  if constexpr (kL1) {
    const Vec pull = nearer_zero(gap, strength);  // the gap itself where that is within reach
    return select(pull != gap, y - pull, q);
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
      store(search.index(search.find(load(x + i))), cell + i);
    }
    if (i < n) {
      store(search.index(search.find(load_some(x + i, n - i))), cell + i);
    }
  }

  // Whether moved weights may be taken as they are made.
  bool streams() const { return kStreams && !how_.again; }

  // source gives the moved weights; codes may be null. Cells and gaps are left in `part` with norm l2.
  template <class Source>
  void run(const Source& source, Part& part, int n, float* x, uint8_t* codes, float* distance) {
    with_flag(how_.l1, [&](auto l1) {
      if constexpr (Source::kBuffered) {
        with_flag(how_.again, [&](auto again) { run_as<l1.value, again.value>(source, part, n, x, codes, distance); });
      } else {
        run_as<l1.value, false>(source, part, n, x, codes, distance);
      }
    });
  }

  void flush(SpanTotals& totals) {
    int64_t counts[32] = {};
    if constexpr (kBits <= 3) {
      words_.flush(counts, ((1u << (1 << kBits)) - 1u) * 0x010101u);
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

  // Of one vector: its cells and sides as bits, and where that is all a word holds its cells alone.
  struct Words {
    Ints side, member;
  };

  // The planes of both counters in registers, and the words of eight vectors into them.
  struct Planes {
    Ints side[PositionalCounts::kLow];
    Ints member[PositionalCounts::kLow - 1];

    // vector(i) gives the words of vector i; adds the carries of the group.
    template <class Vector>
    QK_HD void add(Vector&& vector, Ints& sides, Ints& members) {
      Ints twos[4], pairs[4];
      QK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Words a = vector(2 * i), b = vector(2 * i + 1);
        twos[i] = carry_save(side[0], a.side, b.side);
        if constexpr (kBits > 3) {
          pairs[i] = a.member | shift_left<kField>(b.member);
        }
      }
      const Ints low = carry_save(side[1], twos[0], twos[1]), high = carry_save(side[1], twos[2], twos[3]);
      sides = carry_save(side[2], low, high);
      if constexpr (kBits > 3) {
        const Ints first = carry_save(member[0], pairs[0], pairs[1]),
                   second = carry_save(member[0], pairs[2], pairs[3]);
        members = carry_save(member[1], first, second);
      }
    }
  };

  template <bool kL1, bool kAgain, class Source>
  void run_as(const Source& given, Part& part, int n, float* x, uint8_t* codes, float* distance) {
    const CellSearch<kBits> search(table_);
    const Source source = given;  // a copy, which no store can reach: it stays in registers
    const Vec strength = splat(how_.strength), none = splat(0.0f);
    Vec total = load(distance);
    const auto one = [&](int i, Mask valid, bool whole) QK_INLINE {
      const Vec y = whole ? source.whole(i) : source.some(i, n - i);
      auto cell = search.find(y);
      Vec center = search.center(cell);
      Vec value = prox<kL1>(y, center, strength);
      if constexpr (kAgain) {
        value = smaller(splat(how_.bound), larger(splat(-how_.bound), value));  // NaN stays
        cell = search.find(value);
        center = search.center(cell);
      } else if constexpr (!kL1) {
        cell = search.first_unless(value <= value, cell);  // an infinite weight has become NaN, whose code is 0
      }
      Vec gap = value - center;
      if (whole) {
        store(value, x + i);
      } else {
        gap = keep(valid, gap);
        store_some(value, n - i, x + i);
      }
      if constexpr (!kL1) {
        store(search.index(cell), part.cell + i);
        store(gap, part.gap + i);
      }
      if (codes != nullptr) {
        store_codes(search.index(cell), whole ? kVec : n - i, codes + i);
      }
      total = kL1 ? total + float_of(bits_of(gap) & splat(INT32_MAX)) : fma(gap, gap, total);
      const Mask above = gap > none, below = gap < none;
      Words words;
      if constexpr (kBits <= 3) {
        Ints fields = select(above, splat(int32_t{1 + (1 << kField)}), splat(int32_t{1}));
        fields = select(below, splat(int32_t{1 + (1 << 2 * kField)}), fields);
        words.side = search.shifted(fields, cell);
        words.side = whole ? words.side : keep(valid, words.side);
      } else {
        words.member = search.shifted(splat(int32_t{1}), cell);
        words.member = whole ? words.member : keep(valid, words.member);
        words.side = keep(above, words.member) | keep(below, shift_left<kField>(words.member));
      }
      return words;
    };
    Planes planes;
    for (int p = 0; p < PositionalCounts::kLow; ++p) {
      planes.side[p] = words_.low(p);
    }
    for (int p = 0; p + 1 < PositionalCounts::kLow; ++p) {
      planes.member[p] = members_.low(p);
    }
    const Mask all = first_lanes(kVec);
    Ints sides[kGroups], members[kGroups];
    int group = 0;
    for (; (group + 1) * kGroup <= n; ++group) {
      const int begin = group * kGroup;
      planes.add([&](int i) QK_INLINE { return one(begin + i * kVec, all, true); }, sides[group], members[group]);
    }
    if (const int begin = group * kGroup; begin < n) {
      Words last[kGroup / kVec];
      for (int i = 0; i < kGroup / kVec; ++i) {
        const int left = n - begin - i * kVec;
        last[i] = {splat(int32_t{0}), splat(int32_t{0})};
        if (left > 0) {
          last[i] = one(begin + i * kVec, first_lanes(std::min(left, kVec)), left >= kVec);
        }
      }
      planes.add([&](int i) QK_INLINE { return last[i]; }, sides[group], members[group]);
      ++group;
    }
    store(total, distance);
    for (int i = group; i < kGroups; ++i) {
      sides[i] = members[i] = splat(int32_t{0});
    }
    words_.add(planes.side, sides, group * (kGroup / kVec));
    if constexpr (kBits > 3) {
      members_.add(planes.member, members, group * (kGroup / kVec / 2));
    }
  }

  static QK_HD void store_codes(Ints cell, int count, uint8_t* to) {
    if (count == kVec) {
      store_bytes(cell, to);
      return;
    }
    uint8_t bytes[kVec];
    store_bytes(cell, bytes);
    std::memcpy(to, bytes, static_cast<size_t>(count));
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
