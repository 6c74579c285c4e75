// lut_linear by rows of W: codes along the lanes, looked up in a register and multiplied with x. For 1 to 4 bits and
// any table a row or a part of it has; few rows of x, each of which costs another product for every weight.
//
// A chunk of 128 codes is loaded once and shifted seven times; x is laid out to match, [chunk][8][16], once a call.
// kRows rows share the loads of x, kBatch rows of x the looked-up weights. Bound by reading W at one row of x where the
// processor is fast enough, else by the shift, lookup and product for sixteen weights; by the products from four rows
// of x on.
//
// The order of a sum: lane l adds codes k with k / 8 % 16 = l in ascending order, then halves of the lanes are added:
// fixed by K alone.
#pragma once

#include "lut_output.h"
#include "lut_words.h"
#include "parallel.h"

namespace qk::cpu {

template <int Bits, bool kPermuted = false>
class RowsKernel {
 public:
  // `codes`, if any, sees the codes that may have no center.
  template <class T>
  static void run(int threads, const LutCall<T>& call, HighestCode* codes) {
    if constexpr (Bits == 3 && !kPermuted) {
      if (has_byte_permutation()) {
        RowsKernel<Bits, true>::run(threads, call, codes);
        return;
      }
    }
    const LutWeights& w = call.weights;
    const int64_t chunks = (w.in_features + kChunkCodes - 1) / kChunkCodes;
    Scratch<0> laid_out(std::min(call.batch, kBatchBlock) * chunks * kChunkCodes);
    for (int64_t first = 0; first < call.batch; first += kBatchBlock) {
      const int64_t batch = std::min(kBatchBlock, call.batch - first);
      float* x = laid_out.data();
      const int64_t per_task = std::max<int64_t>(kGrain / (4 * kChunkCodes), 1);
      parallel_for(threads, batch * chunks, per_task, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          lay_out(call.x + (first + i / chunks) * w.in_features, i % chunks, w.in_features, x + i * kChunkCodes);
        }
      });
      const RowsKernel kernel{w, chunks, x};
      const int64_t blocks = (w.out_features + kBlockRows - 1) / kBlockRows;
      const int64_t cost = std::max<int64_t>(kBlockRows * w.in_features / kVec * (2 + batch), 1);
      const int64_t grain = std::max<int64_t>(kGrain / cost, (blocks + 4 * threads - 1) / (4 * threads));
      parallel_for(threads, blocks, grain, [&](int64_t begin, int64_t end) {
        kernel.fetch_ahead(begin * kBlockRows);
        for (int64_t block = begin; block < end; ++block) {
          alignas(64) float sums[kBatchBlock * kBlockRows];
          const int64_t row = block * kBlockRows;
          const int count = static_cast<int>(std::min<int64_t>(kBlockRows, w.out_features - row));
          kernel.block(row, count, batch, sums);
          write_sums<Bits>(call, sums, kBlockRows, row, count, first, batch, codes);
        }
      });
    }
  }

 private:
  static constexpr int64_t kBatchBlock = 16;  // rows of x laid out at a time
  static constexpr int kBlockRows = 64;       // rows of W that stay in cache while all of these pass
  static constexpr int64_t kAhead = 16384;    // bytes fetched ahead, in the order of the stream
#if defined(__AVX512F__) && defined(__AVX512BW__)
  static constexpr int kRows = 4, kBatch = 4;  // 16 sums, 4 tables, 4 words, 4 weights, one x
#elif defined(__AVX2__) && defined(__FMA__)
  static constexpr int kRows = 2, kBatch = 2;
#else
  static constexpr int kRows = 1, kBatch = 2;
