// lut_linear by tiles for bfloat16 x: vdpbf16ps multiplies pairs of bfloat16 and adds both products to a float32 sum,
// at twice the rate of float32. The loops are those of lut_tile_loop.h, a step being two codes of a row.
//
// Of a word of eight codes, 4 bits each, codes j and j + 4 make a pair: they lie 16 bits apart, so that one permutation
// of 16-bit entries looks both up. x is laid out in the same pairs.
//
// What vdpbf16ps does: products are exact; the two are added to the sum in turn, each sum rounded to nearest even;
// operands and sums below 2^-126 are zero. Infinities and NaN are as in float32. So a dot product of K terms keeps the
// error bound of float32, and besides loses at most 2^-126 (1 + |w| + |x|) a term.
//
// The order of a sum is fixed by K: the pairs of 512 codes from zero, then the sums of these in order.

#include "lut_tiles.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)

#include <array>
#include <utility>

#include "extensions.h"
#include "lut_dequantize.h"
#include "lut_nibbles.h"
#include "lut_tile_loop.h"

namespace qk::cpu {
namespace {

constexpr int kPairs = 4;  // of a word of eight codes

// The halves of pair j that belong to the first `count` of eight codes.
QK_HD __mmask32 halves(int j, int count) {
  return (j < count ? 0x55555555u : 0u) | (j + kPairs < count ? 0xaaaaaaaau : 0u);
}

// total += pairs * (the pair at x, in every lane). As text, because gcc 12 does not broadcast the operand within the
// instruction: a load beside it takes a port from the products, which are then a third slower.
QK_HD __m512 multiply_add_pair(__m512 total, __m512i pairs, const float* x) {
  __asm__("vdpbf16ps %1%{1to16%}, %2, %0" : "+v"(total) : "m"(*x), "v"(pairs));
  return total;
}

template <int Tall>
QK_HD void multiply_add(const float* x, __m512i pairs, __m512 (&total)[Tall]) {
#pragma GCC unroll 32
  for (int m = 0; m < Tall; ++m) {
    total[m] = multiply_add_pair(total[m], pairs, x + m);
  }
}

template <int Tall>
QK_HD void clear(__m512 (&total)[Tall]) {
#pragma GCC unroll 32
  for (int m = 0; m < Tall; ++m) {
    total[m] = _mm512_setzero_ps();
  }
}

template <int Tall>
QK_HD void add_sums(const __m512 (&total)[Tall], bool first, float* sums) {
#pragma GCC unroll 32
  for (int m = 0; m < Tall; ++m) {
    float* to = sums + m * kVec;
    _mm512_storeu_ps(to, first ? total[m] : _mm512_add_ps(_mm512_loadu_ps(to), total[m]));
  }
}

// Weights where source.looked_up, else words of codes.
template <int Tall, bool LookedUp>
void multiply(const LutSource& source, const float* x, int depth, bool first, float* sums) {
  const __m512i table = _mm512_load_si512(source.table);
  const float* from = source.vectors;
  __m512 total[Tall];
  clear(total);
  int k = 0;
  for (; k + 8 <= depth; k += 8) {
    prefetch_ahead(source, k);
    __m512i words = _mm512_loadu_si512(from);
    for (int j = 0; j < kPairs; ++j, x += Tall) {
      multiply_add(x, LookedUp ? _mm512_loadu_si512(from + j * kVec) : _mm512_permutexvar_epi16(words, table), total);
      words = _mm512_srli_epi32(words, kNibbleBits);
    }
    from += (LookedUp ? kPairs : 1) * kVec;
  }
  if (k < depth) {  // zeros in place of the codes that are missing of eight, whatever their center would be
    __m512i words = _mm512_loadu_si512(from);
    for (int j = 0; j < kPairs; ++j, x += Tall) {
      const __m512i pairs = LookedUp ? _mm512_loadu_si512(from + j * kVec) : _mm512_permutexvar_epi16(words, table);
      multiply_add(x, _mm512_maskz_mov_epi16(halves(j, depth - k), pairs), total);
      words = _mm512_srli_epi32(words, kNibbleBits);
    }
  }
  add_sums(total, first, sums);
}

template <bool LookedUp, int... Tall>
constexpr std::array<LutProduct, sizeof...(Tall)> products(std::integer_sequence<int, Tall...>) {
  return {multiply<Tall + 1, LookedUp>...};
}

// Two sources of codes at once, in the same order of sums: with few rows of x one source has too few sums to hide how
// long a product takes.
template <int Tall>
void multiply_two(const LutSource* source, const float* x, int depth, bool first, float* sums, ptrdiff_t apart) {
  const __m512i tables[2] = {_mm512_load_si512(source[0].table), _mm512_load_si512(source[1].table)};
  __m512 total[2][Tall];
  clear(total[0]);
  clear(total[1]);
  for (int k = 0; k < depth; k += 8) {
    prefetch_ahead(source[0], k);
    prefetch_ahead(source[1], k);
    __m512i words[2] = {_mm512_loadu_si512(source[0].vectors + k / 8 * kVec),
                        _mm512_loadu_si512(source[1].vectors + k / 8 * kVec)};
    const bool whole = k + 8 <= depth;
    for (int j = 0; j < kPairs; ++j, x += Tall) {
      const __mmask32 there = whole ? ~__mmask32{0} : halves(j, depth - k);
      for (int s = 0; s < 2; ++s) {
        multiply_add(x, _mm512_maskz_permutexvar_epi16(there, words[s], tables[s]), total[s]);
        words[s] = _mm512_srli_epi32(words[s], kNibbleBits);
      }
    }
  }
  add_sums(total[0], first, sums);
  add_sums(total[1], first, sums + apart);
}

using LutProductOfTwo = void (*)(const LutSource*, const float*, int, bool, float*, ptrdiff_t);
constexpr int kTallOfTwo = 5;

template <int... Tall>
constexpr std::array<LutProductOfTwo, sizeof...(Tall)> products_of_two(std::integer_sequence<int, Tall...>) {
  return {multiply_two<Tall + 1>...};
}

// A table of at most sixteen centers, twice: bit 4 of an index is of another code.
template <int Bits>
struct PairLookup {
  static constexpr int kSteps = kPairs;
  __m512i v;
  PairLookup(const float* centers, int levels) {
    const __m512i bits = _mm512_castps_si512(CodeTable<Bits>(centers, levels).v[0]);
    v = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }
  QK_HD static __m512i look_up(__m512i table, __m512i words) { return _mm512_permutexvar_epi16(words, table); }
};

struct PairProducts {
  static constexpr int kTall = 24, kSteps = kPairs, kDepth = kSourceVectors / kPairs * 8;

