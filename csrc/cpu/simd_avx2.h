// simd.h for AVX2 with FMA and F16C: two registers of eight lanes.
#pragma once

#include "intrinsics.h"

namespace qk::cpu {

struct Vec {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
struct Mask {
  __m256 low, high;
};

QK_HD Vec splat(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
QK_HD Ints splat(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }

QK_HD Vec load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
QK_HD __m256 widen(const bfloat16* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
QK_HD Vec load(const bfloat16* from) { return {widen(from), widen(from + 8)}; }
QK_HD __m256 widen(const float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
QK_HD Vec load(const float16* from) { return {widen(from), widen(from + 8)}; }

QK_HD void store(Vec a, float* to) {
  _mm256_storeu_ps(to, a.low);
  _mm256_storeu_ps(to + 8, a.high);
}
QK_HD void stream(Vec a, float* to) {
  _mm256_stream_ps(to, a.low);
  _mm256_stream_ps(to + 8, a.high);
}
QK_HD void end_stream() { _mm_sfence(); }
// To nearest even, in the low 16 bits; NaN is kept apart because rounding could make it infinite.
QK_HD __m256i rounded_to_bfloat16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, nan);
}
QK_HD void store(Vec a, bfloat16* to) {
  const __m256i packed = _mm256_packus_epi32(rounded_to_bfloat16(a.low), rounded_to_bfloat16(a.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
}
QK_HD void store(Vec a, float16* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(a.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm256_cvtps_ph(a.high, _MM_FROUND_TO_NEAREST_INT));
}

QK_HD Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
QK_HD Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
QK_HD Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
QK_HD Vec fma(Vec a, Vec b, Vec c) {  // a b + c
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
QK_HD Vec fnma(Vec a, Vec b, Vec c) {  // c - a b
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
QK_HD Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
QK_HD Vec smaller(Vec a, Vec b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }

// 1 / a, correctly rounded: 12 bits would need two Newton steps.
QK_HD Vec reciprocal(Vec a) {
  const __m256 one = _mm256_set1_ps(1.0f);
  return {_mm256_div_ps(one, a.low), _mm256_div_ps(one, a.high)};
}

QK_HD Ints bits_of(Vec a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
QK_HD Vec float_of(Ints a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
QK_HD Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
QK_HD Ints larger(Ints a, Ints b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }
QK_HD Ints smaller(Ints a, Ints b) { return {_mm256_min_epi32(a.low, b.low), _mm256_min_epi32(a.high, b.high)}; }
template <int Count>
QK_HD Ints shift_left(Ints a) {
  return {_mm256_slli_epi32(a.low, Count), _mm256_slli_epi32(a.high, Count)};
}

QK_HD Mask operator<(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ)};
}
QK_HD Mask operator!=(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_NEQ_UQ), _mm256_cmp_ps(a.high, b.high, _CMP_NEQ_UQ)};
}
QK_HD Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.low, b.low), _mm256_or_ps(a.high, b.high)}; }
QK_HD bool any(Mask a) { return _mm256_movemask_ps(_mm256_or_ps(a.low, a.high)) != 0; }
QK_HD Vec select(Mask where, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.low, yes.low, where.low), _mm256_blendv_ps(no.high, yes.high, where.high)};
}

// A table of 2^kTableBits integers that stays in a register; only the low bits of the index count.
constexpr int kTableBits = 3;
struct Table {
  __m256i v;
  explicit Table(const int32_t* values) : v(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))) {}
};
QK_HD Ints lookup(const Table& table, Ints index) {
  return {_mm256_permutevar8x32_epi32(table.v, index.low), _mm256_permutevar8x32_epi32(table.v, index.high)};
}

// The same for 16 entries.
constexpr int kBins = 16;
struct BinTable {
  __m256i low, high;
  explicit BinTable(const void* values)
      : low(_mm256_loadu_si256(static_cast<const __m256i*>(values))),
        high(_mm256_loadu_si256(static_cast<const __m256i*>(values) + 1)) {}
};
QK_HD __m256i lookup(const BinTable& table, __m256i index) {
  const __m256 low = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(table.low, index));
  const __m256 high = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(table.high, index));
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 of the index as the sign
  return _mm256_castps_si256(_mm256_blendv_ps(low, high, upper));
}
QK_HD Ints lookup(const BinTable& table, Ints index) { return {lookup(table, index.low), lookup(table, index.high)}; }

constexpr int kInterleave = 2;  // vectors in flight: four registers hide the latency, more do not fit into sixteen

}  // namespace qk::cpu
