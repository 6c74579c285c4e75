// Packing of eight codes at a time: they fill exactly `Bits` bytes of the little-endian stream, whatever Bits is.
#pragma once

#include "macros.h"

namespace qk::math {

// Byte i in bits [8 i, 8 i + 8), on any host; compilers make one load of it.
QK_HD uint64_t load_bytes(const uint8_t* from, int count) {
  uint64_t word = 0;
  for (int i = 0; i < count; ++i) {
    word |= static_cast<uint64_t>(from[i]) << (8 * i);
  }
  return word;
}

QK_HD void store_bytes(uint64_t word, int count, uint8_t* to) {
  for (int i = 0; i < count; ++i) {
    to[i] = static_cast<uint8_t>(word >> (8 * i));
  }
}

// Eight codes, one a byte and below 2^Bits, moved together: neighbours into pairs, pairs into fours, fours into the word.
template <int Bits>
QK_HD uint64_t pack_eight(uint64_t codes) {
  constexpr uint64_t kPairs = ((1ull << 2 * Bits) - 1) * 0x0001000100010001ull;
  constexpr uint64_t kFours = ((1ull << 4 * Bits) - 1) * 0x0000000100000001ull;
  uint64_t word = (codes | (codes >> (8 - Bits))) & kPairs;
  word = (word | (word >> (16 - 2 * Bits))) & kFours;
  return (word & 0xffffffffull) | ((word >> 32) << (4 * Bits));
}

// The inverse.
template <int Bits>
QK_HD uint64_t unpack_eight(uint64_t word) {
  constexpr uint64_t kFour = (1ull << 4 * Bits) - 1;
  constexpr uint64_t kPairs = ((1ull << 2 * Bits) - 1) * 0x0001000100010001ull;
  constexpr uint64_t kCodes = ((1ull << Bits) - 1) * 0x0101010101010101ull;
  uint64_t codes = (word & kFour) | (((word >> (4 * Bits)) & kFour) << 32);
  codes = (codes | (codes << (16 - 2 * Bits))) & kPairs;
  return (codes | (codes << (8 - Bits))) & kCodes;
}

}  // namespace qk::math