  static void lay_out(const bfloat16* x, int64_t in_features, int tall, float* to) {
    constexpr int kCodes = 2 * kVec;
    alignas(64) float rows[(kTall + kVec - 1) / kVec * kVec][kVec] = {};
    for (int64_t k = 0; k < in_features; k += kCodes, to += kVec * tall) {
      const int count = static_cast<int>(std::min<int64_t>(kCodes, in_features - k));
      const __mmask32 inside = static_cast<__mmask32>((uint64_t{1} << count) - 1);
      for (int m = 0; m < tall; ++m) {
        const __m512i eights = _mm512_maskz_loadu_epi16(inside, x + m * in_features + k);
        _mm512_store_si512(rows[m], _mm512_unpacklo_epi16(eights, _mm512_bsrli_epi128(eights, 8)));
      }
      lay_out_words(rows, tall, (count + 7) / 8 * kPairs, to);
    }
  }

  template <int Bits>
  static void prepare(const LutWeights& w, int64_t row, int rows, int64_t begin, int depth, LutSource& source) {
    source.looked_up = true;
    if (depth == 0) {
      return;
    }
    if constexpr (Bits <= kNibbleBits) {
      if (shares_table(w, row, rows)) {
        source.looked_up = false;
        _mm512_store_si512(source.table, PairLookup<Bits>(w.table_of(row * w.in_features), w.levels).v);
        nibble_words<Bits, kDepth>(w, row, rows, begin, depth, source.vectors);
        return;
      }
      if (few_tables_a_run(w)) {
        look_up_lines<Bits, PairLookup<Bits>>(w, row, rows, begin, depth, source.vectors);
        return;
      }
    }
    alignas(64) float single[qk::cpu::kDepth * kVec];
    for (int done = 0; done < depth; done += qk::cpu::kDepth) {
      const int part = std::min(qk::cpu::kDepth, depth - done);
      dequantize_panel<Bits>(w, row, rows, begin + done, part, single);
      join_pairs(single, (part + 7) / 8, source.vectors + done / 8 * kPairs * kVec);
    }
  }

  // Eight vectors of floats that are bfloat16 values to four of pairs.
  static void join_pairs(const float* single, int eights, float* to) {
    for (int i = 0; i < eights; ++i, single += 8 * kVec, to += kPairs * kVec) {
      for (int j = 0; j < kPairs; ++j) {
        const __m512i low = _mm512_srli_epi32(_mm512_load_si512(single + j * kVec), 16);
        const __m512i high = _mm512_load_si512(single + (j + kPairs) * kVec);
        _mm512_storeu_si512(to + j * kVec, _mm512_mask_mov_epi16(low, 0xaaaaaaaau, high));
      }
    }
  }

  static int multiply(const LutSource* source, int left, int tall, const float* x, int depth, bool first, float* sums,
                      ptrdiff_t apart) {
    static constexpr auto kOfWeights = products<true>(std::make_integer_sequence<int, kTall>{});
    static constexpr auto kOfCodes = products<false>(std::make_integer_sequence<int, kTall>{});
    static constexpr auto kOfTwo = products_of_two(std::make_integer_sequence<int, kTallOfTwo>{});
    const size_t which = static_cast<size_t>(tall - 1);
    if (tall <= kTallOfTwo && left >= 2 && !source[0].looked_up && !source[1].looked_up) {
      kOfTwo[which](source, x, depth, first, sums, apart);
      return 2;
    }
    (source->looked_up ? kOfWeights : kOfCodes)[which](*source, x, depth, first, sums);
    return 1;
  }
};

// Asked once.
bool has_pair_products() {
  static const bool has = __builtin_cpu_supports("avx512bf16") && !is_disabled("avx512_bf16");
  return has;
}

bool all_bfloat16(const float* values, int64_t count) {
  uint32_t rest = 0;
  for (int64_t i = 0; i < count; ++i) {
    rest |= math::bits_of(values[i]) & 0xffffu;
  }
  return rest == 0;
}

}  // namespace

bool pairs_fit(const LutWeights& w) {
  const int64_t groups = w.length > 0 ? w.out_features * w.in_features / w.length : 0;
  return has_pair_products() && all_bfloat16(w.centers, groups * w.levels);
}

void lut_tiles_bf16(int threads, int64_t bits, const LutCall<bfloat16>& call) {
  run_tiles<PairProducts>(threads, bits, call);
}

}  // namespace qk::cpu

#else

namespace qk::cpu {

bool pairs_fit(const LutWeights&) { return false; }
void lut_tiles_bf16(int threads, int64_t bits, const LutCall<bfloat16>& call) { lut_tiles(threads, bits, call); }

}  // namespace qk::cpu

#endif
