// lut_linear: y = x W^T + b with W = table[code]: checks, and the choice of the kernel.

#include "../kernels.h"
#include "bit_stream.h"
#include "code_check.h"
#include "lut_tiles.h"
#include "rows.h"

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
    check_codes<Bits>(threads, p);
  });
  const LutWeights weights{p.packed, packed.numel(), n, k, p.table.centers_of(0), p.table.levels, p.table.length};
  lut_tiles(threads, weights, bits, p.bias, batch, x, out, nullptr);
}

}  // namespace qk::cpu
