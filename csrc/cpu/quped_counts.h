// PositionalCounts: how often each of 32 bits was set in a stream of vectors of sixteen 32-bit words.
//
// Counters lie across registers: bit b of lane l of plane p is bit p of the count of bit b in lane l. Carry-save adders
// take two words a step, so that a word costs two logical operations, not one counter a bit (Harley and Seal; Mula,
// Kurz and Lemire 2017, arXiv:1611.07612).
#pragma once

#include "simd_bits.h"

namespace qk::cpu {

// Adds two words to a plane and gives what is carried into the next.
QK_HD Ints carry_save(Ints& plane, Ints a, Ints b) {
  const Ints kept = plane;
  plane = odd(kept, a, b);
  return majority(kept, a, b);
}

class PositionalCounts {
 public:
  static constexpr int64_t kCapacity = int64_t{1} << 19;  // words a lane between two flushes
  static constexpr int kLow = 3;                          // planes a caller holds in registers while it adds

  PositionalCounts() { clear(); }

  bool full() const { return added_ >= kCapacity; }

  Ints low(int plane) const { return plane_[plane]; }

  // Puts back the lowest kHeld planes after `words` words a lane, and takes eight carries out of them.
  template <int kHeld>
  void add(const Ints (&held)[kHeld], const Ints (&carries)[8], int64_t words) {
    added_ += words;
    for (int p = 0; p < kHeld; ++p) {
      plane_[p] = held[p];
    }
    Ints twos[4], fours[2];
    for (int i = 0; i < 4; ++i) {
      twos[i] = carry_save(plane_[kHeld], carries[2 * i], carries[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      fours[i] = carry_save(plane_[kHeld + 1], twos[2 * i], twos[2 * i + 1]);
    }
    Ints carried = carry_save(plane_[kHeld + 2], fours[0], fours[1]);
    for (int p = kHeld + 3; p < kPlanes; ++p) {
      const Ints kept = plane_[p];
      plane_[p] = kept ^ carried;
      carried = kept & carried;
    }
  }

  // Adds the count of bit b, for the bits of `wanted`, to counts[b] and starts again.
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
  static constexpr int kPlanes = 21;

  void clear() {
    added_ = 0;
    for (Ints& plane : plane_) {
      plane = splat(int32_t{0});
    }
  }

  int64_t added_;
  Ints plane_[kPlanes];
};

}  // namespace qk::cpu
