// lut_linear by tiles: 32 rows of W (16 without AVX-512), 256 codes deep, are dequantised to 32 KiB of scratch with the
// rows along the lanes; x is laid out once a call so that the products read it in order. Bound by fused multiply-adds:
// 16 a cycle of dequantising is spread over the whole batch.
//
// The order of a sum is k = 0, 1, ... within 256 codes from zero, then the sums of these in order: fixed by K alone,
// whatever the batch, the blocking, N or the number of threads.

#include "lut_tiles.h"

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "bit_stream.h"
#include "lut_dequantize.h"
#include "parallel.h"

namespace qk::cpu {
namespace {

// Registers: kWide * kTall sums, kWide weights, one x.
#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kWide = 2, kTall = 12;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kWide = 1, kTall = 6;
#else
constexpr int kWide = 1, kTall = 2;
#endif
constexpr int kTileRows = kWide * kVec;
constexpr int64_t kBatchBlock = 40 * kTall;  // rows of x multiplied with a tile before the next is dequantised

// Keeps a broadcast in its register: gcc 12 would load it again for each of the products that use it.
QK_HD Vec in_register(Vec a) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  __asm__("" : "+v"(a.v));
#endif
  return a;
}

// sums[m][j] (+)= sum over k of x[k][m] w[k][j]
template <int Tall, int Wide>
void multiply(const float* w, const float* x, int depth, bool first, float* sums) {
  Vec total[Tall][Wide];
  for (int m = 0; m < Tall; ++m) {
    for (int j = 0; j < Wide; ++j) {
      total[m][j] = splat(0.0f);
    }
  }
  for (int k = 0; k < depth; ++k, w += kTileRows, x += Tall) {
    Vec weight[Wide];
    for (int j = 0; j < Wide; ++j) {
      weight[j] = load(w + j * kVec);
    }
    for (int m = 0; m < Tall; ++m) {
      const Vec factor = in_register(splat(x[m]));
      for (int j = 0; j < Wide; ++j) {
        total[m][j] = fma(factor, weight[j], total[m][j]);
      }
    }
  }
  for (int m = 0; m < Tall; ++m) {
    for (int j = 0; j < Wide; ++j) {
      float* to = sums + m * kTileRows + j * kVec;
      store(first ? total[m][j] : load(to) + total[m][j], to);
    }
  }
}

using Multiply = void (*)(const float*, const float*, int, bool, float*);

template <int Wide, int... Tall>
constexpr std::array<Multiply, sizeof...(Tall)> multiplies(std::integer_sequence<int, Tall...>) {
  return {multiply<Tall + 1, Wide>...};
}

// Panels of at most kTall rows of x, as even as they can be.
struct Panels {
  int64_t batch, count;
  explicit Panels(int64_t batch_) : batch(batch_), count((batch_ + kTall - 1) / kTall) {}
  int64_t begin(int64_t panel) const { return panel * (batch / count) + std::min(panel, batch % count); }
  int tall(int64_t panel) const { return static_cast<int>(begin(panel + 1) - begin(panel)); }
};

// [K][tall] of one panel.
template <class T>
void lay_out(const T* x, int64_t in_features, int tall, float* to) {
  alignas(64) float rows[kVec * kVec] = {}, columns[kVec * kVec];
  for (int64_t k = 0; k < in_features; k += kVec) {
    const int count = static_cast<int>(std::min<int64_t>(kVec, in_features - k));
    for (int m = 0; m < tall; ++m) {
      const T* from = x + m * in_features + k;
      store(count == kVec ? load(from) : load_some(from, count), rows + m * kVec);
    }
    for (int i = 0; i < kVec; i += 4) {
      transpose_words(rows + i, kVec * sizeof(float), columns + i * kVec, kVec);
    }
    for (int i = 0; i < count; ++i, to += tall) {
      std::copy_n(columns + i * kVec, tall, to);
    }
  }
}

template <class T>
void write_rows(const float* sums, const float* bias, int rows, int64_t batch, int64_t out_features, T* out) {
  for (int64_t b = 0; b < batch; ++b, sums += kTileRows, out += out_features) {
    for (int j = 0; j < rows; j += kVec) {
      const int count = std::min(kVec, rows - j);
      Vec sum = load(sums + j);
      if (bias) {
        sum = sum + (count == kVec ? load(bias + j) : load_some(bias + j, count));
      }
      if (count == kVec) {
        store(sum, out + j);
      } else {
        store_some(sum, count, out + j);
      }
    }
  }
}

template <int Bits>
void multiply_tile(const LutWeights& w, int64_t row, int rows, const Panels& panels, const float* x, float* sums) {
  static constexpr auto kMultiply = multiplies<kWide>(std::make_integer_sequence<int, kTall>{});
  static constexpr auto kMultiplyNarrow = multiplies<1>(std::make_integer_sequence<int, kTall>{});
  alignas(64) float tile[kDepth * kTileRows];
  const auto& chosen = rows > kVec ? kMultiply : kMultiplyNarrow;
  for (int64_t k = 0; k == 0 || k < w.in_features; k += kDepth) {
    const int depth = static_cast<int>(std::min<int64_t>(kDepth, w.in_features - k));
    for (int j = 0; j < rows; j += kVec) {
      dequantize_panel<Bits>(w, row + j, std::min(kVec, rows - j), k, depth, tile + j, kTileRows);
    }
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t begin = panels.begin(p);
      const int tall = panels.tall(p);
      chosen[static_cast<size_t>(tall - 1)](tile, x + begin * w.in_features + k * tall, depth, k == 0,
                                            sums + begin * kTileRows);
    }
  }
}

template <class T>
void run(int threads, const LutWeights& w, int64_t bits, const float* bias, int64_t batch, const T* x, T* out) {
  const int64_t block = std::min(batch, kBatchBlock);
  const std::unique_ptr<float[]> laid_out(new float[static_cast<size_t>(block * w.in_features)]);
  for (int64_t done = 0; done < batch; done += block) {
    const Panels panels(std::min(block, batch - done));
    parallel_for(threads, panels.count, std::max<int64_t>(kGrain / (kTall * w.in_features + 1), 1),
                 [&](int64_t first, int64_t last) {
                   for (int64_t p = first; p < last; ++p) {
                     lay_out(x + (done + panels.begin(p)) * w.in_features, w.in_features, panels.tall(p),
                             laid_out.get() + panels.begin(p) * w.in_features);
                   }
                 });
    const int64_t tiles = (w.out_features + kTileRows - 1) / kTileRows;
    for_bits("lut_linear", bits, [&](auto constant) {
      constexpr int Bits = decltype(constant)::value;
      parallel_for(threads, tiles, 1, [&](int64_t first, int64_t last) {
        const std::unique_ptr<float[]> sums(new float[static_cast<size_t>(panels.batch * kTileRows)]);
        for (int64_t t = first; t < last; ++t) {
          const int64_t row = t * kTileRows;
          const int rows = static_cast<int>(std::min<int64_t>(kTileRows, w.out_features - row));
          multiply_tile<Bits>(w, row, rows, panels, laid_out.get(), sums.get());
          write_rows(sums.get(), bias ? bias + row : nullptr, rows, panels.batch, w.out_features,
                     out + done * w.out_features + row);
        }
      });
    });
  }
}

}  // namespace

void lut_tiles(int threads, const LutWeights& weights, int64_t bits, const float* bias, int64_t batch,
               const TensorView& x, const TensorView& out) {
  for_float_type(x.dtype, [&](auto value) {
    using T = decltype(value);
    run(threads, weights, bits, bias, batch, x.as<T>(), out.as<T>());
  });
}

}  // namespace qk::cpu
