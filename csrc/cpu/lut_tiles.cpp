// lut_linear by tiles in float32. Rows along the lanes: a product multiplies sixteen weights of one k with one x for as
// many rows of x as there are registers for sums.
//
// Where sixteen rows share a table of at most sixteen entries, AVX-512 keeps it in a register and looks each weight up
// on its way into the product, a shift and a permutation beside up to 24 fused multiply-adds that run on other ports;
// elsewhere weights are dequantised to L1 first. Bound by fused multiply-adds.
//
// The order of a sum is k = 0, 1, ... within 256 codes from zero, then the sums of these in order: fixed by K alone,
// whatever the batch, the groups, the blocking, N or the number of threads.

#include "lut_tiles.h"

#include <array>
#include <limits>
#include <utility>

#include "lut_dequantize.h"
#include "lut_nibbles.h"
#include "lut_tile_loop.h"

namespace qk::cpu {
namespace {

// Registers: kTall sums and a vector of weights.
#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kMostTall = 24;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kMostTall = 6;
#else
constexpr int kMostTall = 2;
#endif

template <int Tall>
QK_HD void add_sums(const Vec (&total)[Tall], bool first, float* sums) {
#pragma GCC unroll 32
  for (int m = 0; m < Tall; ++m) {
    store(first ? total[m] : load(sums + m * kVec) + total[m], sums + m * kVec);
  }
}

template <int Tall>
QK_HD void multiply_add(const float* x, Vec weight, Vec (&total)[Tall]) {
#pragma GCC unroll 32
  for (int m = 0; m < Tall; ++m) {
    total[m] = fma(splat(x[m]), weight, total[m]);
  }
}

template <int Tall>
QK_HD void clear(Vec (&total)[Tall]) {
#pragma GCC unroll 32
  for (int m = 0; m < Tall; ++m) {
    total[m] = splat(0.0f);
  }
}

template <int Tall>
void multiply_vectors(const LutSource& source, const float* x, int depth, bool first, float* sums) {
  Vec total[Tall];
  clear(total);
  for (int k = 0; k < depth; ++k, x += Tall) {
    if (k % 8 == 0) {
      prefetch_ahead(source, k);
    }
    multiply_add(x, load(source.vectors + k * kVec), total);
  }
  add_sums(total, first, sums);
}

template <int Tall>
void look_up_and_multiply(const LutSource& source, const float* x, int depth, bool first, float* sums) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  const __m512 table = _mm512_load_ps(source.table);
  Vec total[Tall];
  clear(total);
  for (int k = 0; k < depth; k += 8) {
    prefetch_ahead(source, k);
    __m512i words = _mm512_loadu_si512(source.vectors + k / 8 * kVec);
    const int count = std::min(8, depth - k);
    for (int i = 0; i < count; ++i, x += Tall) {
      multiply_add(x, {_mm512_permutexvar_ps(words, table)}, total);
      words = _mm512_srli_epi32(words, kNibbleBits);
    }
  }
  add_sums(total, first, sums);
#else
  multiply_vectors<Tall>(source, x, depth, first, sums);
#endif
}

template <int... Tall>
constexpr std::array<LutProduct, sizeof...(Tall)> products(bool looked_up, std::integer_sequence<int, Tall...>) {
  return {(looked_up ? multiply_vectors<Tall + 1> : look_up_and_multiply<Tall + 1>)...};
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
struct FloatLookup {
  static constexpr int kSteps = 8;
  __m512i v;
  FloatLookup(const float* centers, int levels)
      : v(_mm512_castps_si512(CodeTable<kNibbleBits>(centers, levels).v[0])) {}
  QK_HD static __m512i look_up(__m512i table, __m512i words) { return _mm512_permutexvar_epi32(words, table); }
};
#endif

struct FloatProducts {
  static constexpr int kTall = kMostTall, kDepth = kSourceVectors, kSteps = 8;

  template <class T>
  static void lay_out(const T* x, int64_t in_features, int tall, float* to) {
    alignas(64) float rows[(kTall + kVec - 1) / kVec * kVec][kVec] = {};
    for (int64_t k = 0; k < in_features; k += kVec, to += kVec * tall) {
      const int count = static_cast<int>(std::min<int64_t>(kVec, in_features - k));
      for (int m = 0; m < tall; ++m) {
        const T* from = x + m * in_features + k;
        store(count == kVec ? load(from) : load_some(from, count), rows[m]);
      }
      lay_out_words(rows, tall, count, to);
    }
  }

  template <int Bits>
  static void prepare(const LutWeights& w, int64_t row, int rows, int64_t begin, int depth, LutSource& source) {
    source.looked_up = true;
    if (depth == 0) {
      return;
    }
#if defined(__AVX512F__) && defined(__AVX512BW__)
    if constexpr (Bits <= kNibbleBits) {
      if (shares_table(w, row, rows)) {
        source.looked_up = false;
        store({CodeTable<Bits>(w.table_of(row * w.in_features), w.levels).v[0]}, source.table);
        nibble_words<Bits, kDepth>(w, row, rows, begin, depth, source.vectors);
        return;
      }
      if (few_tables_a_run(w)) {
        look_up_lines<Bits, FloatLookup>(w, row, rows, begin, depth, source.vectors);
        return;
      }
    }
#endif
    dequantize_panel<Bits>(w, row, rows, begin, depth, source.vectors);
  }

  static int multiply(const LutSource* source, int, int tall, const float* x, int depth, bool first, float* sums,
                      ptrdiff_t) {
    static constexpr auto kOfVectors = products(true, std::make_integer_sequence<int, kTall>{});
    static constexpr auto kOfCodes = products(false, std::make_integer_sequence<int, kTall>{});
    (source->looked_up ? kOfVectors : kOfCodes)[static_cast<size_t>(tall - 1)](*source, x, depth, first, sums);
    return 1;
  }
};

}  // namespace

template <class T>
void lut_tiles(int threads, int64_t bits, const LutCall<T>& call) {
  run_tiles<FloatProducts>(threads, bits, call);
}

template void lut_tiles(int, int64_t, const LutCall<float>&);
template void lut_tiles(int, int64_t, const LutCall<bfloat16>&);
template void lut_tiles(int, int64_t, const LutCall<float16>&);

}  // namespace qk::cpu
