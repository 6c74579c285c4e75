// Which kernel lut_linear runs for a batch: the one place that knows the crossovers.
//
// Within a regime a row's sum has one order, whatever batch it comes in; batch_invariant pins one regime for all.
#pragma once

#include <cstdint>

#include "lut_weights.h"

namespace qk::cpu {

void set_batch_invariant(bool pinned);  // for the whole process
bool batch_invariant();

enum class LutForm { sums, rows, tiles, pairs };

constexpr int kWordCodes = 8;     // codes that fill whole bytes
constexpr int kChunkCodes = 128;  // codes that rows look up in one table

// Sums: 1 or 2 bits, one table for all of W, rows that start on a byte.
inline bool sums_fit(const LutWeights& w, int64_t bits) {
  return bits <= 2 && w.in_features % kWordCodes == 0 && w.length == w.in_features * w.out_features;
}

// Rows: up to 4 bits, rows that start on a byte, tables that change with a row or between the chunks of one.
inline bool rows_fit(const LutWeights& w, int64_t bits) {
  const bool by_row = w.length % w.in_features == 0;
  return bits <= 4 && w.in_features % kWordCodes == 0 &&
         (by_row || (w.in_features % w.length == 0 && w.length % kChunkCodes == 0));
}

// The largest batch at which a kernel is faster than tiles, for 0 to 4 bits: sums, rows where one table serves all of
// W, rows where each has its own. Measured on one thread of an EPYC (Zen 4), 4096 codes a row, batches 1 to 64. With
// AVX-512 rows win by little at the larger ones; AVX2 and portable crossovers lie between batches 1, 4, 16 and 64.
constexpr int64_t kAny = INT64_MAX;
#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int64_t kMostSums[5] = {0, kAny, kAny};
constexpr int64_t kMostRowsShared[5] = {0, kAny, kAny, kAny, kAny};
constexpr int64_t kMostRowsOwn[5] = {0, kAny, kAny, kAny, kAny};
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int64_t kMostSums[5] = {0, kAny, 0};
constexpr int64_t kMostRowsShared[5] = {0, 5, 5, 4, 3};
constexpr int64_t kMostRowsOwn[5] = {0, 20, 20, 16, 8};
#else
constexpr int64_t kMostSums[5] = {0, kAny, kAny};
constexpr int64_t kMostRowsShared[5] = {0, kAny, 3, 3, kAny};
constexpr int64_t kMostRowsOwn[5] = {0, kAny, 12, 15, kAny};
#endif

// Rows of x from which pairs of bfloat16 are faster where sixteen rows of W share a table; sums of 1 bit always are.
constexpr int64_t kFewestPairs = 4;

// pairs: whether tiles can multiply pairs of bfloat16.
inline LutForm lut_form(const LutWeights& w, int64_t bits, int64_t batch, bool pairs) {
  const bool empty = w.in_features * w.out_features * batch == 0;
  const int64_t least = batch_invariant() ? 1 : batch;  // what one row of x gets is for all
  const bool sixteen_rows = w.length >= 16 * w.in_features;
  if (pairs && sixteen_rows && least >= kFewestPairs && !(bits == 1 && sums_fit(w, bits))) {
    return LutForm::pairs;
  }
  if (!empty && sums_fit(w, bits) && least <= kMostSums[bits]) {
    return LutForm::sums;
  }
  const bool one_table = w.length == w.in_features * w.out_features;
  if (!empty && rows_fit(w, bits) && least <= (one_table ? kMostRowsShared : kMostRowsOwn)[bits]) {
    return LutForm::rows;
  }
  return pairs ? LutForm::pairs : LutForm::tiles;
}

}  // namespace qk::cpu
