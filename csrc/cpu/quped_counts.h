// PositionalCounts: how often each of 32 bits was set in a stream of vectors of sixteen 32-bit words.
//
// Counters lie across registers: bit b of lane l of plane p is bit p of the count of bit b in lane l. Carry-save adders
// take two words a step, so that a word costs two logical operations, not one counter a bit (Harley and Seal; Mula,
// Kurz and Lemire 2017, arXiv:1611.07612).
#pragma once

#include "simd_bits.h"

namespace qk::cpu {

constexpr int kWordGroup = 16;  // vectors of words an addition takes: a multiple of this

class PositionalCounts {
 public:
  static constexpr int64_t kCapacity = int64_t{1} << 19;  // vectors between two flushes

  PositionalCounts() { clear(); }

  bool full() const { return added_ >= kCapacity; }

  // words [vectors][16], at most 64 vectors in whole groups.
  void add(const int32_t* words, int vectors) {
    added_ += vectors;
    if (vectors == 1 << kTall) {
      ripple<kTall>(carry_of<kTall>(words));
      return;
    }
    for (int i = 0; i < vectors; i += kWordGroup) {
      ripple<kShort>(carry_of<kShort>(words + i * kVec));
    }
  }

  // Adds the count of bit b to counts[b] and starts again.
  void flush(int64_t* counts, uint32_t wanted) {
    int planes = 0;
    while (added_ >> planes) {
      ++planes;
    }
    for (int bit = 0; bit < 32; ++bit) {
      if (wanted >> bit & 1u) {
        for (int p = 0; p < planes; ++p) {
          counts[bit] += static_cast<int64_t>(lanes_with_bit(plane_[p], bit)) << p;
        }
      }
    }
    clear();
  }

 private:
  static constexpr int kShort = 4;
  static constexpr int kTall = 6;
  static constexpr int kPlanes = 21;

  void clear() {
    added_ = 0;
    for (Ints& plane : plane_) {
      plane = splat(int32_t{0});
    }
  }

  // Takes 2^kLevel words into the planes below and gives what is carried out of them.
  template <int kLevel, int kHeld>
  static QK_HD Ints carry(const int32_t* words, Ints (&plane)[kHeld]) {
    Ints a, b;
    if constexpr (kLevel == 1) {
      a = load(words);
      b = load(words + kVec);
    } else {
      a = carry<kLevel - 1>(words, plane);
      b = carry<kLevel - 1>(words + (kVec << (kLevel - 1)), plane);
    }
    const Ints kept = plane[kLevel - 1];
    plane[kLevel - 1] = odd(kept, a, b);
    return majority(kept, a, b);
  }

  template <int kLevel>
  Ints carry_of(const int32_t* words) {
    Ints low[kLevel];  // in registers
    for (int p = 0; p < kLevel; ++p) {
      low[p] = plane_[p];
    }
    const Ints out = carry<kLevel>(words, low);
    for (int p = 0; p < kLevel; ++p) {
      plane_[p] = low[p];
    }
    return out;
  }

  template <int kFrom>
  void ripple(Ints carried) {
    for (int p = kFrom; p < kPlanes; ++p) {
      const Ints kept = plane_[p];
      plane_[p] = kept ^ carried;
      carried = kept & carried;
    }
  }

  int64_t added_;
  Ints plane_[kPlanes];
};

}  // namespace qk::cpu
