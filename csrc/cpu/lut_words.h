// Eight codes of the bit stream in every 32-bit lane, and the table their lowest bits index.
//
// Lane l of the words of a chunk (128 codes, 16 Bits bytes) holds codes 8 l ... 8 l + 7, code j from bit Bits j on: one
// load and at most two shuffles bring 128 codes into reach of a shift and a lookup for sixteen of them at a time.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../math/pack_codes.h"
#include "extensions.h"
#include "lut_decode.h"
#include "lut_regimes.h"
#include "simd_bits.h"

namespace qk::cpu {

static_assert(kChunkCodes == kVec * kWordCodes, "a word a lane");

// Keeps a value in its register: gcc 12 folds a load back into every instruction that uses it.
#if defined(__AVX512F__) && defined(__AVX512BW__)
QK_HD void pin(Vec& a) { __asm__("" : "+v"(a.v)); }
QK_HD void pin(Ints& a) { __asm__("" : "+v"(a.v)); }
#else
QK_HD void pin(Vec&) {}  // sixteen registers or fewer: the compiler knows better
QK_HD void pin(Ints&) {}
#endif

// f(0), f(1), ..., f(Count - 1) with the number as a constant: arrays of vectors indexed by it stay in registers, where
// gcc 12 keeps those of a loop it unrolls in memory.
template <int... I, class F>
QK_HD void call_each(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int Count, class F>
QK_HD void unrolled(F&& f) {
  call_each(std::make_integer_sequence<int, Count>{}, f);
}
#if defined(__GNUC__)
#define QK_INLINE __attribute__((always_inline))
#else
#define QK_INLINE
#endif

QK_HD void prefetch(uintptr_t at) {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);  // into the second level; any address is harmless
#else
  (void)at;
#endif
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
// Whether bytes move across a register in one instruction (AVX512_VBMI); asked once.
inline bool has_byte_permutation() {
  static const bool has = __builtin_cpu_supports("avx512vbmi") && !is_disabled("avx512_vbmi");
  return has;
}
#else
inline bool has_byte_permutation() { return false; }
#endif

// The words of a chunk, all 16 Bits bytes of which are read. kPermuted: the processor has_byte_permutation.
template <int Bits, bool kPermuted = false>
QK_HD Ints load_words(const uint8_t* from) {
  static_assert(Bits >= 1 && Bits <= 4, "eight codes in 32 bits");
#if defined(__AVX512F__) && defined(__AVX512BW__)
  if constexpr (Bits == 4) {
    return {_mm512_loadu_si512(from)};
  } else if constexpr (Bits == 2) {
    return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  } else if constexpr (Bits == 1) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  } else if constexpr (kPermuted) {
    alignas(64) static constexpr uint8_t kThreeOfFour[64] = {
        0,  1,  2,  0,  3,  4,  5,  0,  6,  7,  8,  0,  9,  10, 11, 0,  12, 13, 14, 0,  15, 16,
        17, 0,  18, 19, 20, 0,  21, 22, 23, 0,  24, 25, 26, 0,  27, 28, 29, 0,  30, 31, 32, 0,
        33, 34, 35, 0,  36, 37, 38, 0,  39, 40, 41, 0,  42, 43, 44, 0,  45, 46, 47, 0};
    const __m512i bytes = _mm512_maskz_loadu_epi32(0x0fff, from);
    __m512i words;  // as text: the build has no flag for what is asked at run time
    __asm__("vpermb %1, %2, %0" : "=v"(words) : "v"(bytes), "v"(_mm512_load_si512(kThreeOfFour)));
    return {words};
  } else {
    // 12 bytes to every 16, then 3 to every 4.
    const __m512i apart = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
    const __m512i lanes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
    const __m512i bytes = _mm512_maskz_loadu_epi32(0x0fff, from);
    return {_mm512_shuffle_epi8(_mm512_permutexvar_epi32(apart, bytes), lanes)};
  }
#elif defined(__AVX2__) && defined(__FMA__)
  const auto sixteen = [](const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); };
  if constexpr (Bits == 4) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32))};
  } else if constexpr (Bits == 2) {
    return {_mm256_cvtepu16_epi32(sixteen(from)), _mm256_cvtepu16_epi32(sixteen(from + 16))};
  } else if constexpr (Bits == 1) {
    const __m128i bytes = sixteen(from);
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
  } else {
    const __m128i first = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    const __m128i last =
        _mm_setr_epi8(4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);  // ends with the chunk
    const __m256i low = _mm256_set_m128i(sixteen(from + 12), sixteen(from));
    const __m256i high = _mm256_set_m128i(sixteen(from + 32), sixteen(from + 24));
    return {_mm256_shuffle_epi8(low, _mm256_set_m128i(first, first)),
            _mm256_shuffle_epi8(high, _mm256_set_m128i(last, first))};
  }
#else
  return each_lane<Ints>([&](int l) { return static_cast<int32_t>(math::load_bytes(from + l * Bits, Bits)); });
#endif
}

// The first `bytes` of a chunk, zeros behind them.
template <int Bits>
Ints load_some_words(const uint8_t* from, int64_t bytes) {
  uint8_t whole[kVec * Bits] = {};
  std::memcpy(whole, from, static_cast<size_t>(bytes));
  return load_words<Bits>(whole);
}

// The value of the lowest four bits of every lane.
QK_HD Vec lookup_sixteen(const Lookup& table, const Ints& index) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return lookup<4>(table, index);
#elif defined(__AVX2__) && defined(__FMA__)
  return lookup<4>(table, index);
#else
  return lookup<4>(table, index & splat(15));
#endif
}

// The sum of the lanes: halves are added until one lane is left.
QK_HD float sum_of(const Vec& a) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return _mm512_reduce_add_ps(a.v);
#else
  alignas(64) float lanes[kVec];
  store(a, lanes);
  for (int half = kVec / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lanes[i] += lanes[i + half];
    }
  }
  return lanes[0];
#endif
}

// What a code >= levels stands for: it marks every sum it reaches, so that codes are looked at only where a sum is NaN.
constexpr float kInvalid = std::numeric_limits<float>::quiet_NaN();

// The centers, kInvalid up to 1 << Bits entries, all of it repeated up to sixteen.
template <int Bits>
class CenterTable {
 public:
  static constexpr int kCodes = 1 << Bits;

  void fill(const float* centers, int levels) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const __mmask16 inside = static_cast<__mmask16>((1u << levels) - 1u);
    table_.v = _mm512_mask_loadu_ps(_mm512_set1_ps(kInvalid), inside, centers);
    if constexpr (kCodes < kVec) {
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      table_.v = _mm512_permutexvar_ps(_mm512_and_si512(lane, _mm512_set1_epi32(kCodes - 1)), table_.v);
    }
    __asm__("" : "+v"(table_.v));
#else
    for (int i = 0; i < kVec; ++i) {
      entries_[i] = i % kCodes < levels ? centers[i % kCodes] : kInvalid;
    }
    table_ = Lookup(entries_);
#endif
  }

  // The value of the lowest Bits bits of every lane.
  QK_HD Vec operator[](const Ints& index) const {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return lookup<Bits>(table_, index);
#else
    return lookup_sixteen(table_, index);
#endif
  }

 private:
  Lookup table_;
#if !(defined(__AVX512F__) && defined(__AVX512BW__))
  alignas(64) float entries_[kVec];
#endif
};

}  // namespace qk::cpu
