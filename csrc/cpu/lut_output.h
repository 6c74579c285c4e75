// What the kernels of lut_linear share at their ends: scratch, and sums to outputs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <utility>

#include "code_check.h"
#include "lut_regimes.h"
#include "lut_words.h"

namespace qk::cpu {

// Floats on a cache line's boundary, not initialised. A thread keeps those of up to kKept floats for its next call, one
// of each Slot: fresh pages would cost more than a small layer.
template <int Slot>
class Scratch {
 public:
  explicit Scratch(int64_t count) : count_(count) {
    Kept& mine = kept();
    if (mine.count >= count) {
      memory_ = std::move(mine.memory);
      count_ = std::exchange(mine.count, -1);
    } else {
      memory_.reset(new float[static_cast<size_t>(count + kLine)]);
    }
  }
  ~Scratch() {
    Kept& mine = kept();
    if (count_ > mine.count && count_ <= kKept) {
      mine.memory = std::move(memory_);
      mine.count = count_;
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() {
    void* at = memory_.get();
    size_t space = ~size_t{0};
    return static_cast<float*>(std::align(kLine * sizeof(float), 1, at, space));
  }

 private:
  static constexpr int64_t kLine = 16;
  static constexpr int64_t kKept = 1 << 21;
  struct Kept {
    std::unique_ptr<float[]> memory;
    int64_t count = -1;
  };
  static Kept& kept() {
    thread_local Kept mine;
    return mine;
  }

  std::unique_ptr<float[]> memory_;
  int64_t count_;
};

// One call: y = x W^T + b.
template <class T>
struct LutCall {
  LutWeights weights;
  const float* bias;  // null for none
  int64_t batch;
  const T* x;  // [batch, K]
  T* out;      // [batch, N]
};

// The highest of `count` codes from the start of a byte on.
template <int Bits>
int highest_in_stream(const uint8_t* from, int64_t count) {
  int highest = 0;
  int64_t i = 0;
  if constexpr (Bits <= 4) {
    Ints most = splat(0);
    for (; i + kChunkCodes <= count; i += kChunkCodes, from += kVec * Bits) {
      Ints words = load_words<Bits>(from);
      for (int j = 0; j < kWordCodes; ++j) {
        most = larger(most, words & splat((1 << Bits) - 1));
        words = shift_right<Bits>(words);
      }
    }
    alignas(64) int32_t lanes[kVec];
    store(most, lanes);
    highest = *std::max_element(lanes, lanes + kVec);
  }
  for (; i < count; i += kWordCodes, from += Bits) {
    const int some = static_cast<int>(std::min<int64_t>(kWordCodes, count - i));
    const uint64_t word = math::load_bytes(from, (some * Bits + 7) / 8);
    for (int j = 0; j < some; ++j) {
      highest = std::max(highest, static_cast<int>((word >> (j * Bits)) & ((1u << Bits) - 1u)));
    }
  }
  return highest;
}

// Outputs [row, row + count) of rows [first, first + batch) of x from their sums [batch][step]. `codes` is null where
// every code has a center; else the codes of a row of W are seen where its sum is NaN.
template <int Bits, class T>
void write_sums(const LutCall<T>& call, const float* sums, int64_t step, int64_t row, int count, int64_t first,
                int64_t batch, HighestCode* codes) {
  for (int64_t b = 0; b < batch; ++b, sums += step) {
    T* out = call.out + (first + b) * call.weights.out_features + row;
    for (int i = 0; i < count; i += kVec) {
      const int some = std::min(kVec, count - i);
      Vec sum = some == kVec ? load(sums + i) : load_some(sums + i, some);
      if (call.bias) {
        sum = sum + load_some(call.bias + row + i, some);
      }
      if (some == kVec) {
        store(sum, out + i);
      } else {
        store_some(sum, some, out + i);
      }
    }
    for (int i = 0; codes && b == 0 && i < count; ++i) {
      if (std::isnan(sums[i])) {
        const int64_t in_features = call.weights.in_features;
        codes->see(
            highest_in_stream<Bits>(call.weights.packed + (row + i) * (in_features / kWordCodes * Bits), in_features));
      }
    }
  }
}

}  // namespace qk::cpu
