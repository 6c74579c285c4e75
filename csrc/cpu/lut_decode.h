// Sixteen codes of the bit stream at a time, and the table they index, on every instruction set.
//
// A CodeWindow holds, for a bit offset of 0 to 7 in the first byte, which bytes every lane needs and by how much it
// shifts them. The code is then in the low bits of its lane; bits above it may be of the codes behind it, which
// CodeTable ignores: a table of fewer entries than a register has is repeated. Codes
// that have no center give NaN.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>

#include "simd_bits.h"

namespace qk::cpu {

constexpr int kMaxEntries = 256;

// Zeros come in from above.
template <int Count>
QK_HD Ints shift_right(const Ints& a) {
  if constexpr (Count == 0) {
    return a;  // gcc 12 would shift
  } else {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return {_mm512_srli_epi32(a.v, Count)};
#elif defined(__AVX2__) && defined(__FMA__)
    return {_mm256_srli_epi32(a.low, Count), _mm256_srli_epi32(a.high, Count)};
#else
    return each_lane<Ints>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) >> Count); });
#endif
  }
}

#if defined(__AVX512F__) && defined(__AVX512BW__)

// Lane l begins at bit `Stride` l of the window.
template <int Stride>
struct CodeWindow {
  static constexpr int kBytes = 2 * Stride + 1;  // sixteen lanes, and what an offset adds
  __m512i words, shifts;

  explicit CodeWindow(int offset) {
    alignas(64) uint16_t word[32];
    alignas(64) int32_t shift[16];
    for (int l = 0; l < kVec; ++l) {
      const int bit = l * Stride + offset;
      word[2 * l] = static_cast<uint16_t>(bit / 16);
      word[2 * l + 1] = static_cast<uint16_t>(bit / 16 + 1);
      shift[l] = bit % 16;
    }
    words = _mm512_load_si512(word);
    shifts = _mm512_load_si512(shift);
  }

  // The window at `from`, of which the bytes before `end` are read.
  QK_HD Ints load(const uint8_t* from, const uint8_t* end) const {
    const int count = static_cast<int>(std::min<ptrdiff_t>(std::min(kBytes, 32), end - from));
    const __mmask32 inside = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    const __m512i bytes = _mm512_zextsi256_si512(_mm256_maskz_loadu_epi8(inside, from));
    return {_mm512_srlv_epi32(_mm512_permutexvar_epi16(words, bytes), shifts)};
  }
};

template <int Bits>
struct CodeTable {
  static constexpr int kEntries = 1 << Bits;
  static constexpr int kRegisters = kEntries > kVec ? kEntries / kVec : 1;
  __m512 v[kRegisters];

  CodeTable(const float* centers, int levels) {
    for (int r = 0; r < kRegisters; ++r) {
      const int count = std::max(0, std::min(levels - r * kVec, kVec));
      const __m512 none = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
      v[r] = _mm512_mask_loadu_ps(none, static_cast<__mmask16>((1u << count) - 1u), centers + r * kVec);
    }
    if constexpr (kEntries < kVec) {
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      v[0] = _mm512_permutexvar_ps(_mm512_and_si512(lane, _mm512_set1_epi32(kEntries - 1)), v[0]);
    }
  }

  // Entries [32 first, 32 (first + count)), the index's bits from 5 up choosing among them.
  template <int First, int Count>
  QK_HD __m512 among(__m512i index) const {
    if constexpr (Count == 1) {
      return _mm512_permutex2var_ps(v[2 * First], index, v[2 * First + 1]);
    } else {
      const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(16 * Count));
      return _mm512_mask_blend_ps(upper, among<First, Count / 2>(index), among<First + Count / 2, Count / 2>(index));
    }
  }

  QK_HD Vec operator[](Ints index) const {
    if constexpr (kRegisters == 1) {
      return {_mm512_permutexvar_ps(index.v, v[0])};
    } else {
      return {among<0, kRegisters / 2>(index.v)};
    }
  }
};

#else

#if defined(__AVX2__) && defined(__FMA__)

template <int Bits>
struct CodeWindow {
  __m256i bytes, shifts;

  explicit CodeWindow(int offset) {
    alignas(32) uint8_t byte[32];
    alignas(32) int32_t shift[8];
    for (int l = 0; l < 8; ++l) {
      const int bit = l * Bits + offset;
      for (int i = 0; i < 4; ++i) {
        byte[4 * l + i] = static_cast<uint8_t>(bit / 8 + i < 16 ? bit / 8 + i : 0x80);  // 0x80 gives zero
      }
      shift[l] = bit % 8;
    }
    bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(byte));
    shifts = _mm256_load_si256(reinterpret_cast<const __m256i*>(shift));
  }

  QK_HD __m256i eight(const uint8_t* from, const uint8_t* end) const {
    __m128i chunk;
    if (end - from >= 16) {
      chunk = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    } else {
      alignas(16) uint8_t whole[16] = {};
      std::memcpy(whole, from, static_cast<size_t>(std::max<ptrdiff_t>(end - from, 0)));
      chunk = _mm_load_si128(reinterpret_cast<const __m128i*>(whole));
    }
    return _mm256_srlv_epi32(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(chunk), bytes), shifts);
  }
  QK_HD Ints load(const uint8_t* from, const uint8_t* end) const {
    return {eight(from, end), eight(from + std::min<ptrdiff_t>(Bits, end - from), end)};
  }
};

#else

template <int Bits>
struct CodeWindow {
  int offset;

  explicit CodeWindow(int offset_) : offset(offset_) {}

  QK_HD Ints load(const uint8_t* from, const uint8_t* end) const {
    Ints codes;
    for (int l = 0; l < kVec; ++l) {
      const int bit = l * Bits + offset;
      const uint8_t* at = from + bit / 8;
      const unsigned low = at < end ? at[0] : 0u, high = at + 1 < end ? at[1] : 0u;
      codes.lane[l] = static_cast<int32_t>((low | high << 8) >> (bit % 8));
    }
    return codes;
  }
};

#endif

template <int Bits>
struct CodeTable {
  static constexpr int kEntries = 1 << Bits;
  alignas(64) float entries[kEntries < kVec ? kVec : kEntries];

  CodeTable(const float* centers, int levels) {
    std::fill(std::copy_n(centers, std::min(levels, kEntries), entries), std::end(entries),
              std::numeric_limits<float>::quiet_NaN());
    for (int i = kEntries; i < kVec; ++i) {
      entries[i] = entries[i - kEntries];
    }
  }

#if defined(__AVX2__) && defined(__FMA__)
  QK_HD __m256 half(__m256i index) const {
    if constexpr (Bits <= 4) {
      const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(entries), index);
      if constexpr (Bits < 4) {
        return low;
      }
      const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(entries + 8), index);
      return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // bit 3 as the sign
    } else {
      return _mm256_i32gather_ps(entries, _mm256_and_si256(index, _mm256_set1_epi32(kEntries - 1)), 4);
    }
  }
  QK_HD Vec operator[](Ints index) const { return {half(index.low), half(index.high)}; }
#else
  QK_HD Vec operator[](const Ints& index) const {
    return each_lane<Vec>([&](int i) { return entries[index.lane[i] & (kEntries - 1)]; });
  }
#endif
};

#endif

}  // namespace qk::cpu
