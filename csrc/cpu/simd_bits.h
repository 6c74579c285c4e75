// What finding cells and counting need beyond simd.h: comparisons, bits, and lookups of floats by lane.
#pragma once

#include "simd.h"

namespace qk::cpu {

constexpr int kLookup = 16;  // entries of a Lookup

#if defined(__AVX512F__) && defined(__AVX512BW__)

QK_HD Mask operator>(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
QK_HD Mask operator<=(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
QK_HD Mask operator==(Ints a, Ints b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
QK_HD Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.v & b.v)}; }
QK_HD Mask first_lanes(int count) { return {static_cast<__mmask16>((1u << count) - 1u)}; }  // count <= 16
QK_HD Vec keep(Mask where, Vec a) { return {_mm512_maskz_mov_ps(where.v, a.v)}; }
QK_HD Ints keep(Mask where, Ints a) { return {_mm512_maskz_mov_epi32(where.v, a.v)}; }
QK_HD Ints select(Mask where, Ints yes, Ints no) { return {_mm512_mask_blend_epi32(where.v, no.v, yes.v)}; }
QK_HD Ints add_where(Mask where, Ints a, Ints b) { return {_mm512_mask_add_epi32(a.v, where.v, a.v, b.v)}; }
QK_HD Vec add_where(Mask where, Vec a, Vec b) { return {_mm512_mask_add_ps(a.v, where.v, a.v, b.v)}; }
QK_HD Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
QK_HD Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
QK_HD Ints operator^(Ints a, Ints b) { return {_mm512_xor_si512(a.v, b.v)}; }
QK_HD Ints odd(Ints a, Ints b, Ints c) { return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0x96)}; }
QK_HD Ints majority(Ints a, Ints b, Ints c) { return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0xe8)}; }
QK_HD Ints shift_left(Ints a, Ints by) { return {_mm512_sllv_epi32(a.v, by.v)}; }  // by < 32
QK_HD Ints load(const int32_t* from) { return {_mm512_loadu_si512(from)}; }
QK_HD void store(Ints a, int32_t* to) { _mm512_storeu_si512(to, a.v); }
QK_HD void store_bytes(Ints a, uint8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a.v));
}
QK_HD Ints load_bytes(const uint8_t* from) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
QK_HD int lanes_with_bit(Ints a, int bit) {
  return __builtin_popcount(_mm512_test_epi32_mask(a.v, _mm512_set1_epi32(static_cast<int>(1u << bit))));
}

QK_HD Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
QK_HD Vec square_root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
QK_HD Vec fused(Vec a, Vec b, Vec c) { return fma(a, b, c); }
// The smaller magnitude of both, with the sign of a.
QK_HD Vec nearer_zero(Vec a, Vec b) { return {_mm512_range_ps(a.v, b.v, 2)}; }

struct Lookup {
  __m512 v;
  Lookup() = default;
  explicit Lookup(const float* entries) : v(_mm512_loadu_ps(entries)) {}
};
template <int kBits>  // of the index
QK_HD Vec lookup(const Lookup& table, Ints index) {
  return {_mm512_permutexvar_ps(index.v, table.v)};
}

#elif defined(__AVX2__) && defined(__FMA__)

QK_HD Mask operator>(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ)};
}
QK_HD Mask operator<=(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_LE_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LE_OQ)};
}
QK_HD Mask operator==(Ints a, Ints b) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.low, b.low)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(a.high, b.high))};
}
QK_HD Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.low, b.low), _mm256_and_ps(a.high, b.high)}; }
QK_HD Mask first_lanes(int count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), limit = _mm256_set1_epi32(count);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, lane)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, _mm256_add_epi32(lane, _mm256_set1_epi32(8))))};
}
QK_HD Ints bits_of(Mask a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
QK_HD Vec keep(Mask where, Vec a) { return {_mm256_and_ps(where.low, a.low), _mm256_and_ps(where.high, a.high)}; }
QK_HD Ints operator&(Ints a, Ints b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
QK_HD Ints operator|(Ints a, Ints b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
QK_HD Ints operator^(Ints a, Ints b) { return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)}; }
QK_HD Ints keep(Mask where, Ints a) { return bits_of(where) & a; }
QK_HD Ints select(Mask where, Ints yes, Ints no) { return bits_of(select(where, float_of(yes), float_of(no))); }
QK_HD Ints add_where(Mask where, Ints a, Ints b) { return a + keep(where, b); }
QK_HD Vec add_where(Mask where, Vec a, Vec b) { return a + keep(where, b); }
QK_HD Ints odd(Ints a, Ints b, Ints c) { return (a ^ b) ^ c; }
QK_HD Ints majority(Ints a, Ints b, Ints c) { return (a & b) | ((a ^ b) & c); }
QK_HD Ints shift_left(Ints a, Ints by) {
  return {_mm256_sllv_epi32(a.low, by.low), _mm256_sllv_epi32(a.high, by.high)};
}
QK_HD Ints load(const int32_t* from) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 8))};
}
QK_HD void store(Ints a, int32_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), a.high);
}
QK_HD void store_bytes(Ints a, uint8_t* to) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.low, a.high), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}
QK_HD Ints load_bytes(const uint8_t* from) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8)))};
}
QK_HD int lanes_with_bit(Ints a, int bit) {
  const __m128i up = _mm_cvtsi32_si128(31 - bit);  // the sign is what movemask sees
  const int low = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_sll_epi32(a.low, up)));
  const int high = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_sll_epi32(a.high, up)));
  return __builtin_popcount(static_cast<unsigned>(low << 8 | high));
}

