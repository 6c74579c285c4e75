// lut_linear by sums: rows of W along the lanes, one lookup and one addition for four weights of 1 bit or two of 2. For
// one table for all of W.
//
// Four bits of the stream are four or two codes, so that the sixteen sums of their centers times x fit a register:
// built once a call for every row of x, from the true products, the error stays that of a dot product whatever the
// centers are. Words of sixteen rows are transposed on their way in; their shifts are shared by kBatch rows of x, a
// table by kGroups x 16 rows. Bound by reading W at one row of x where the processor is fast enough, else by shift,
// lookup and addition for 64 (32) weights.
//
// The order of a sum: the products of four bits in the order of k, then these sums in the order of k: fixed by K and
// the number of bits.
#pragma once

#include "lut_output.h"
#include "lut_word_columns.h"
#include "lut_words.h"
#include "parallel.h"

namespace qk::cpu {

template <int Bits>
class SumsKernel {
 public:
  // `codes`, if any, sees the codes that may have no center.
  template <class T>
  static void run(int threads, const LutCall<T>& call, HighestCode* codes) {
    const LutWeights& w = call.weights;
    const int64_t bytes = w.in_features / kWordCodes * Bits;
    const int64_t columns = (bytes + kColumnBytes - 1) / kColumnBytes;
    const int64_t most = std::min(call.batch, kBatchBlock);
    Scratch<0> tables(most * columns * kColumnTables * kVec);
    for (int64_t first = 0; first < call.batch; first += kBatchBlock) {
      const int64_t batch = std::min(kBatchBlock, call.batch - first);
      float* built = tables.data();
      parallel_for(threads, columns * batch, std::max<int64_t>(kGrain / (kColumnTables * kVec), 1),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {  // [columns][batch]
                       build(call.x + (first + i % batch) * w.in_features, i / batch, w, built + i * kColumnFloats);
                     }
                   });
      const SumsKernel kernel{w, bytes, columns, batch, built};
      const int64_t blocks = (w.out_features + kBlockRows - 1) / kBlockRows;
      const int64_t cost = std::max<int64_t>(kBlockRows / kVec * columns * kColumnTables * (2 + batch), 1);
      const int64_t grain = std::max<int64_t>(kGrain / cost, (blocks + 4 * threads - 1) / (4 * threads));
      parallel_for(threads, blocks, grain, [&](int64_t begin, int64_t end) {
        kernel.rows(begin * kBlockRows, std::min(end * kBlockRows, w.out_features), call, first, codes);
      });
    }
  }

 private:
#if defined(__AVX512F__) && defined(__AVX512BW__)
  static constexpr int kGroups = 4, kBatch = 4;  // 16 sums, 4 words, 4 indices, a table
#elif defined(__AVX2__) && defined(__FMA__)
  static constexpr int kGroups = 1, kBatch = 2;
#else
  static constexpr int kGroups = 1, kBatch = 1;
#endif
  static constexpr int kBlockRows = kGroups * kVec;
  static constexpr int kPerTable = 4 / Bits;                   // codes
  static constexpr int kTablesPerWord = 8;                     // four bits each
  static constexpr int kColumnTables = kVec * kTablesPerWord;  // sixteen words of a row
  static constexpr int64_t kColumnFloats = kColumnTables * kVec;
  static constexpr int64_t kBlockWords = kBlockRows * kVec;  // of a column
  static constexpr int64_t kBatchBlock = 16;                 // rows of x that share transposed words
  static constexpr int64_t kKeptBlocks = 512 / kBlockRows;
  // Lines are fetched in the order of the stream but used by columns, so a whole block of rows ahead; not more than
  // this.
  static constexpr int64_t kMostAhead = 1 << 18;

  const LutWeights& weights;
  int64_t bytes;    // of a row
  int64_t columns;  // of sixteen words, the last of which may be short
  int64_t batch;
  const float* tables;  // [columns][batch][kColumnTables][16]

  SumsKernel(const LutWeights& weights_, int64_t bytes_, int64_t columns_, int64_t batch_, const float* tables_)
      : weights(weights_), bytes(bytes_), columns(columns_), batch(batch_), tables(tables_) {}

  // Tables of the column's codes; those past the row add nothing.
  template <class T>
  static void build(const T* x, int64_t column, const LutWeights& w, float* to) {
    Vec center[kPerTable];  // lane i: of the code in bits [Bits j, Bits j + Bits) of i
    alignas(64) float value[kVec];
    for (int j = 0; j < kPerTable; ++j) {
      for (int i = 0; i < kVec; ++i) {
        const int code = (i >> (Bits * j)) & ((1 << Bits) - 1);
        value[i] = code < w.levels ? w.centers[code] : kInvalid;
      }
      center[j] = load(value);
    }
    constexpr int kCodes = kColumnTables * kPerTable;
    alignas(64) float wide[kCodes];
    const int64_t begin = column * kCodes, count = std::min<int64_t>(kCodes, w.in_features - begin);
    for (int i = 0; i < count; i += kVec) {
      const int some = static_cast<int>(std::min<int64_t>(kVec, count - i));
      store(some == kVec ? load(x + begin + i) : load_some(x + begin + i, some), wide + i);
    }
    int64_t k = 0;
    for (; k < count; k += kPerTable, to += kVec) {
      Vec sum = center[0] * splat(wide[k]);
      unrolled<kPerTable - 1>([&](auto j) QK_INLINE { sum = fma(center[j + 1], splat(wide[k + j + 1]), sum); });
      store(sum, to);
    }
    for (; k < kCodes; k += kPerTable, to += kVec) {
      store(splat(0.0f), to);
    }
  }

