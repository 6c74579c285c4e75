// dequantize_panel: sixteen rows of W in float32, the rows along the lanes: what the products of lut_tiles.cpp read.
//
// Where sixteen rows share a table and begin on a byte, the packed words are transposed and looked up where they are
// (about 3 instructions a vector of weights at 4 bits). Everywhere else each row is decoded along k, whatever its bit
// offset and its groups, and the weights are transposed (about 8). Bound by instructions; the bytes read are few.
#pragma once

#include <algorithm>
#include <utility>

#include "lut_decode.h"
#include "lut_transpose.h"
#include "lut_weights.h"

namespace qk::cpu {

constexpr int kDepth = 256;       // codes of a row in one panel; sums of products begin anew at its multiples
constexpr int kStripDepth = 128;  // codes of a row decoded before they are transposed: 16 rows stay in half of L1

template <int Bits>
const CodeWindow<Bits>& window_at(int offset) {
  static const CodeWindow<Bits> windows[8] = {CodeWindow<Bits>(0), CodeWindow<Bits>(1), CodeWindow<Bits>(2),
                                              CodeWindow<Bits>(3), CodeWindow<Bits>(4), CodeWindow<Bits>(5),
                                              CodeWindow<Bits>(6), CodeWindow<Bits>(7)};
  return windows[offset];
}

// Codes [begin, begin + count) of the stream to floats; up to 15 more are written.
template <int Bits>
void dequantize_run(const LutWeights& w, int64_t begin, int count, float* to) {
  for (int done = 0; done < count;) {
    const int64_t code = begin + done;
    const int part = static_cast<int>(std::min<int64_t>(count - done, w.length - code % w.length));
    const CodeTable<Bits> table(w.table_of(code), w.levels);
    const CodeWindow<Bits> window = window_at<Bits>(static_cast<int>(code * Bits % 8));
    const uint8_t* from = w.packed + code * Bits / 8;
    for (int i = 0; i < part; i += kVec, from += 2 * Bits) {
      store(table[window.load(from, w.end())], to + done + i);
    }
    done += part;
  }
}

template <int Bits>
void dequantize_any(const LutWeights& w, int64_t row, int rows, int64_t begin, int count, float* to) {
  constexpr int kStride = kStripDepth + kVec;
  alignas(64) float strip[kVec * kStride];
  for (int first = 0; first < count; first += kStripDepth) {
    const int part = std::min(kStripDepth, count - first), whole = (part + 7) / 8 * 8;
    for (int r = 0; r < kVec; ++r) {
      float* line = strip + r * kStride;
      if (r < rows) {
        dequantize_run<Bits>(w, (row + r) * w.in_features + begin + first, part, line);
      }
      std::fill(line + (r < rows ? part : 0), line + whole, 0.0f);
    }
    for (int k = 0; k < whole; k += 4) {
      transpose_words(strip + k, kStride * sizeof(float), to + (first + k) * kVec, kVec);
    }
  }
}

// Code T of the 32 that `Bits` words hold, in the low bits.
template <int Bits, int T>
QK_HD Ints code_of_words(const float* words) {
  constexpr int kWord = T * Bits / 32, kShift = T * Bits % 32;
  const Ints low = shift_right<kShift>(bits_of(load(words + kWord * kVec)));
  if constexpr (kShift + Bits > 32) {
    return low | shift_left<32 - kShift>(bits_of(load(words + (kWord + 1) * kVec)));
  } else {
    return low;
  }
}

template <int Bits, int... T>
QK_HD void look_up_words(const CodeTable<Bits>& table, const float* words, float* to,
                         std::integer_sequence<int, T...>) {
  (store(table[code_of_words<Bits, T>(words)], to + T * kVec), ...);
}

template <int Bits>
void dequantize_shared(const LutWeights& w, int64_t row, int64_t begin, float* to) {
  constexpr int kWords = kDepth / 32 * Bits;
  alignas(64) float words[kWords * kVec];
  const ptrdiff_t row_bytes = w.in_features * Bits / 8;
  const uint8_t* from = w.packed + row * row_bytes + begin * Bits / 8;
  for (int i = 0; i < kWords; i += 4) {
    transpose_words(from + 4 * i, row_bytes, words + i * kVec, kVec);
  }
  const CodeTable<Bits> table(w.table_of(row * w.in_features), w.levels);
  for (int i = 0; i < kDepth / 32; ++i) {
    look_up_words(table, words + i * Bits * kVec, to + 32 * i * kVec, std::make_integer_sequence<int, 32>{});
  }
}

// Whether rows [row, row + rows) have one table in all.
inline bool shares_table(const LutWeights& w, int64_t row, int rows) {
  return row * w.in_features / w.length == ((row + rows) * w.in_features - 1) / w.length;
}

// Codes [begin, begin + count) of `rows` rows from `row` on, count <= kDepth: vector i at to + 16 i. Rows that are
// missing of sixteen are zero, as are the vectors up to a multiple of eight.
template <int Bits>
void dequantize_panel(const LutWeights& w, int64_t row, int rows, int64_t begin, int count, float* to) {
  const bool shared = rows == kVec && count == kDepth && w.in_features * Bits % 8 == 0 && shares_table(w, row, rows);
  if (shared) {
    dequantize_shared<Bits>(w, row, begin, to);
  } else {
    dequantize_any<Bits>(w, row, rows, begin, count, to);
  }
}

}  // namespace qk::cpu
