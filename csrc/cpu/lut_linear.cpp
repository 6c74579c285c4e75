// lut_linear: y = x W^T + b with W = table[code]: checks, and the choice of the kernel.

#include <type_traits>

#include "../kernels.h"
#include "bit_stream.h"
#include "code_check.h"
#include "lut_regimes.h"
#include "lut_rows.h"
#include "lut_sums.h"
#include "lut_tiles.h"
#include "rows.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "lut_linear";
constexpr int64_t kScanned = 8192;  // codes a step of the check

// Every code of the stream, before anything is written.
template <int Bits>
void check_codes(int threads, const LutWeights& w) {
  const int64_t numel = w.in_features * w.out_features;
  HighestCode highest;
  parallel_for(threads, (numel + kScanned - 1) / kScanned, 4, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kScanned, end = std::min(last * kScanned, numel);
    highest.see(highest_in_stream<Bits>(w.packed + begin / 8 * Bits, end - begin));
  });
  check_codes_below_levels(kOp, highest, w.levels);
}

template <int Bits, class T>
void run(int threads, const LutCall<T>& call) {
  const bool spare = call.weights.levels < 1 << Bits;
  [[maybe_unused]] HighestCode highest;
  constexpr bool kBfloat16 = std::is_same_v<T, bfloat16>;
  const LutForm form = lut_form(call.weights, Bits, call.batch, kBfloat16 && pairs_fit(call.weights));
  if (spare && (form == LutForm::tiles || form == LutForm::pairs)) {
    check_codes<Bits>(threads, call.weights);
  }
  switch (form) {
    case LutForm::sums:
      if constexpr (Bits <= 2) {
        SumsKernel<Bits>::run(threads, call, spare ? &highest : nullptr);
      }
      break;
    case LutForm::rows:
      if constexpr (Bits <= 4) {
        RowsKernel<Bits>::run(threads, call, spare ? &highest : nullptr);
      }
      break;
    case LutForm::tiles:
      lut_tiles(threads, Bits, call);
      break;
    case LutForm::pairs:
      if constexpr (kBfloat16) {
        lut_tiles_bf16(threads, Bits, call);
      }
      break;
  }
  check_codes_below_levels(kOp, highest, call.weights.levels);
}

// A tensor of a half type in float32, beside W a few values.
class Widened {
 public:
  Widened(const char* name, const TensorView& given, Dtype compute) : view_(given) {
    QK_CHECK(given.dtype == Dtype::float32 || given.dtype == compute,
             text(kOp, ": ", name, " must be float32 or of the type of x, ", name_of(compute)), name_of(given.dtype));
    if (given.dtype == Dtype::float32) {
      return;
    }
    const int64_t count = given.numel();
    values_.resize(static_cast<size_t>((count + kVec - 1) / kVec * kVec));
    for_float_type(given.dtype, [&](auto type) {
      const auto* from = given.as<decltype(type)>();
      for (int64_t i = 0; i < count; i += kVec) {
        const int some = static_cast<int>(std::min<int64_t>(kVec, count - i));
        store(some == kVec ? load(from + i) : load_some(from + i, some), values_.data() + i);
      }
    });
    view_.data = values_.data();
    view_.dtype = Dtype::float32;
  }

  const TensorView& view() const { return view_; }

 private:
  TensorView view_;
  std::vector<float> values_;
};

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
  const Widened wide_centers("centers", centers, x.dtype);
  std::optional<Widened> wide_bias;
  if (bias) {
    wide_bias.emplace("bias", *bias, x.dtype);
  }
  const Rows table = rows_of(kOp, weight, wide_centers.view());
  const LutWeights weights{packed.as<uint8_t>(), packed.numel(), n, k, table.centers, table.levels, table.length};
  for_bits(kOp, bits, [&](auto constant) {
    constexpr int Bits = decltype(constant)::value;
    QK_CHECK(packed.numel() == packed_bytes(n * k, Bits),
             text(kOp, ": packed must have ", packed_bytes(n * k, Bits), " bytes for shape ", shape_of(shape), " at ",
                  Bits, " bits"),
             std::to_string(packed.numel()));
    QK_CHECK(table.levels <= 1 << Bits, text(kOp, ": ", Bits, " bits tell ", 1 << Bits, " centers apart"),
             std::to_string(table.levels));
    for_float_type(x.dtype, [&](auto value) {
      using T = decltype(value);
      run<Bits>(threads,
                LutCall<T>{weights, bias ? wide_bias->view().as<float>() : nullptr, batch, x.as<T>(), out.as<T>()});
    });
  });
}

}  // namespace qk::cpu
