// Tables in shared memory that turn the bits of a piece into the register operand of mma.m16n8k16.
//
// One table serves all of W. Eight codes, a unit, become four words of two values each: the operand's registers for one
// row in two steps of mma. An entry is what a field of the stream means: a pair of codes of 4 or 3 bits, four codes of
// 2 bits, eight of 1 bit. It stands in all of the 128 bytes of a row of banks as often as it fits, and a lane reads its
// own copy: no two lanes of a phase meet in a bank. 16 KB a bit of 8-bit fields, 0.5 words of shared memory a weight.
#pragma once

#include "lut_pieces.h"
#include "platform.h"

namespace qk::cuda {

constexpr int kEntryBytes = 128;  // a row of banks
constexpr int kUnit = 8;          // codes

template <int Bits>
struct FieldTable {
  static constexpr int kCodes = Bits >= 3 ? 2 : 8 / Bits;  // of a field
  static constexpr int kEntries = 1 << (kCodes * Bits);
  static constexpr int kBytes = kEntries * kEntryBytes;
  static constexpr int kCopyBytes = 2 * kCodes;

  // Byte of the table where a lane's own copies start.
  __device__ static int first_byte(int lane) { return lane * kCopyBytes % kEntryBytes; }

  template <class T>
  __device__ static void fill(uint4* table, const float* centers, int levels, int thread, int threads) {
    constexpr int kPairs = kCodes / 2;
    for (int i = thread; i < kBytes / 16; i += threads) {
      const int entry = i / (kEntryBytes / 16);
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int below = 2 * (j % kPairs) * Bits;
        const int first = (entry >> below) & ((1 << Bits) - 1), second = (entry >> (below + Bits)) & ((1 << Bits) - 1);
        words[j] = pack_pair<T>(__ldg(centers + (first < levels ? first : levels - 1)),
                                __ldg(centers + (second < levels ? second : levels - 1)));
      }
      table[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  // The values of codes 8 u .. 8 u + 7 of a piece, two a word. own: the lane's first copy.
  __device__ static __forceinline__ uint4 unit(const Piece<Bits>& piece, int u, const unsigned char* own) {
    constexpr int kWidth = kCodes * Bits;
    const int at = u * kUnit * Bits;
    auto entry = [&](int i) { return own + piece.template field<kWidth, 7>(at + i * kWidth); };
    if constexpr (Bits == 1) {
      return *reinterpret_cast<const uint4*>(entry(0));
    } else if constexpr (Bits == 2) {
      const uint2 low = *reinterpret_cast<const uint2*>(entry(0)), high = *reinterpret_cast<const uint2*>(entry(1));
      return make_uint4(low.x, low.y, high.x, high.y);
    } else {
      return make_uint4(*reinterpret_cast<const uint32_t*>(entry(0)), *reinterpret_cast<const uint32_t*>(entry(1)),
                        *reinterpret_cast<const uint32_t*>(entry(2)), *reinterpret_cast<const uint32_t*>(entry(3)));
    }
  }
};

// A float32 center that is no number of the half type of x is the sum of three bfloat16 numbers, and a float16 x of
// two: six or three products are then exact where one was. Sixteen entries of 8 bytes hold the parts of all codes; a
// phase of sixteen lanes meets in no bank.
struct Parts {
  uint32_t high_middle;  // two bfloat16
  uint32_t low;
};

template <class T>
__device__ inline bool fits(float value) {
  return to_float(from_float<T>(value)) == value;
}

__device__ inline uint32_t bfloat16_bits(float value) { return from_float<bfloat16>(value).bits; }
__device__ inline float bfloat16_value(uint32_t bits) { return __uint_as_float(bits << 16); }

__device__ inline Parts parts_of(float value) {
  uint32_t high = bfloat16_bits(value);
  if ((high & 0x7fffu) == 0 && value != 0.0f) {
    high |= 1;  // not 0, for an infinite x times it is infinite
  }
  const float below = value - bfloat16_value(high);
  const uint32_t middle = bfloat16_bits(below);
  return {high | middle << 16, bfloat16_bits(below - bfloat16_value(middle))};
}

// float16 parts would lose what lies below 2^-24, bfloat16 ones what lies below 2^-133. Centers beside a float16 x,
// which is below 2^16, are scaled to put the largest near 2^90, out of reach of both ends, and sums are scaled back.
__device__ inline int scale_of(const float* centers, int levels) {
  float largest = 0.0f;
  for (int i = 0; i < levels; ++i) {
    largest = fmaxf(largest, fabsf(__ldg(centers + i)));
  }
  return largest > 0.0f && largest <= 3.4e38f ? 90 - ilogbf(largest) : 0;
}

// The part `which` of two codes: 0 high, 1 middle, 2 low.
__device__ __forceinline__ uint32_t pair_of(const uint2& first, const uint2& second, int which) {
  return which == 2 ? __byte_perm(first.y, second.y, 0x5410)
                    : __byte_perm(first.x, second.x, which == 0 ? 0x5410 : 0x7632);
}

// Two bfloat16, an infinity or NaN as 0: beside lower parts of a center, whose sign is any, inf - inf would appear.
__device__ __forceinline__ uint32_t finite_pair(uint32_t pair) {
  const uint32_t low = (pair & 0x7f80u) == 0x7f80u ? 0 : pair & 0xffffu;
  const uint32_t high = (pair & 0x7f800000u) == 0x7f800000u ? 0 : pair & 0xffff0000u;
  return low | high;
}

// Two float16 as two pairs of bfloat16 that add up to them; the second of an infinity or NaN is 0.
__device__ __forceinline__ void split_pair(uint32_t pair, uint32_t& high, uint32_t& low) {
  float first, second;
  unpack_pair<float16>(pair, first, second);
  high = pack_pair<bfloat16>(first, second);
  float first_high, second_high;
  unpack_pair<bfloat16>(high, first_high, second_high);
  low = finite_pair(pack_pair<bfloat16>(first - first_high, second - second_high));
}

}  // namespace qk::cuda
