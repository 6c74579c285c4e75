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
  static constexpr int64_t kBatchBlock = 16;       // rows of x that share transposed words
  static constexpr int64_t kCachedFloats = 98304;  // of tables: what stays in the second level beside W
  static constexpr int64_t kAhead = 65536;         // bytes fetched ahead, in the order of the stream

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
      for (int j = 1; j < kPerTable; ++j) {
        sum = fma(center[j], splat(wide[k + j]), sum);
      }
      store(sum, to);
    }
    for (; k < kCodes; k += kPerTable, to += kVec) {
      store(splat(0.0f), to);
    }
  }

  // Rows [begin, end), in bands of columns whose tables stay in cache.
  template <class T>
  void rows(int64_t begin, int64_t end, const LutCall<T>& call, int64_t first, HighestCode* codes) const {
    const int64_t blocks = (end - begin + kBlockRows - 1) / kBlockRows;
    Scratch<1> scratch(blocks * batch * kBlockRows);
    float* sums = scratch.data();  // [blocks][batch][kBlockRows]
    std::fill_n(sums, blocks * batch * kBlockRows, 0.0f);
    const int64_t band = std::max<int64_t>(kCachedFloats / (batch * kColumnFloats), 1);
    for (int64_t column = 0; column < columns; column += band) {
      const int64_t last = std::min(column + band, columns);
      for (int64_t block = 0; block < blocks; ++block) {
        add_columns(begin + block * kBlockRows, column, last, sums + block * batch * kBlockRows);
      }
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = begin + block * kBlockRows;
      const int count = static_cast<int>(std::min<int64_t>(kBlockRows, end - row));
      write_sums<Bits>(call, sums + block * batch * kBlockRows, kBlockRows, row, count, first, batch, codes);
    }
  }

  void add_columns(int64_t row, int64_t column, int64_t last, float* sums) const {
    const int64_t count = weights.out_features - row;
    const bool in_order = last - column == columns;  // the whole of the rows, so the stream in its order
    for (; column < last; ++column) {
      alignas(64) int32_t words[kGroups][kVec][kVec];  // [group][word][row]
      const uint8_t* from = weights.packed + row * bytes + column * kColumnBytes;
      const int64_t rest = std::min<int64_t>(kColumnBytes, bytes - column * kColumnBytes);
      for (int g = 0; g < kGroups; ++g) {
        const int64_t there = count - g * kVec;
        if (there >= kVec && rest == kColumnBytes) {
          transpose_columns(from + g * kVec * bytes, bytes, words[g][0]);
        } else {
          transpose_some(from + g * kVec * bytes, bytes, std::clamp<int64_t>(there, 0, kVec), rest, words[g][0]);
        }
      }
      const uintptr_t at = reinterpret_cast<uintptr_t>(weights.packed + row * bytes);
      for (int i = 0; i < kBlockRows; ++i) {
        prefetch(in_order ? at + static_cast<uintptr_t>(kAhead + (column * kBlockRows + i) * kColumnBytes)
                          : at + static_cast<uintptr_t>((kBlockRows + i) * bytes + column * kColumnBytes));
      }
      const int used = static_cast<int>((rest + 3) / 4);
      const float* table = tables + column * batch * kColumnFloats;
      for (int64_t b = 0; b < batch;) {
        if (kBatch >= 4 && batch - b >= 4) {
          add_words<std::min(kBatch, 4)>(words, used, table + b * kColumnFloats, sums + b * kBlockRows);
          b += 4;
        } else if (kBatch >= 2 && batch - b >= 2) {
          add_words<std::min(kBatch, 2)>(words, used, table + b * kColumnFloats, sums + b * kBlockRows);
          b += 2;
        } else {
          add_words<1>(words, used, table + b * kColumnFloats, sums + b * kBlockRows);
          b += 1;
        }
      }
    }
  }

  template <int Batch>
  struct Totals {
    Vec of[Batch][kGroups];
  };

  template <int Batch>
  static void add_words(const int32_t (*words)[kVec][kVec], int used, const float* table, float* sums) {
    Totals<Batch> totals;
    for (int b = 0; b < Batch; ++b) {
      for (int g = 0; g < kGroups; ++g) {
        totals.of[b][g] = load(sums + b * kBlockRows + g * kVec);
      }
    }
    Vec one = splat(1.0f);
    pin(one);
    for (int i = 0; i < used; ++i, table += kTablesPerWord * kVec) {
      Ints word[kGroups];
      for (int g = 0; g < kGroups; ++g) {
        word[g] = load(words[g][i]);
        pin(word[g]);
      }
      add_tables<0, Batch>(word, table, one, totals);
    }
    for (int b = 0; b < Batch; ++b) {
      for (int g = 0; g < kGroups; ++g) {
        store(totals.of[b][g], sums + b * kBlockRows + g * kVec);
      }
    }
  }

  // A product with one adds on the ports of multiplication, which are idle here, to the same bits; odd rows of x use
  // those of addition, so that both kinds are busy.
  template <int J, int Batch>
  QK_HD static void add_tables(const Ints* word, const float* table, Vec one, Totals<Batch>& totals) {
    if constexpr (J < kTablesPerWord) {
      Ints index[kGroups];
      for (int g = 0; g < kGroups; ++g) {
        index[g] = shifted_right<4 * J>(word[g]);
      }
      for (int b = 0; b < Batch; ++b) {
        const SixteenSums sixteen(table + b * kColumnFloats + J * kVec);
        for (int g = 0; g < kGroups; ++g) {
          const Vec sum = sixteen[index[g]];
          totals.of[b][g] = b % 2 ? totals.of[b][g] + sum : fma(sum, one, totals.of[b][g]);
        }
      }
      add_tables<J + 1, Batch>(word, table, one, totals);
    }
  }
};

}  // namespace qk::cpu