#endif

  const LutWeights& weights;
  int64_t chunks;
  const float* x;  // [batch][chunks][8][16]

  RowsKernel(const LutWeights& weights_, int64_t chunks_, const float* x_)
      : weights(weights_), chunks(chunks_), x(x_) {}

  // Position j, lane l is x[8 l + j] of the chunk, zero past the end.
  template <class T>
  static void lay_out(const T* x, int64_t chunk, int64_t in_features, float* to) {
    alignas(64) float values[kChunkCodes];
    const int64_t begin = chunk * kChunkCodes;
    for (int i = 0; i < kChunkCodes; i += kVec) {
      const int64_t some = std::clamp<int64_t>(in_features - begin - i, 0, kVec);
      store(some == kVec ? load(x + begin + i) : load_some(x + begin + (some ? i : 0), static_cast<int>(some)),
            values + i);
    }
    for (int j = 0; j < kWordCodes; ++j) {
      for (int l = 0; l < kVec; ++l) {
        to[j * kVec + l] = values[l * kWordCodes + j];
      }
    }
  }

  int64_t row_bytes() const { return weights.in_features / kWordCodes * Bits; }
  const uint8_t* row_at(int64_t row) const { return weights.packed + row * row_bytes(); }

  void fetch_ahead(int64_t row) const {
    const uintptr_t from = reinterpret_cast<uintptr_t>(row_at(row));
    for (int64_t i = 0; i < kAhead; i += 64) {
      prefetch(from + static_cast<uintptr_t>(i));
    }
  }

  // sums [batch][kBlockRows] of `count` rows.
  void block(int64_t row, int count, int64_t batch, float* sums) const {
    for (int64_t b = 0; b < batch;) {
      const int64_t left = batch - b;
      if (kBatch >= 4 && left >= 4) {
        block_of<std::min(kBatch, 4)>(row, count, b, sums);
        b += 4;
      } else if (left >= 2) {
        block_of<2>(row, count, b, sums);
        b += 2;
      } else {
        block_of<1>(row, count, b, sums);
        b += 1;
      }
    }
  }

  template <int Batch>
  void block_of(int64_t row, int count, int64_t b, float* sums) const {
    int i = 0;
    for (; i + kRows <= count; i += kRows) {
      dot_rows<kRows, Batch>(row + i, b, sums + b * kBlockRows + i);
    }
    for (; i < count; ++i) {
      dot_rows<1, Batch>(row + i, b, sums + b * kBlockRows + i);
    }
  }

  // sums[b][row] of Rows rows of W and Batch rows of x.
  template <int Rows, int Batch>
  void dot_rows(int64_t row, int64_t b, float* sums) const {
    const int64_t stride = row_bytes(), whole = weights.in_features / kChunkCodes;
    const int64_t segment = std::max<int64_t>(std::min(weights.length / kChunkCodes, whole), 1);  // chunks to a table
    const int64_t x_stride = chunks * kChunkCodes;
    const uint8_t* from = row_at(row);
    const float* at = x + b * x_stride;
    uintptr_t ahead = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(kAhead);
    Vec totals[Rows][Batch];
    unrolled<Rows>([&](auto r) QK_INLINE { unrolled<Batch>([&](auto i) QK_INLINE { totals[r][i] = splat(0.0f); }); });
    // One chunk; `inside` tells the lanes that have codes where kMasked.
    const auto add_chunk = [&](const auto& tables, auto load_row, auto masked, const Mask& inside) QK_INLINE {
      Ints words[Rows];
      unrolled<Rows>([&](auto r) QK_INLINE {
        words[r] = load_row(from + r * stride);
        pin(words[r]);
      });
      unrolled<kWordCodes>([&](auto j) QK_INLINE {
        Vec weight[Rows];
        unrolled<Rows>([&](auto r) QK_INLINE {
          weight[r] = tables[r][shift_right<Bits * j>(words[r])];
          if constexpr (masked) {
            weight[r] = keep(inside, weight[r]);
          }
        });
        unrolled<Batch>([&](auto i) QK_INLINE {
          Vec factor = load(at + i * x_stride + j * kVec);
          pin(factor);
          unrolled<Rows>([&](auto r) QK_INLINE { totals[r][i] = fma(weight[r], factor, totals[r][i]); });
        });
      });
    };
    const int rest = static_cast<int>(weights.in_features % kChunkCodes) / kWordCodes;
    for (int64_t chunk = 0; chunk < whole || (chunk == whole && rest);) {
      CenterTable<Bits> tables[Rows];
      unrolled<Rows>([&](auto r) QK_INLINE {
        tables[r].fill(weights.table_of((row + r) * weights.in_features + chunk * kChunkCodes), weights.levels);
      });
      if (chunk == whole) {
        add_chunk(
            tables, [&](const uint8_t* some) QK_INLINE { return load_some_words<Bits>(some, rest * Bits); },
            std::true_type{}, first_lanes(rest));
        break;
      }
      for (const int64_t end = std::min(chunk + segment, whole); chunk < end;
           ++chunk, from += kVec * Bits, at += kChunkCodes) {
        for (int i = 0; i < Rows * kVec * Bits; i += 64, ahead += 64) {
          prefetch(ahead);
        }
        add_chunk(
            tables, [](const uint8_t* all) QK_INLINE { return load_words<Bits, kPermuted>(all); }, std::false_type{},
            Mask{});
      }
    }
    unrolled<Rows>([&](auto r) QK_INLINE {
      unrolled<Batch>([&](auto i) QK_INLINE { sums[i * kBlockRows + r] = sum_of(totals[r][i]); });
    });
  }
};

}  // namespace qk::cpu
