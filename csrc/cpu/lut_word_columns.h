// Sixteen rows of sixteen 32-bit words of the stream to vectors of one word of every row, and tables of sixteen sums.
#pragma once

#include "lut_words.h"

namespace qk::cpu {

constexpr int64_t kColumnBytes = kVec * 4;

// Rows are `stride` bytes apart; to [16 words][16 rows].
#if defined(__AVX512F__) && defined(__AVX512BW__)

// Halves of rows i and 4 + i share a register, as do 8 + i and 12 + i; a transposition of 4 x 4 within every 16 bytes
// and one of 2 x 2 across registers are left: three shuffles a vector.
QK_HD void transpose_columns(const uint8_t* from, int64_t stride, int32_t* to) {
  for (int half = 0; half < 2; ++half, from += 32, to += 8 * kVec) {
    __m512i turned[8];
    for (int part = 0; part < 2; ++part) {
      __m512i row[4];
      for (int i = 0; i < 4; ++i) {
        const uint8_t* at = from + (8 * part + i) * stride;
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 4 * stride));
        row[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      }
      const __m512i a = _mm512_unpacklo_epi32(row[0], row[1]), b = _mm512_unpackhi_epi32(row[0], row[1]);
      const __m512i c = _mm512_unpacklo_epi32(row[2], row[3]), d = _mm512_unpackhi_epi32(row[2], row[3]);
      turned[4 * part] = _mm512_unpacklo_epi64(a, c);
      turned[4 * part + 1] = _mm512_unpackhi_epi64(a, c);
      turned[4 * part + 2] = _mm512_unpacklo_epi64(b, d);
      turned[4 * part + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; ++i) {
      _mm512_store_si512(to + i * kVec, _mm512_shuffle_i32x4(turned[i], turned[4 + i], 0x88));
      _mm512_store_si512(to + (4 + i) * kVec, _mm512_shuffle_i32x4(turned[i], turned[4 + i], 0xdd));
    }
  }
}

#else

inline void transpose_columns(const uint8_t* from, int64_t stride, int32_t* to) {
  for (int row = 0; row < kVec; ++row) {
    for (int word = 0; word < kVec; ++word) {
      to[word * kVec + row] = static_cast<int32_t>(math::load_bytes(from + row * stride + 4 * word, 4));
    }
  }
}

#endif

// The same where only `rows` rows have `bytes` bytes left; zeros elsewhere.
inline void transpose_some(const uint8_t* from, int64_t stride, int64_t rows, int64_t bytes, int32_t* to) {
  alignas(64) uint8_t whole[kVec * kColumnBytes] = {};
  for (int64_t row = 0; row < rows; ++row) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const __mmask64 inside = ~uint64_t{0} >> (kColumnBytes - bytes);
    _mm512_store_si512(whole + row * kColumnBytes, _mm512_maskz_loadu_epi8(inside, from + row * stride));
#else
    std::memcpy(whole + row * kColumnBytes, from + row * stride, static_cast<size_t>(bytes));
#endif
  }
  transpose_columns(whole, kColumnBytes, to);
}

// Sixteen sums, told apart by the lowest four bits of every lane.
class SixteenSums {
 public:
  explicit QK_HD SixteenSums(const float* sums) : table_(sums) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    __asm__("" : "+v"(table_.v));
#endif
  }
  QK_HD Vec operator[](const Ints& index) const { return lookup_sixteen(table_, index); }

 private:
  Lookup table_;
};

}  // namespace qk::cpu