  // Rows [begin, end). For one row of x the stream is read in its order; for more, a column of the words of several
  // blocks is kept so that every table is used on all of them while it is in the first level.
  template <class T>
  void rows(int64_t begin, int64_t end, const LutCall<T>& call, int64_t first, HighestCode* codes) const {
    alignas(64) int32_t words[kKeptBlocks * kBlockWords];
    alignas(64) float sums[kKeptBlocks * kBatchBlock * kBlockRows];  // [blocks][batch][kBlockRows]
    const int64_t step = (batch == 1 ? 1 : kKeptBlocks) * kBlockRows;
    for (int64_t row = begin; row < end; row += step) {
      const int blocks = static_cast<int>((std::min(step, end - row) + kBlockRows - 1) / kBlockRows);
      std::fill_n(sums, blocks * batch * kBlockRows, 0.0f);
      for (int64_t column = 0; column < columns; ++column) {
        for (int i = 0; i < blocks; ++i) {
          load_column(row + i * kBlockRows, column, words + i * kBlockWords);
        }
        add_column(row, column, blocks, words, sums);
      }
      for (int i = 0; i < blocks; ++i) {
        const int64_t at = row + i * kBlockRows;
        const int count = static_cast<int>(std::min<int64_t>(kBlockRows, end - at));
        write_sums<Bits>(call, sums + i * batch * kBlockRows, kBlockRows, at, count, first, batch, codes);
      }
    }
  }

  // words [kGroups][word][row]
  void load_column(int64_t row, int64_t column, int32_t* words) const {
    const uint8_t* from = weights.packed + row * bytes + column * kColumnBytes;
    const int64_t rest = std::min<int64_t>(kColumnBytes, bytes - column * kColumnBytes);
    for (int g = 0; g < kGroups; ++g, from += kVec * bytes, words += kVec * kVec) {
      const int64_t there = weights.out_features - row - g * kVec;
      if (there >= kVec && rest == kColumnBytes) {
        transpose_columns(from, bytes, words);
      } else {
        transpose_some(from, bytes, std::clamp<int64_t>(there, 0, kVec), rest, words);
      }
      if (batch > 1) {  // the next column of these rows
        for (int i = 0; i < kVec; ++i) {
          prefetch(reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(i * bytes + kColumnBytes));
        }
      }
    }
  }

  void add_column(int64_t row, int64_t column, int blocks, const int32_t* words, float* sums) const {
    const int used = static_cast<int>(std::min<int64_t>((bytes - column * kColumnBytes + 3) / 4, kVec));
    const float* table = tables + column * batch * kColumnFloats;
    if (batch == 1) {
      const uintptr_t ahead =
          reinterpret_cast<uintptr_t>(weights.packed + row * bytes) +
          static_cast<uintptr_t>(std::min(kBlockRows * bytes, kMostAhead) + column * kBlockRows * kColumnBytes);
      add_words<1, true>(words, 0, used, table, ahead, sums);
      return;
    }
    const auto add = [&](auto size, int64_t b) {
      constexpr int Batch = std::min(decltype(size)::value, kBatch);
      for (int from = 0; from < used; from += kVec / 2) {
        for (int i = 0; i < blocks; ++i) {
          add_words<Batch, false>(words + i * kBlockWords, from, std::min(from + kVec / 2, used),
                                  table + b * kColumnFloats, 0, sums + (i * batch + b) * kBlockRows);
        }
      }
      return b + Batch;
    };
    for (int64_t b = 0; b < batch;) {
      const int64_t left = batch - b;
      b = left >= 4   ? add(std::integral_constant<int, 4>{}, b)
          : left >= 2 ? add(std::integral_constant<int, 2>{}, b)
                      : add(std::integral_constant<int, 1>{}, b);
    }
  }

  // Words [begin, end) of the column; where kFetch, lines of the stream are fetched, as many a word as there are
  // groups: more at once would wait for each other.
  template <int Batch, bool kFetch>
  static void add_words(const int32_t* words, int begin, int end, const float* table, uintptr_t ahead, float* sums) {
    Vec totals[Batch][kGroups];
    unrolled<Batch>([&](auto b) QK_INLINE {
      unrolled<kGroups>([&](auto g) QK_INLINE { totals[b][g] = load(sums + b * kBlockRows + g * kVec); });
    });
    Vec one = splat(1.0f);
    pin(one);
    table += begin * kTablesPerWord * kVec;
    for (int i = begin; i < end; ++i, table += kTablesPerWord * kVec) {
      Ints word[kGroups];
      unrolled<kGroups>([&](auto g) QK_INLINE {
        word[g] = load(words + (g * kVec + i) * kVec);
        pin(word[g]);
        if constexpr (kFetch) {
          prefetch(ahead);
          ahead += kColumnBytes;
        }
      });
      unrolled<kTablesPerWord>([&](auto j) QK_INLINE {
        Ints index[kGroups];
        unrolled<kGroups>([&](auto g) QK_INLINE { index[g] = shift_right<4 * j>(word[g]); });
        unrolled<Batch>([&](auto b) QK_INLINE {
          const SixteenSums sixteen(table + b * kColumnFloats + j * kVec);
          unrolled<kGroups>([&](auto g) QK_INLINE {
            const Vec sum = sixteen[index[g]];
            // A product with one adds where products are made, on ports that are idle here, to the same bits; every
            // other row of x takes those of addition, so that both are busy.
            totals[b][g] = b % 2 ? totals[b][g] + sum : fma(sum, one, totals[b][g]);
          });
        });
      });
    }
    unrolled<Batch>([&](auto b) QK_INLINE {
      unrolled<kGroups>([&](auto g) QK_INLINE { store(totals[b][g], sums + b * kBlockRows + g * kVec); });
    });
  }
};

}  // namespace qk::cpu
