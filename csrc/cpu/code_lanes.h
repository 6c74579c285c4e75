// CodeLanes: sixteen codes at a time out of the little-endian bit stream, from any bit on.
//
// Sixteen codes of `bits` bits, begun at bit `shift` of a byte, lie within sixteen bytes and each within two of them:
// one byte shuffle brings the two to a code's lane, one shift by lane and one mask leave the code. Every sixteen codes
// are 2 * bits whole bytes, so the shuffle and the shifts serve a whole run. Some four instructions a vector, whatever
// bits is.
#pragma once

#include <cstdint>

#include "simd_bits.h"

namespace qk::cpu {

constexpr int kCodeBytes = 16;  // what CodeLanes::of reads

// Where the code of each lane lies: its first byte and the bits below it.
struct CodePlaces {
  uint8_t byte[kVec];
  uint8_t below[kVec];

  CodePlaces(int bits, int shift) {
    for (int i = 0; i < kVec; ++i) {
      byte[i] = static_cast<uint8_t>((shift + i * bits) / 8);
      below[i] = static_cast<uint8_t>((shift + i * bits) % 8);
    }
  }
};

#if defined(__AVX2__)

// The shuffle that brings bytes b and b + 1 to each 32-bit lane, zeros above; past the sixteenth byte a zero too.
inline void shuffle_of(const CodePlaces& places, int lane, uint8_t* to) {
  const uint8_t first = places.byte[lane];
  to[0] = first;
  to[1] = static_cast<uint8_t>(first + 1 < kCodeBytes ? first + 1 : 0x80);
  to[2] = to[3] = 0x80;
}

#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)

class CodeLanes {
 public:
  CodeLanes(int bits, int shift) : mask_(_mm512_set1_epi32((1 << bits) - 1)) {
    const CodePlaces places(bits, shift);
    alignas(64) uint8_t shuffle[64];
    alignas(64) int32_t below[kVec];
    for (int i = 0; i < kVec; ++i) {
      shuffle_of(places, i, shuffle + 4 * i);
      below[i] = places.below[i];
    }
    shuffle_ = _mm512_load_si512(shuffle);
    below_ = _mm512_load_si512(below);
  }

  Ints of(const uint8_t* from) const {
    const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m512i words = _mm512_shuffle_epi8(four, shuffle_);
    return {_mm512_and_si512(_mm512_srlv_epi32(words, below_), mask_)};
  }

 private:
  __m512i shuffle_, below_, mask_;
};

#elif defined(__AVX2__) && defined(__FMA__)

class CodeLanes {
 public:
  CodeLanes(int bits, int shift) : mask_(_mm256_set1_epi32((1 << bits) - 1)) {
    const CodePlaces places(bits, shift);
    alignas(32) uint8_t shuffle[64];
    alignas(32) int32_t below[kVec];
    for (int i = 0; i < kVec; ++i) {
      shuffle_of(places, i, shuffle + 4 * i);
      below[i] = places.below[i];
    }
    for (int half = 0; half < 2; ++half) {
      shuffle_[half] = _mm256_load_si256(reinterpret_cast<const __m256i*>(shuffle + 32 * half));
      below_[half] = _mm256_load_si256(reinterpret_cast<const __m256i*>(below + 8 * half));
    }
  }

  Ints of(const uint8_t* from) const {
    const __m256i two = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return {eight(two, 0), eight(two, 1)};
  }

 private:
  __m256i eight(__m256i two, int half) const {
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_shuffle_epi8(two, shuffle_[half]), below_[half]), mask_);
  }

  __m256i shuffle_[2], below_[2], mask_;
};

#else

class CodeLanes {
 public:
  CodeLanes(int bits, int shift) : places_(bits, shift), mask_((1u << bits) - 1u) {}

  Ints of(const uint8_t* from) const {
    uint8_t bytes[kCodeBytes + 1] = {};  // the last code may end with the last byte
    std::memcpy(bytes, from, kCodeBytes);
    return each_lane<Ints>([&](int i) {
      const uint32_t word = bytes[places_.byte[i]] |
                            (static_cast<uint32_t>(bytes[places_.byte[i] + 1]) << 8);  // whatever the host's order
      return static_cast<int32_t>((word >> places_.below[i]) & mask_);
    });
  }

 private:
  CodePlaces places_;
  uint32_t mask_;
};

#endif

}  // namespace qk::cpu
