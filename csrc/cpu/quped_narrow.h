// The second half of quped_step for rows of up to 16 centers: a binary search in registers, the prox, and one-hot words
// of cell and side, counted by position (quped_counts.h). Bound by its 30 to 50 vector operations a vector in cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "quped_cells.h"
#include "quped_counts.h"
#include "quped_part.h"

namespace qk::cpu {

constexpr int kMaxCellBits = 4;   // 16 centers: one register of each table
constexpr int kGroup = 8 * kVec;  // elements whose words are added in registers
constexpr int kGroups = kPart / kGroup;
static_assert(kGroups == 8, "PositionalCounts takes eight carries");

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#define QK_UNROLL _Pragma("GCC unroll 4")  // the planes stay in registers
#else
#define QK_UNROLL
#endif

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

}  // namespace qk::cpu
