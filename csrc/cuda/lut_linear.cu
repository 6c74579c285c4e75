// lut_linear: y = x W^T + b with W = centers[code]: checks, the choice of the kernel, and the sum of slices.
//
// Slices of K leave partial sums, which a second kernel adds in order: no atomics, the same bits always.

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../check.h"
#include "kernels.h"
#include "lut_kernels.h"

namespace qk::cuda {
namespace {

constexpr const char* kOp = "lut_linear";
constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) sum_slices(const __grid_constant__ LutCall call, int slices) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= call.N) {
    return;
  }
  const int64_t b = blockIdx.y;
  float sum = 0.0f;
  for (int64_t slice = 0; slice < slices; ++slice) {
    sum += call.partials[(slice * call.batch + b) * call.N + n];
  }
  static_cast<T*>(call.out)[b * call.N + n] = from_float<T>(call.bias == nullptr ? sum : sum + call.bias[n]);
}

LutCall call_of(View x, View packed, View centers, const std::optional<TensorView>& bias, int64_t bits,
                const std::vector<int64_t>& shape, View out) {
  QK_CHECK(shape.size() == 2, text(kOp, ": shape must be (out, in)"), shape_of(shape));
  const int64_t N = shape[0], K = shape[1];
  QK_CHECK(bits >= 1 && bits <= 8, text(kOp, ": bits must be between 1 and 8"), std::to_string(bits));
  QK_CHECK(x.dim() >= 1 && x.sizes.back() == K, text(kOp, ": the last size of x must be ", K), shape_of(x.sizes));
  std::vector<int64_t> expected = x.sizes;
  expected.back() = N;
  QK_CHECK(out.sizes == expected && out.dtype == x.dtype, text(kOp, ": out must have shape ", shape_of(expected)),
           shape_of(out.sizes));
  const int64_t bytes = (N * K * bits + 7) / 8;
  QK_CHECK(packed.numel() == bytes, text(kOp, ": packed must have ", bytes, " bytes"), std::to_string(packed.numel()));
  const bool shaped = (centers.dim() == 1 || centers.dim() == 2) && centers.sizes.back() >= 2 &&
                      centers.sizes.back() <= int64_t{1} << bits;
  QK_CHECK(shaped, text(kOp, ": centers must be [m] or [G, m] with m from 2 to ", int64_t{1} << bits),
           "shape " + shape_of(centers.sizes));
  const int64_t groups = centers.dim() == 2 ? centers.sizes[0] : 1;
  QK_CHECK(groups > 0 ? N * K % groups == 0 : N * K == 0,
           text(kOp, ": the rows of centers must divide the number of weights evenly"),
           text(groups, " rows for ", N * K, " weights"));
  if (bias) {
    QK_CHECK(bias->sizes == std::vector<int64_t>{N}, text(kOp, ": bias must have shape (", N, ",)"),
             shape_of(bias->sizes));
  }
  LutCall call{};
  call.packed = packed.as<uint8_t>();
  call.bytes = bytes;
  call.centers = centers.as<float>();
  call.levels = static_cast<int>(centers.sizes.back());
  call.length = groups > 0 ? N * K / groups : 0;
  call.bias = bias ? bias->as<float>() : nullptr;
  call.x = x.data;
  call.out = out.data;
  call.dtype = x.dtype;
  call.N = N;
  call.K = K;
  call.batch = 1;
  for (size_t i = 0; i + 1 < x.sizes.size(); ++i) {
    call.batch *= x.sizes[i];
  }
  return call;
}

Slices slices_for(const LutCall& call, LutForm form, int bits) {
  if (form == LutForm::any) {
    return lut_any_slices(call.N, call.K);
  }
  return for_piece_bits(bits, [&](auto constant) {
    constexpr int Bits = decltype(constant)::value;
    if constexpr (Bits <= 4) {
      if (form == LutForm::mma) {
        return lut_mma_slices<Bits>(call.N, call.K);
      }
    }
    return lut_fma_slices<Bits>(call.N, call.K);
  });
}

void multiply(const LutCall& call, LutForm form, int bits, int64_t slices, cudaStream_t stream) {
  if (form == LutForm::any) {
    return lut_any(call, bits, slices, stream);
  }
  for_piece_bits(bits, [&](auto constant) {
    constexpr int Bits = decltype(constant)::value;
    if constexpr (Bits <= 4) {
      if (form == LutForm::mma) {
        return lut_mma<Bits>(call, slices, stream);
      }
    }
    lut_fma<Bits>(call, slices, stream);
  });
}

// Rows of x a pass: a launch's z and, where there are slices, the partial sums of a pass are limited.
int64_t rows_of_pass(const LutCall& call, const Slices& slices) {
  constexpr int64_t kMostRows = 1 << 18, kMostSlicedRows = 128;
  const int64_t most = slices.count > 1 ? kMostSlicedRows : kMostRows;
  return call.batch < most ? call.batch : most;
}

int64_t bytes_of(const LutCall& call, const Slices& slices) {
  const int64_t partials = slices.count > 1 ? slices.count * rows_of_pass(call, slices) * call.N : 0;
  return partials * static_cast<int64_t>(sizeof(float));
}

}  // namespace

int64_t lut_linear_workspace(View x, View packed, View centers, const std::optional<TensorView>& bias, int64_t bits,
                             const std::vector<int64_t>& shape) {
  TensorView out{nullptr, x.sizes, x.dtype};
  QK_CHECK(x.dim() >= 1 && shape.size() == 2, text(kOp, ": shape must be (out, in) and x [..., in]"), shape_of(shape));
  out.sizes.back() = shape[0];
  const LutCall call = call_of(x, packed, centers, bias, bits, shape, out);
  const auto width = static_cast<int>(bits);
  return bytes_of(call, slices_for(call, lut_form(call, width), width));
}

void lut_linear(Stream stream, View x, View packed, View centers, const std::optional<TensorView>& bias, int64_t bits,
                const std::vector<int64_t>& shape, View out, View workspace) {
  const LutCall whole = call_of(x, packed, centers, bias, bits, shape, out);
  if (whole.batch == 0 || whole.N == 0) {
    return;
  }
  const auto width = static_cast<int>(bits);
  const LutForm form = lut_form(whole, width);
  const Slices slices = slices_for(whole, form, width);
  const int64_t needed = bytes_of(whole, slices), rows = rows_of_pass(whole, slices);
  QK_CHECK(workspace.numel() >= needed, text(kOp, ": workspace must have ", needed, " bytes"),
           std::to_string(workspace.numel()));
  for_float_type(x.dtype, [&](auto value) {
    using T = decltype(value);
    for (int64_t first = 0; first < whole.batch; first += rows) {
      LutCall call = whole;
      call.batch = std::min(rows, whole.batch - first);
      call.x = x.as<const T>() + first * call.K;
      call.out = out.as<T>() + first * call.N;
      call.slice = slices.length;
      call.partials = needed > 0 ? workspace.as<float>() : nullptr;
      multiply(call, form, width, slices.count, stream.handle);
      if (call.partials != nullptr) {
        const dim3 grid(static_cast<unsigned>((call.N + kThreads - 1) / kThreads), static_cast<unsigned>(call.batch));
        launch(&sum_slices<T>, grid, dim3(kThreads), 0, stream.handle, call, static_cast<int>(slices.count));
      }
    }
  });
}

}  // namespace qk::cuda
