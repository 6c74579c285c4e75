// Codes of up to four bits, eight to a 32-bit word of nibbles: the form in which AVX-512 decodes them fastest, one
// shift and one permutation a vector of weights. AVX-512 only.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__)

#include <algorithm>
#include <cstring>

#include "lut_transpose.h"
#include "lut_weights.h"

namespace qk::cpu {

constexpr int kNibbleBits = 4;

// Eight bytes, those at `end` and behind as zero.
inline uint64_t load_eight_bytes(const uint8_t* from, const uint8_t* end) {
  uint64_t word = 0;
  if (end - from >= 8) {
    std::memcpy(&word, from, 8);
  } else {
    std::memcpy(&word, from, static_cast<size_t>(std::max<ptrdiff_t>(end - from, 0)));
  }
  return word;
}

// Codes [begin, begin + count) of the stream, eight a word, an even number of words; nibbles behind the last code are
// unspecified.
template <int Bits>
void nibble_line(const LutWeights& w, int64_t begin, int count, uint32_t* words) {
  static_assert(Bits <= kNibbleBits);
  constexpr uint64_t kFields = 0x1111111111111111u * ((1u << Bits) - 1u);
  int64_t bit = begin * Bits;
  if (Bits == kNibbleBits && bit % 8 == 0) {
    const int whole = count / 8;
    std::memcpy(words, w.packed + bit / 8, static_cast<size_t>(4 * whole));
    if (count % 8 != 0) {
      words[whole] = static_cast<uint32_t>(load_eight_bytes(w.packed + bit / 8 + 4 * whole, w.end()));
    }
    return;
  }
  constexpr int kCodes = Bits < kNibbleBits ? 16 : 8;  // that eight bytes hold, from whatever bit they begin at
  for (int i = 0; i < count; i += kCodes, bit += kCodes * Bits) {
    const uint64_t stream = load_eight_bytes(w.packed + bit / 8, w.end()) >> (bit % 8);
    const uint64_t nibbles = _pdep_u64(stream, kFields);
    std::memcpy(words + i / 8, &nibbles, kCodes / 2);
  }
}

// Codes 8 Part to 8 Part + 7 of the 32 that `Bits` words of each lane hold, spread to nibbles; bits above a code in its
// nibble are unspecified.
template <int Bits, int Part>
QK_HD __m512i spread(const float* words) {
  constexpr int kWord = Part * Bits / 4, kShift = 8 * Part * Bits % 32;
  const auto word = [&](int i) { return _mm512_load_si512(words + (kWord + i) * kVec); };
  __m512i codes = _mm512_srli_epi32(word(0), kShift);
  if constexpr (kShift + 8 * Bits > 32) {
    codes = _mm512_or_si512(codes, _mm512_slli_epi32(word(1), 32 - kShift));
  }
  constexpr int kChoose = 0xca;  // where the first has a bit the second, else the third
  const auto low = [](int mask) { return _mm512_set1_epi32(mask); };
  codes = _mm512_ternarylogic_epi32(low(0x0000ffff), codes, _mm512_slli_epi32(codes, 16 - 4 * Bits), kChoose);
  codes = _mm512_ternarylogic_epi32(low(0x00ff00ff), codes, _mm512_slli_epi32(codes, 8 - 2 * Bits), kChoose);
  return _mm512_ternarylogic_epi32(low(0x0f0f0f0f), codes, _mm512_slli_epi32(codes, 4 - Bits), kChoose);
}

// to[i][l]: word i of sixteen rows that lie `stride` bytes apart; count is a multiple of four.
inline void transpose_streams(const uint8_t* from, ptrdiff_t stride, int count, float* to) {
  int i = 0;
  for (; i + kVec <= count; i += kVec) {
    __m512i rows[kVec];
#pragma GCC unroll 16
    for (int r = 0; r < kVec; ++r) {
      rows[r] = _mm512_loadu_si512(from + r * stride + 4 * i);
    }
    transpose_registers(rows);
#pragma GCC unroll 16
    for (int r = 0; r < kVec; ++r) {
      _mm512_store_si512(to + (i + r) * kVec, rows[r]);
    }
  }
  for (; i < count; i += 4) {
    transpose_words(from + 4 * i, stride, to + i * kVec, kVec);
  }
}

// to[i][l]: word i of row `row` + l, for codes [begin, begin + count); rows past `rows` are code 0.
template <int Bits, int Depth>
void nibble_words(const LutWeights& w, int64_t row, int rows, int64_t begin, int count, float* to) {
  const int64_t row_bits = w.in_features * Bits;
  if (rows == kVec && row_bits % 8 == 0 &&
      count % 128 == 0) {  // four words of the stream hold 32, 64, 128 codes or 128 / 3
    const uint8_t* from = w.packed + row * (row_bits / 8) + begin * Bits / 8;
    alignas(64) float stream[std::max(Depth / 32 * Bits, kVec) * kVec];
    float* words = Bits < kNibbleBits ? stream : to;
    transpose_streams(from, row_bits / 8, count / 32 * Bits, words);
    if constexpr (Bits < kNibbleBits) {
      for (int i = 0; i < count / 32; ++i, words += Bits * kVec, to += 4 * kVec) {
        _mm512_storeu_si512(to, spread<Bits, 0>(words));
        _mm512_storeu_si512(to + kVec, spread<Bits, 1>(words));
        _mm512_storeu_si512(to + 2 * kVec, spread<Bits, 2>(words));
        _mm512_storeu_si512(to + 3 * kVec, spread<Bits, 3>(words));
      }
    }
    return;
  }
  constexpr int kStride = Depth / 8 + 4;
  alignas(64) uint32_t lines[kVec * kStride];
  for (int r = 0; r < kVec; ++r) {
    if (r < rows) {
      nibble_line<Bits>(w, (row + r) * w.in_features + begin, count, lines + r * kStride);
    } else {
      std::fill_n(lines + r * kStride, kStride, 0u);
    }
  }
  for (int i = 0; i < (count + 7) / 8; i += 4) {
    transpose_words(lines + i, kStride * sizeof(uint32_t), to + i * kVec, kVec);
  }
}

// Codes of a row that are looked up together, and whether at most kMostTables tables belong to them.
constexpr int kRun = 128, kMostTables = 16;
inline bool few_tables_a_run(const LutWeights& w) {
  return w.length % w.in_features == 0 ||
         (w.in_features % w.length == 0 && (w.length % kRun == 0 || (kRun % w.length == 0 && w.length % 8 == 0)));
}

// Rows with tables of their own: each is looked up along k, sixteen words at a time, and the results are transposed.
// Lookup is a table made of (centers, levels) that gives 32 bits for the low nibble of a word, or for both nibbles that
// belong together; vector i kSteps + j at to is that of word i after j shifts.
template <int Bits, class Lookup>
void look_up_lines(const LutWeights& w, int64_t row, int rows, int64_t begin, int count, float* to) {
  constexpr int kSteps = Lookup::kSteps;
  const int length = static_cast<int>(std::min<int64_t>(w.length, kRun));  // of a table's codes within a run
  alignas(64) uint32_t lines[kVec][kVec] = {};
  __m512i tables[kMostTables][kVec];
  for (int run = 0; run < count; run += kRun) {
    const int part = std::min(kRun, count - run);
    for (int r = 0; r < rows; ++r) {
      const int64_t code = (row + r) * w.in_features + begin + run;
      nibble_line<Bits>(w, code, part, lines[r]);
      for (int t = 0; t * length < part; ++t) {
        tables[t][r] = Lookup(w.table_of(code + t * length), w.levels).v;
      }
    }
    for (int r = rows; r < kVec; ++r) {
      for (int t = 0; t * length < part; ++t) {
        tables[t][r] = _mm512_setzero_si512();
      }
    }
    for (int j = 0; j < kSteps; ++j) {
      const __m128i shift = _mm_cvtsi32_si128(j * kNibbleBits);
      __m512i values[kVec];
#pragma GCC unroll 16
      for (int r = 0; r < kVec; ++r) {
        values[r] = Lookup::look_up(tables[0][r], _mm512_srl_epi32(_mm512_load_si512(lines[r]), shift));
      }
      for (int t = 1; t * length < part; ++t) {
        const __mmask16 words = static_cast<__mmask16>(0xffffu << (t * length / 8));
#pragma GCC unroll 16
        for (int r = 0; r < kVec; ++r) {
          const __m512i codes = _mm512_srl_epi32(_mm512_load_si512(lines[r]), shift);
          values[r] = _mm512_mask_mov_epi32(values[r], words, Lookup::look_up(tables[t][r], codes));
        }
      }
      transpose_registers(values);
      float* vectors = to + (run / 8 * kSteps + j) * kVec;
#pragma GCC unroll 16
      for (int i = 0; i < kVec; ++i) {
        _mm512_store_si512(vectors + i * kSteps * kVec, values[i]);
      }
    }
  }
}

}  // namespace qk::cpu

#endif
