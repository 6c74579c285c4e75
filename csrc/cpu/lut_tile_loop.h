// The loops of lut_linear by tiles, for float32 products (lut_tiles.cpp) and for those of bfloat16 pairs
// (lut_bf16.cpp).
//
// x is laid out once a call in 32-bit words, [step][row] for every panel of at most Kind::kTall of its rows; a word is
// a float, or a pair of bfloat16. A task owns 64 rows of W: for every kDepth codes of them it makes the sources of four
// products, sixteen rows each, and multiplies them with all panels, so that x is read from L1 three times of four.
//
// A Kind has: kTall; kDepth, codes of a row in one source, whose products are summed from zero; kSteps, words that
// eight codes take; lay_out(x, K, tall, to); prepare<Bits>(weights, row, rows, begin, count, source); product(source,
// tall).
#pragma once

#include <algorithm>
#include <memory>

#include "bit_stream.h"
#include "code_check.h"
#include "lut_transpose.h"
#include "lut_weights.h"
#include "parallel.h"
#include "simd.h"

namespace qk::cpu {

constexpr int kSourceVectors = 256;      // most vectors of a source: 16 KiB
constexpr int kSources = 4;              // of a task
constexpr int64_t kMostBatchRows = 480;  // rows of x multiplied with a source before the next is made

// What a product reads of W: vectors of weights, or codes and the table they share.
struct LutSource {
  float* vectors;
  bool looked_up;  // vectors are weights
  alignas(64) float table[kVec];
};

// sums[m][lane] (+)= the products of `depth` codes; begins anew where `first`.
using LutProduct = void (*)(const LutSource& source, const float* x, int depth, bool first, float* sums);

// Panels of x, at most `tall` rows each and as even as they can be.
struct Panels {
  int64_t batch, count;
  Panels(int64_t batch_, int tall) : batch(batch_), count((batch_ + tall - 1) / tall) {}
  int64_t begin(int64_t panel) const { return panel * (batch / count) + std::min(panel, batch % count); }
  int tall(int64_t panel) const { return static_cast<int>(begin(panel + 1) - begin(panel)); }
};

template <class T>
struct LutCall {
  LutWeights weights;
  const float* bias;     // null for none
  const T* x;            // [batch, K]
  T* out;                // [batch, N]
  HighestCode* highest;  // null where every code has a center; then the others give NaN
};

// The first `count` lanes.
QK_HD void store_first(Vec a, int count, float* to) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1u), a.v);
#else
  store_some(a, count, to);
#endif
}

// Sixteen words of each of `tall` rows to [16][tall]; the first `steps` of the sixteen.
inline void lay_out_words(const float (*rows)[kVec], int tall, int steps, float* to) {
  alignas(64) float columns[kVec][kVec];
  for (int first = 0; first < tall; first += kVec) {
    for (int i = 0; i < kVec; i += 4) {
      transpose_words(rows[first] + i, sizeof rows[0], columns[i], kVec);
    }
    const int count = std::min(kVec, tall - first);
    for (int i = 0; i < steps; ++i) {
      store_first(load(columns[i]), count, to + i * tall + first);
    }
  }
}

// The highest code of row `row`.
template <int Bits>
int highest_code_of_row(const LutWeights& w, int64_t row) {
  int highest = -1;
  const int64_t begin = row * w.in_features * Bits, end = begin + w.in_features * Bits;
  for (int64_t bit = begin; bit < end; bit += Bits) {
    unsigned word = w.packed[bit / 8];
    if (bit % 8 + Bits > 8) {
      word |= static_cast<unsigned>(w.packed[bit / 8 + 1]) << 8;
    }
    highest = std::max(highest, static_cast<int>((word >> (bit % 8)) & ((1u << Bits) - 1u)));
  }
  return highest;
}

// Sixteen or fewer rows of W: sums [batch][16] to out, from batch row `from` on.
template <int Bits, class T>
void write_sums(const LutCall<T>& call, const float* sums, int64_t row, int rows, int64_t from, int64_t batch) {
  const Vec bias = call.bias ? load_some(call.bias + row, rows) : splat(0.0f);
  T* out = call.out + from * call.weights.out_features + row;
  Mask nan = splat(0.0f) != splat(0.0f);
  for (int64_t b = 0; b < batch; ++b, sums += kVec, out += call.weights.out_features) {
    const Vec sum = load(sums);
    nan = nan | (sum != sum);
    const Vec y = call.bias ? sum + bias : sum;
    if (rows == kVec) {
      store(y, out);
    } else {
      store_some(y, rows, out);
    }
  }
  if (call.highest && any(nan)) {
    for (int r = 0; r < rows; ++r) {
      call.highest->see(highest_code_of_row<Bits>(call.weights, row + r));
    }
  }
}

