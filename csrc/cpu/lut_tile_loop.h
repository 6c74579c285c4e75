// The loops of lut_linear by tiles, for float32 products (lut_tiles.cpp) and for those of bfloat16 pairs
// (lut_bf16.cpp).
//
// x is laid out once a call in 32-bit words, [step][row] for every panel of at most Kind::kTall of its rows; a word is
// a float, or a pair of bfloat16. A task owns 64 rows of W: for every kDepth codes of them it makes the sources of four
// products, sixteen rows each, and multiplies them with all panels, so that x is read from L1 three times of four.
//
// A Kind has: kTall; kDepth, codes of a row in one source, whose products are summed from zero; kSteps, words that
// eight codes take; lay_out(x, K, tall, to); prepare<Bits>(weights, row, rows, begin, count, source); and
// multiply(sources, how many are left, tall, x, depth, first, sums, the distance between the sums of two sources),
// which tells how many it did.
#pragma once

#include <algorithm>

#include "bit_stream.h"
#include "lut_output.h"
#include "lut_transpose.h"
#include "parallel.h"
#include "simd.h"

namespace qk::cpu {

constexpr int kSourceVectors = 256;      // most vectors of a source: 16 KiB
constexpr int kSources = 4;              // of a task
constexpr int64_t kMostBatchRows = 480;  // rows of x multiplied with a source before the next is made

// What a product reads of W: vectors of weights, or codes and the table they share.
struct LutSource {
  float* vectors;
  bool looked_up;     // vectors are weights
  const void* ahead;  // the bytes of the next source, in sixteen rows `apart` bytes apart
  ptrdiff_t apart;
  alignas(64) float table[kVec];
};

// A product asks for one line of the next source every eight codes. They lie in as many places as there are rows, which
// no hardware prefetcher sees, and more requests at once than there are buffers for misses would hold the products up.
// An address behind the end of the codes is only asked for.
QK_HD void prefetch_ahead(const LutSource& source, int codes) {
#if defined(__GNUC__)
  const ptrdiff_t eight = codes / 8;
  __builtin_prefetch(static_cast<const char*>(source.ahead) + eight % kVec * source.apart + eight / kVec * 64);
#endif
}

// sums[m][lane] (+)= the products of `depth` codes; begins anew where `first`.
using LutProduct = void (*)(const LutSource& source, const float* x, int depth, bool first, float* sums);

// Panels of x, at most `tall` rows each and as even as they can be.
struct Panels {
  int64_t batch, count;
  Panels(int64_t batch_, int tall) : batch(batch_), count((batch_ + tall - 1) / tall) {}
  int64_t begin(int64_t panel) const { return panel * (batch / count) + std::min(panel, batch % count); }
  int tall(int64_t panel) const { return static_cast<int>(begin(panel + 1) - begin(panel)); }
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
        source[s].ahead = source[s].vectors;
        source[s].apart = 0;
        if (p == 0) {
          const int64_t next = k + Kind::kDepth < w.in_features ? k + Kind::kDepth : rows * w.in_features;
          source[s].ahead = w.packed + ((row + s * kVec) * w.in_features + next) * Bits / 8;
          source[s].apart = w.in_features * Bits / 8;
        }
      }
      const ptrdiff_t apart = panels.batch * kVec;
      for (int s = 0; s < sources;) {
        float* to = sums + s * apart + panels.begin(p) * kVec;
        s += Kind::multiply(source + s, sources - s, tall, panel, depth, k == 0, to, apart);
      }
    }
  }
  for (int s = 0; s < sources; ++s) {
    write_sums<Bits>(call, sums + s * panels.batch * kVec, kVec, row + s * kVec, rows_of_source(s), from, panels.batch,
                     nullptr);
  }
}

template <class Kind, class T>
void run_tiles(int threads, int64_t bits, const LutCall<T>& call) {
  const LutWeights& w = call.weights;
  const int64_t words = (w.in_features + 7) / 8 * Kind::kSteps, block = std::min(call.batch, kMostBatchRows);
  Scratch<2> laid_out(block * words);
  float* x = laid_out.data();
  // Fewer rows a task where there would not be a few tasks for every thread.
  const int64_t sources = (w.out_features + kVec - 1) / kVec;
  const int64_t task = kVec * std::clamp<int64_t>(sources / (4 * threads), 1, kSources);
  for (int64_t from = 0; from < call.batch; from += block) {
    const Panels panels(std::min(block, call.batch - from), Kind::kTall);
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
        Scratch<3> scratch(kSources * (kSourceVectors + panels.batch) * kVec);
        for (int64_t t = first; t < last; ++t) {
          run_task<Kind, Bits>(call, t * task, std::min(task, w.out_features - t * task), panels, from, x,
                               scratch.data());
        }
      });
    });
  }
}

}  // namespace qk::cpu
