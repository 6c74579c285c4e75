// simd.h for AVX-512 (F, BW, DQ, VL).
#pragma once

#include "intrinsics.h"

namespace qk::cpu {

struct Vec {
  __m512 v;
};
struct Ints {
  __m512i v;
};
struct Mask {
  __mmask16 v;
};

QK_HD Vec splat(float a) { return {_mm512_set1_ps(a)}; }
QK_HD Ints splat(int32_t a) { return {_mm512_set1_epi32(a)}; }

QK_HD Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
QK_HD Vec load(const bfloat16* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
QK_HD Vec load(const float16* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}

QK_HD void store(Vec a, float* to) { _mm512_storeu_ps(to, a.v); }
QK_HD void stream(Vec a, float* to) { _mm512_stream_ps(to, a.v); }
QK_HD void end_stream() { _mm_sfence(); }
// To nearest even; NaN is kept apart because rounding could make it infinite.
QK_HD void store(Vec a, bfloat16* to) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_epi32(high, _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_epi32(high, _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(sum, 16), quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
}
QK_HD void store(Vec a, float16* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

QK_HD Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
QK_HD Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
QK_HD Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
QK_HD Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a b + c
QK_HD Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
QK_HD Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
QK_HD Vec smaller(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }

// 1 / a within 1 ulp for 2^-126 <= |a| < 2^126: 14 bits, then one Newton step.
QK_HD Vec reciprocal(Vec a) {
  const __m512 r = _mm512_rcp14_ps(a.v);
  const __m512 e = _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1.0f));
  return {_mm512_fmadd_ps(r, e, r)};
}

QK_HD Ints bits_of(Vec a) { return {_mm512_castps_si512(a.v)}; }
QK_HD Vec float_of(Ints a) { return {_mm512_castsi512_ps(a.v)}; }
QK_HD Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
QK_HD Ints larger(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
QK_HD Ints smaller(Ints a, Ints b) { return {_mm512_min_epi32(a.v, b.v)}; }
template <int Count>
QK_HD Ints shift_left(Ints a) {
  return {_mm512_slli_epi32(a.v, Count)};
}

QK_HD Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
QK_HD Mask operator!=(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
QK_HD Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.v | b.v)}; }
QK_HD bool any(Mask a) { return a.v != 0; }
QK_HD Vec select(Mask where, Vec yes, Vec no) { return {_mm512_mask_blend_ps(where.v, no.v, yes.v)}; }

// A table of 2^kTableBits integers that stays in registers; only the low bits of the index count.
constexpr int kTableBits = 4;
struct Table {
  __m512i v;
  explicit Table(const int32_t* values) : v(_mm512_loadu_si512(values)) {}
};
QK_HD Ints lookup(const Table& table, Ints index) { return {_mm512_permutexvar_epi32(index.v, table.v)}; }

// The same for 32 floats.
constexpr int kBins = 32;
struct BinTable {
  __m512i low, high;
  explicit BinTable(const void* values)
      : low(_mm512_loadu_si512(values)), high(_mm512_loadu_si512(static_cast<const char*>(values) + 64)) {}
};
QK_HD Ints lookup(const BinTable& table, Ints index) {
  return {_mm512_permutex2var_epi32(table.low, index.v, table.high)};
}

constexpr int kInterleave = 4;  // vectors in flight: four hide the latency of a dependent chain

}  // namespace qk::cpu
