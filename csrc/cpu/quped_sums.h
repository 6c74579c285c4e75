// CellSums: float32 values added up by cell, in lanes over a block and in float64 from there on.
#pragma once

#include <cstdint>
#include <cstring>

#include "chunk.h"
#include "rows.h"
#include "simd_bits.h"

namespace qk::cpu {

class CellSums {
 public:
  CellSums(int levels, double* sums) : levels_(levels), sums_(sums) { clear(); }

  // n values and their cells, at most kLookup of them; cell is readable up to a whole vector.
  void add(const float* value, const int32_t* cell, int n) {
    if (levels_ > kLookup) {
      for (int i = 0; i < n; ++i) {
        sums_[cell[i]] += static_cast<double>(value[i]);
      }
      return;
    }
    for (int k = 0; k < levels_; k += kTogether) {
      Vec sum[kTogether];
      Ints own[kTogether];
      for (int j = 0; j < kTogether; ++j) {
        sum[j] = load(lanes_[k + j]);
        own[j] = splat(int32_t{k + j});
      }
      const auto one = [&](Vec v, Ints c) {
        for (int j = 0; j < kTogether; ++j) {
          sum[j] = add_where(c == own[j], sum[j], v);
        }
      };
      int i = 0;
      for (; i + kVec <= n; i += kVec) {
        one(load(value + i), load(cell + i));
      }
      if (i < n) {
        one(load_some(value + i, n - i), load(cell + i));  // zeros behind the last
      }
      for (int j = 0; j < kTogether; ++j) {
        store(sum[j], lanes_[k + j]);
      }
    }
  }

  void end_block() {
    if (levels_ <= kLookup) {
      for (int k = 0; k < levels_; ++k) {
        sums_[k] += sum_of_lanes(lanes_[k]);
      }
      clear();
    }
  }

 private:
  static constexpr int kTogether = 4;

  void clear() { std::memset(lanes_, 0, sizeof lanes_); }

  int levels_;
  double* sums_;
  alignas(64) float lanes_[kLookup][kVec];
};

}  // namespace qk::cpu
