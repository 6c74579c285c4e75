// lut_linear for every shape, width and cut into tables: rows of W that start inside a byte, tables that change inside
// a row, 5 to 8 bits. A warp takes a row of W, lanes along k, eight rows of x at a time; float32. Reads codes two bytes
// at a time and centers through the cache: for shapes too odd or small to be worth more.

#include "lut_kernels.h"

namespace qk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;  // of W, a block
constexpr int kColumns = 8;              // rows of x

template <class T>
__global__ void __launch_bounds__(kThreads) lut_any_kernel(const __grid_constant__ LutCall call, int bits) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t n = int64_t{blockIdx.x} * kRows + threadIdx.x / kWarp, first_x = int64_t{blockIdx.z} * kColumns;
  const int64_t begin = blockIdx.y * call.slice;
  const int64_t end = begin + call.slice < call.K ? begin + call.slice : call.K;
  const bool one_table = call.length == call.N * call.K;
  if (n >= call.N) {
    return;  // a whole warp
  }
  const T* x[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    x[c] = static_cast<const T*>(call.x) + (first_x + c < call.batch ? first_x + c : call.batch - 1) * call.K;
  }
  float sums[kColumns] = {};
  for (int64_t k = begin + lane; k < end; k += kWarp) {
    const int64_t place = n * call.K + k, byte = place / 8 * bits + place % 8 * bits / 8;
    const uint32_t high = byte + 1 < call.bytes ? __ldg(call.packed + byte + 1) : 0;
    const int stored =
        static_cast<int>((high << 8 | __ldg(call.packed + byte)) >> (place * bits % 8)) & ((1 << bits) - 1);
    const int code = stored < call.levels ? stored : call.levels - 1;
    const float weight = __ldg(call.centers + (one_table ? 0 : place / call.length * call.levels) + code);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      sums[c] = fmaf(weight, to_float(x[c][k]), sums[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    float sum = sums[c];
#pragma unroll
    for (int other = kWarp / 2; other > 0; other /= 2) {
      sum += __shfl_xor_sync(kEveryLane, sum, other);
    }
    if (lane == c && first_x + c < call.batch) {
      write_sum<T>(call, blockIdx.y, first_x + c, n, sum);
    }
  }
}

}  // namespace

Slices lut_any_slices(int64_t N, int64_t K) { return slices_of(N, K, kRows, kWarp); }

void lut_any(const LutCall& call, int bits, int64_t slices, cudaStream_t stream) {
  const auto blocks = [](int64_t count, int64_t size) { return static_cast<unsigned>((count + size - 1) / size); };
  const dim3 grid(blocks(call.N, kRows), static_cast<unsigned>(slices), blocks(call.batch, kColumns));
  for_float_type(call.dtype, [&](auto value) {
    launch(&lut_any_kernel<decltype(value)>, grid, dim3(kThreads), 0, stream, call, bits);
  });
}

}  // namespace qk::cuda
