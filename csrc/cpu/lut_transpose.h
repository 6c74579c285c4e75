// transpose_words: sixteen rows of four 32-bit words to four vectors of sixteen, lane l from row l.
//
// Each register collects 16 bytes of rows i, 4 + i, 8 + i, ..., so that what remains is a 4 x 4 transposition inside
// every 16 bytes: two shuffles a vector. Bound by the sixteen loads.
#pragma once

#include <cstddef>

#include "simd.h"

namespace qk::cpu {

#if defined(__AVX512F__) && defined(__AVX512BW__)

// 16 bytes of four rows, the rows `apart` bytes apart.
QK_HD __m512i gather_rows(const char* from, ptrdiff_t apart) {
  const auto row = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * apart)); };
  __m512i all = _mm512_castsi128_si512(row(0));
  all = _mm512_mask_broadcast_i32x4(all, 0x00f0, row(1));
  all = _mm512_mask_broadcast_i32x4(all, 0x0f00, row(2));
  return _mm512_mask_broadcast_i32x4(all, 0xf000, row(3));
}

// Rows are `stride` bytes apart, the four vectors in `to` `step` floats.
QK_HD void transpose_words(const void* from, ptrdiff_t stride, float* to, ptrdiff_t step) {
  const char* rows = static_cast<const char*>(from);
  const __m512i a = gather_rows(rows, 4 * stride), b = gather_rows(rows + stride, 4 * stride);
  const __m512i c = gather_rows(rows + 2 * stride, 4 * stride), d = gather_rows(rows + 3 * stride, 4 * stride);
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
  _mm512_storeu_si512(to, _mm512_unpacklo_epi64(ab_low, cd_low));
  _mm512_storeu_si512(to + step, _mm512_unpackhi_epi64(ab_low, cd_low));
  _mm512_storeu_si512(to + 2 * step, _mm512_unpacklo_epi64(ab_high, cd_high));
  _mm512_storeu_si512(to + 3 * step, _mm512_unpackhi_epi64(ab_high, cd_high));
}

// Lane j of row i to lane i of row j, in registers: each line of memory is then read once, wherever the rows lie.
QK_HD void transpose_registers(__m512i (&row)[kVec]) {
  __m512i pair[kVec];
#pragma GCC unroll 16
  for (int i = 0; i < kVec; i += 2) {
    pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kVec; i += 4) {  // row[i + j]: word j of every 16 bytes, of rows i to i + 3
    row[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0xdd);
    row[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    row[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    row[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    row[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

#elif defined(__AVX2__) && defined(__FMA__)

QK_HD __m256i gather_rows(const char* from, ptrdiff_t apart) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + apart)), 1);
}

QK_HD void transpose_words(const void* from, ptrdiff_t stride, float* to, ptrdiff_t step) {
  for (int half = 0; half < 2; ++half, to += 8) {
    const char* rows = static_cast<const char*>(from) + 8 * half * stride;
    const __m256i a = gather_rows(rows, 4 * stride), b = gather_rows(rows + stride, 4 * stride);
    const __m256i c = gather_rows(rows + 2 * stride, 4 * stride), d = gather_rows(rows + 3 * stride, 4 * stride);
    const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
    const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
    const auto put = [&](int i, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * step), v); };
    put(0, _mm256_unpacklo_epi64(ab_low, cd_low));
    put(1, _mm256_unpackhi_epi64(ab_low, cd_low));
    put(2, _mm256_unpacklo_epi64(ab_high, cd_high));
    put(3, _mm256_unpackhi_epi64(ab_high, cd_high));
  }
}

#else

inline void transpose_words(const void* from, ptrdiff_t stride, float* to, ptrdiff_t step) {
  for (int row = 0; row < kVec; ++row) {
    for (int word = 0; word < 4; ++word) {
      std::memcpy(to + word * step + row, static_cast<const char*>(from) + row * stride + 4 * word, 4);
    }
  }
}

#endif

}  // namespace qk::cpu