// Asks for the bytes that hold codes [begin, begin + Depth) of `rows` rows: they come from as many places, which no
// hardware prefetcher sees. Addresses behind the end are not touched.
template <int Bits, int Depth>
void prefetch_codes(const LutWeights& w, int64_t row, int rows, int64_t begin) {
#if defined(__GNUC__)
  for (int64_t r = row; r < std::min(row + rows, w.out_features); ++r) {
    const uint8_t* from = w.packed + (r * w.in_features + begin) * Bits / 8;
    for (int byte = 0; byte < Depth * Bits / 8; byte += 64) {
      __builtin_prefetch(from + byte);
    }
  }
#endif
}

template <class Kind, int Bits, class T>
void run_task(const LutCall<T>& call, int64_t row, int64_t rows, const Panels& panels, int64_t from, const float* x,
              float* scratch) {
  const LutWeights& w = call.weights;
  const int64_t words = (w.in_features + 7) / 8 * Kind::kSteps;  // of a row of x
  const int sources = static_cast<int>((rows + kVec - 1) / kVec);
  LutSource source[kSources];
  float* sums = scratch + kSources * kSourceVectors * kVec;
  const auto rows_of_source = [&](int s) { return static_cast<int>(std::min<int64_t>(kVec, rows - s * kVec)); };
  for (int64_t k = 0; k == 0 || k < w.in_features; k += Kind::kDepth) {
    const int depth = static_cast<int>(std::min<int64_t>(Kind::kDepth, w.in_features - k));
    for (int s = 0; s < sources; ++s) {
      source[s].vectors = scratch + s * kSourceVectors * kVec;
      Kind::template prepare<Bits>(w, row + s * kVec, rows_of_source(s), k, depth, source[s]);
    }
    for (int64_t p = 0; p < panels.count; ++p) {
      const int tall = panels.tall(p);
      const float* panel = x + panels.begin(p) * words + k / 8 * Kind::kSteps * tall;
      for (int s = 0; s < sources; ++s) {
        if (p == 0) {
          const bool more = k + Kind::kDepth < w.in_features;
          prefetch_codes<Bits, Kind::kDepth>(w, row + s * kVec + (more ? 0 : rows), kVec, more ? k + Kind::kDepth : 0);
        }
        Kind::product(source[s], tall)(source[s], panel, depth, k == 0,
                                       sums + (s * panels.batch + panels.begin(p)) * kVec);
      }
    }
  }
  for (int s = 0; s < sources; ++s) {
    write_sums<Bits>(call, sums + s * panels.batch * kVec, row + s * kVec, rows_of_source(s), from, panels.batch);
  }
}

template <class Kind, class T>
void run_tiles(int threads, int64_t bits, const LutCall<T>& call, int64_t batch) {
  const LutWeights& w = call.weights;
  const int64_t words = (w.in_features + 7) / 8 * Kind::kSteps, block = std::min(batch, kMostBatchRows);
  const std::unique_ptr<float[]> memory(new float[static_cast<size_t>(block * words)]);
  float* x = memory.get();
  // Fewer rows a task where there would not be a few tasks for every thread.
  const int64_t sources = (w.out_features + kVec - 1) / kVec;
  const int64_t task = kVec * std::clamp<int64_t>(sources / (4 * threads), 1, kSources);
  for (int64_t from = 0; from < batch; from += block) {
    const Panels panels(std::min(block, batch - from), Kind::kTall);
    parallel_for(threads, panels.count, std::max<int64_t>(kGrain / (Kind::kTall * words + 1), 1),
                 [&](int64_t first, int64_t last) {
                   for (int64_t p = first; p < last; ++p) {
                     Kind::lay_out(call.x + (from + panels.begin(p)) * w.in_features, w.in_features, panels.tall(p),
                                   x + panels.begin(p) * words);
                   }
                 });
    for_bits("lut_linear", bits, [&](auto constant) {
      constexpr int Bits = decltype(constant)::value;
      const int64_t tasks = (w.out_features + task - 1) / task;
      const int64_t grain = std::max<int64_t>(kGrain * kVec / (task * (w.in_features + 1) * panels.batch), 1);
      parallel_for(threads, tasks, grain, [&](int64_t first, int64_t last) {
        const size_t sums = static_cast<size_t>(panels.batch * kSources * kVec);
        const std::unique_ptr<float[]> scratch(new float[kSources * kSourceVectors * kVec + sums + kVec]);
        float* aligned = scratch.get() + (64 - reinterpret_cast<uintptr_t>(scratch.get()) % 64) % 64 / sizeof(float);
        for (int64_t t = first; t < last; ++t) {
          run_task<Kind, Bits>(call, t * task, std::min(task, w.out_features - t * task), panels, from, x, aligned);
        }
      });
    });
  }
}

}  // namespace qk::cpu
