// CodeSums: sum of g over the elements of each code, block by block, in an order fixed by the shape and m.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../math/macros.h"
#include "chunk.h"
#include "rows.h"

namespace qk::cpu {

// Up to kFewLevels codes: one masked pass a code into float32 lanes, flushed to float64 after each block. More codes:
// one addition an element straight into its code's float64 sum.
constexpr int kFewLevels = 16;

class CodeSums {
 public:
  CodeSums(int levels, double* sums) : levels_(levels), sums_(sums) {}

  // Padding past `valid` is never added where there are many codes, and must be zero where there are few.
  template <int Size>
  void add(const float* g, const int32_t* code, int valid) {
    if (levels_ > kFewLevels) {
      for (int i = 0; i < valid; ++i) {
        sums_[code[i]] += static_cast<double>(g[i]);
      }
      return;
    }
    alignas(64) float term[Size];
    for (int k = 0; k < levels_; ++k) {
      for (int i = 0; i < Size; ++i) {
        const uint32_t keep =
            code[i] == k ? ~0u : 0u;  // a mask: SSE2 has no selection, and branches would be guessed wrong
        term[i] = math::float_of(math::bits_of(g[i]) & keep);
      }
      add_to_lanes<Size>(term, lanes_ + k * kLanes);
    }
  }

  void end_block() {
    if (levels_ > kFewLevels) {
      return;
    }
    for (int k = 0; k < levels_; ++k) {
      sums_[k] += sum_of_lanes(lanes_ + k * kLanes);
    }
    std::fill_n(lanes_, levels_ * kLanes, 0.0f);
  }

 private:
  int levels_;
  double* sums_;
  alignas(64) float lanes_[kFewLevels * kLanes] = {};
};

// The terms of one block; kBlock of them at most, for lanes are float32 until end_block.
template <class T>
void add_block(const T* terms, const uint8_t* codes, int64_t count, CodeSums& sums) {
  for_each_chunk(0, count, [&](auto size, int64_t begin, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) float g[Size];
    alignas(64) int32_t code[Size];
    load_chunk<Size>(terms + begin, valid, 0.0f, g);
    for (int i = 0; i < Size; ++i) {
      code[i] = i < valid ? codes[begin + i] : 0;
    }
    sums.add<Size>(g, code, valid);
  });
  sums.end_block();
}

}  // namespace qk::cpu
