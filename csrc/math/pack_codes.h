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

// The low `Width` bits of every field of Field bits.
template <int Width, int Field>
constexpr uint64_t low_bits() {
  constexpr uint64_t kOne = (1ull << Width) - 1;
  uint64_t mask = 0;
  for (int field = 0; field < 64; field += Field) {
    mask |= kOne << field;
  }
  return mask;
}

// Closes the gap between neighbouring fields: two of Field bits, each filled up to Width, become one of 2 Field, filled
// up to 2 Width.
template <int Width, int Field>
QK_HD uint64_t join(uint64_t word) {
  constexpr uint64_t kLower = low_bits<Width, 2 * Field>();
  return (word & kLower) | ((word >> (Field - Width)) & (kLower << Width));
}

// The inverse of join.
template <int Width, int Field>
QK_HD uint64_t split(uint64_t word) {
  constexpr uint64_t kLower = low_bits<Width, 2 * Field>();
  return (word & kLower) | ((word & (kLower << Width)) << (Field - Width));
}

// Eight codes below 2^Bits, one a byte, to the low 8 Bits bits: bytes into pairs, pairs into fours, fours into the
// word.
template <int Bits>
QK_HD uint64_t pack_eight(uint64_t codes) {
  return join<4 * Bits, 32>(join<2 * Bits, 16>(join<Bits, 8>(codes)));
}

// The inverse; bits past the low 8 Bits must be 0.
template <int Bits>
QK_HD uint64_t unpack_eight(uint64_t word) {
  return split<Bits, 8>(split<2 * Bits, 16>(split<4 * Bits, 32>(word)));
}

}  // namespace qk::math