struct Lookup {
  __m256 low, high;
  Lookup() = default;
  explicit Lookup(const float* entries) : low(_mm256_loadu_ps(entries)), high(_mm256_loadu_ps(entries + 8)) {}
};
template <int kBits>
QK_HD __m256 lookup_half(const Lookup& table, __m256i index) {
  const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
  if constexpr (kBits <= 3) {
    return low;
  }
  const __m256 high = _mm256_permutevar8x32_ps(table.high, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // bit 3 as the sign
}
template <int kBits>
QK_HD Vec lookup(const Lookup& table, Ints index) {
  return {lookup_half<kBits>(table, index.low), lookup_half<kBits>(table, index.high)};
}

#else

QK_HD Mask operator>(const Vec& a, const Vec& b) {
  return each_lane<Mask>([&](int i) { return a.lane[i] > b.lane[i] ? -1 : 0; });
}
QK_HD Mask operator<=(const Vec& a, const Vec& b) {
  return each_lane<Mask>([&](int i) { return a.lane[i] <= b.lane[i] ? -1 : 0; });
}
QK_HD Mask operator==(const Ints& a, const Ints& b) {
  return each_lane<Mask>([&](int i) { return a.lane[i] == b.lane[i] ? -1 : 0; });
}
QK_HD Mask operator&(const Mask& a, const Mask& b) {
  return each_lane<Mask>([&](int i) { return a.lane[i] & b.lane[i]; });
}
QK_HD Mask first_lanes(int count) {
  return each_lane<Mask>([&](int i) { return i < count ? -1 : 0; });
}
QK_HD Vec keep(const Mask& where, const Vec& a) {
  return each_lane<Vec>(
      [&](int i) { return math::float_of(math::bits_of(a.lane[i]) & static_cast<uint32_t>(where.lane[i])); });
}
QK_HD Ints keep(const Mask& where, const Ints& a) {
  return each_lane<Ints>([&](int i) { return a.lane[i] & where.lane[i]; });
}
QK_HD Ints select(const Mask& where, const Ints& yes, const Ints& no) {
  return each_lane<Ints>([&](int i) { return where.lane[i] ? yes.lane[i] : no.lane[i]; });
}
QK_HD Ints add_where(const Mask& where, const Ints& a, const Ints& b) { return a + keep(where, b); }
QK_HD Vec add_where(const Mask& where, const Vec& a, const Vec& b) { return a + keep(where, b); }
QK_HD Ints operator&(const Ints& a, const Ints& b) {
  return each_lane<Ints>([&](int i) { return a.lane[i] & b.lane[i]; });
}
QK_HD Ints operator|(const Ints& a, const Ints& b) {
  return each_lane<Ints>([&](int i) { return a.lane[i] | b.lane[i]; });
}
QK_HD Ints operator^(const Ints& a, const Ints& b) {
  return each_lane<Ints>([&](int i) { return a.lane[i] ^ b.lane[i]; });
}
QK_HD Ints odd(const Ints& a, const Ints& b, const Ints& c) { return (a ^ b) ^ c; }
QK_HD Ints majority(const Ints& a, const Ints& b, const Ints& c) { return (a & b) | ((a ^ b) & c); }
QK_HD Ints shift_left(const Ints& a, const Ints& by) {
  return each_lane<Ints>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) << by.lane[i]); });
}
QK_HD Ints load(const int32_t* from) {
  return each_lane<Ints>([&](int i) { return from[i]; });
}
QK_HD void store(const Ints& a, int32_t* to) { std::memcpy(to, a.lane, sizeof a.lane); }
QK_HD void store_bytes(const Ints& a, uint8_t* to) {
  for (int i = 0; i < kVec; ++i) {
    to[i] = static_cast<uint8_t>(a.lane[i]);
  }
}
QK_HD Ints load_bytes(const uint8_t* from) {
  return each_lane<Ints>([&](int i) { return static_cast<int32_t>(from[i]); });
}
inline int lanes_with_bit(const Ints& a, int bit) {
  int count = 0;
  for (int i = 0; i < kVec; ++i) {
    count += (a.lane[i] >> bit) & 1;
  }
  return count;
}

struct Lookup {
  const float* entries = nullptr;
  Lookup() = default;
  explicit Lookup(const float* entries_) : entries(entries_) {}
};
template <int kBits>
QK_HD Vec lookup(const Lookup& table, const Ints& index) {
  return each_lane<Vec>([&](int i) { return table.entries[index.lane[i]]; });
}

#endif

#if !(defined(__AVX512F__) && defined(__AVX512BW__))

// The smaller magnitude of both, with the sign of a; b is not negative.
QK_HD Vec nearer_zero(Vec a, Vec b) {
  const Ints sign = splat(INT32_MIN);
  const Vec size = smaller(float_of(bits_of(a) & splat(INT32_MAX)), b);
  return float_of(bits_of(size) | (bits_of(a) & sign));
}

#endif

}  // namespace qk::cpu
