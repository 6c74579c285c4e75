// lut_linear: y = x W^T + b with W = table[code], decoded row by row into scratch that stays in cache.

#include "../kernels.h"
#include "../math/pack_codes.h"
#include "bit_stream.h"
#include "code_check.h"
#include "half.h"
#include "lut_regimes.h"
#include "rows.h"
#include "simd_bits.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "lut_linear";

struct Problem {
  int64_t batch, out_features, in_features;
  const uint8_t* packed;
  Rows table;
  const float* bias;  // null for none
};

// Codes [begin, end) of the stream, one a byte.
template <int Bits>
void decode(const uint8_t* packed, int64_t begin, int64_t end, uint8_t* codes) {
  constexpr unsigned kMask = (1u << Bits) - 1u;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * Bits;
    unsigned word = packed[first / 8];
    if (first % 8 + Bits > 8) {
      word |= static_cast<unsigned>(packed[first / 8 + 1]) << 8;
    }
    *codes++ = static_cast<uint8_t>((word >> (first % 8)) & kMask);
  }
}

// Row n of W in float32.
template <int Bits>
void dequantize_row(const Problem& p, int64_t n, uint8_t* codes, float* weights) {
  const int64_t begin = n * p.in_features;
  decode<Bits>(p.packed, begin, begin + p.in_features, codes);
  for (int64_t k = 0; k < p.in_features; ++k) {
    weights[k] = p.table.centers_of((begin + k) / p.table.length)[codes[k]];
  }
}

// Sixteen partial sums over k, then these in order: the same for every batch and any number of threads.
float dot(const float* a, const float* b, int64_t count) {
  float lanes[kVec] = {};
  for (int64_t k = 0; k < count; ++k) {
    lanes[k % kVec] += a[k] * b[k];
  }
  float sum = 0.0f;
  for (float lane : lanes) {
    sum += lane;
  }
  return sum;
}

template <class T>
void widen(const T* from, int64_t count, float* to) {
  constexpr int kSize = 16;
  int64_t i = 0;
  for (; i + kSize <= count; i += kSize) {
    to_float<kSize>(from + i, to + i);
  }
  alignas(64) T rest[kSize] = {};
  alignas(64) float wide[kSize];
  std::copy(from + i, from + count, rest);
  to_float<kSize>(rest, wide);
  std::copy_n(wide, count - i, to + i);
}

template <class T>
T narrow(float value) {
  alignas(64) float wide[16] = {value};
  alignas(64) T rest[16];
  from_float<16>(wide, rest);
  return rest[0];
}

template <int Bits>
int highest_code(const Problem& p, int64_t n, std::vector<uint8_t>& codes) {
  decode<Bits>(p.packed, n * p.in_features, (n + 1) * p.in_features, codes.data());
  return highest_of(codes.data(), p.in_features);
}

// Before anything is written.
template <int Bits>
void check_codes(int threads, const Problem& p) {
  if (p.table.levels == 1 << Bits) {
    return;
  }
  HighestCode highest;
  parallel_for(threads, p.out_features, std::max<int64_t>(kGrain / std::max<int64_t>(p.in_features, 1), 1),
               [&](int64_t first, int64_t last) {
                 std::vector<uint8_t> codes(static_cast<size_t>(p.in_features));
                 for (int64_t n = first; n < last; ++n) {
                   highest.see(highest_code<Bits>(p, n, codes));
                 }
               });
  check_codes_below_levels(kOp, highest, p.table.levels);
}

template <int Bits, class T>
void run(int threads, const Problem& p, const T* x, T* out) {
  check_codes<Bits>(threads, p);
  std::vector<float> wide(static_cast<size_t>(p.batch * p.in_features));
  widen(x, p.batch * p.in_features, wide.data());
  const int64_t cost = std::max<int64_t>(p.in_features * (p.batch + 1), 1);
  parallel_for(threads, p.out_features, std::max<int64_t>(kGrain / cost, 1), [&](int64_t first, int64_t last) {
    std::vector<uint8_t> codes(static_cast<size_t>(p.in_features));
    std::vector<float> weights(static_cast<size_t>(p.in_features));
    for (int64_t n = first; n < last; ++n) {
      dequantize_row<Bits>(p, n, codes.data(), weights.data());
      for (int64_t b = 0; b < p.batch; ++b) {
        const float sum = dot(wide.data() + b * p.in_features, weights.data(), p.in_features);
        out[b * p.out_features + n] = narrow<T>(p.bias ? sum + p.bias[n] : sum);
      }
    }
  });
}

}  // namespace

void lut_linear(int threads, View x, View packed, View centers, const std::optional<TensorView>& bias, int64_t bits,
                const std::vector<int64_t>& shape, View out) {
  QK_CHECK(shape.size() == 2, text(kOp, ": shape must be (out, in)"), shape_of(shape));
  const int64_t n = shape[0], k = shape[1];
  QK_CHECK(x.dim() >= 1 && x.sizes.back() == k, text(kOp, ": the last size of x must be ", k), shape_of(x.sizes));
  std::vector<int64_t> expected = x.sizes;
  expected.back() = n;
  QK_CHECK(out.sizes == expected && out.dtype == x.dtype, text(kOp, ": out must have shape ", shape_of(expected)),
           shape_of(out.sizes));
  int64_t batch = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    batch *= x.sizes[static_cast<size_t>(i)];
  }
  if (bias) {
    QK_CHECK(bias->sizes == std::vector<int64_t>{n}, text(kOp, ": bias must have shape (", n, ",)"),
             shape_of(bias->sizes));
  }
  const TensorView weight{nullptr, shape, Dtype::uint8};
  const Problem p{batch, n, k, packed.as<uint8_t>(), rows_of(kOp, weight, centers), bias ? bias->as<float>() : nullptr};
  for_bits(kOp, bits, [&](auto constant) {
    constexpr int Bits = decltype(constant)::value;
    QK_CHECK(packed.numel() == packed_bytes(n * k, Bits),
             text(kOp, ": packed must have ", packed_bytes(n * k, Bits), " bytes for shape ", shape_of(shape), " at ",
                  Bits, " bits"),
             std::to_string(packed.numel()));
    QK_CHECK(p.table.levels <= 1 << Bits, text(kOp, ": ", Bits, " bits tell ", 1 << Bits, " centers apart"),
             std::to_string(p.table.levels));
    for_float_type(x.dtype, [&](auto value) {
      using T = decltype(value);
      run<Bits>(threads, p, x.as<T>(), out.as<T>());
    });
  });
}

}  // namespace qk::cpu
