// CellTable: the cells of one row of up to 16 centers as tables in registers, and the search for the cell of sixteen
// elements at once.
#pragma once

#include <limits>

#include "cells.h"
#include "simd_bits.h"

namespace qk::cpu {

// Smallest b with levels <= 2^b.
constexpr int bits_for(int levels) {
  int bits = 1;
  while (1 << bits < levels) {
    ++bits;
  }
  return bits;
}

// A binary search over 2^kBits - 1 midpoints, padded with infinities, which nothing is above. In step l, of 2^(kBits -
// 1
// - l) midpoints, level[l] holds at index p what an element that has passed p midpoints is compared with next.
template <int kBits>
struct CellTable {
  alignas(64) float level[kBits][kLookup];
  alignas(64) float center[kLookup];  // that of the cell: of equal centers all entries are the same

  explicit CellTable(const Cells& cells) {
    for (int l = 0; l < kBits; ++l) {
      const int step = 1 << (kBits - 1 - l);
      for (int p = 0; p < kLookup; ++p) {
        const int j = p + step - 1;
        level[l][p] = j + 1 < cells.levels ? cells.midpoints[j] : std::numeric_limits<float>::infinity();
      }
    }
    for (int k = 0; k < kLookup; ++k) {
      center[k] = cells.values[k < cells.levels ? k : cells.levels - 1];
    }
  }
};

// In registers for the length of a loop. A Cell says how many midpoints an element is above; NaN is above none.
template <int kBits>
class CellSearch {
 public:
  using Cell = Ints;

  explicit CellSearch(const CellTable<kBits>& table) : top_(splat(table.level[0][0])), center_(table.center) {
    for (int l = 1; l < kBits; ++l) {
      level_[l] = Lookup(table.level[l]);
    }
  }

  QK_HD Cell find(Vec value) const {
    Ints passed = keep(value > top_, splat(int32_t{1 << (kBits - 1)}));
    for (int l = 1; l < kBits; ++l) {
      const Mask above = value > lookup<kBits>(level_[l], passed);
      passed = add_where(above, passed, splat(int32_t{1 << (kBits - 1 - l)}));
    }
    return passed;
  }

  QK_HD Vec center(Cell cell) const { return lookup<kBits>(center_, cell); }
  QK_HD Ints index(Cell cell) const { return cell; }
  QK_HD Ints shifted(Ints word, Cell cell) const { return shift_left(word, cell); }
  QK_HD Cell first_unless(Mask where, Cell cell) const { return keep(where, cell); }

 private:
  Vec top_;
  Lookup level_[kBits];
  Lookup center_;
};

// Of two centers the cell is a mask, and no table is needed.
template <>
class CellSearch<1> {
 public:
  using Cell = Mask;

  explicit CellSearch(const CellTable<1>& table)
      : top_(splat(table.level[0][0])), low_(splat(table.center[0])), high_(splat(table.center[1])) {}

  QK_HD Cell find(Vec value) const { return value > top_; }
  QK_HD Vec center(Cell cell) const { return select(cell, high_, low_); }
  QK_HD Ints index(Cell cell) const { return keep(cell, splat(int32_t{1})); }
  QK_HD Ints shifted(Ints word, Cell cell) const { return add_where(cell, word, word); }
  QK_HD Cell first_unless(Mask where, Cell cell) const { return where & cell; }

 private:
  Vec top_, low_, high_;
};

}  // namespace qk::cpu
