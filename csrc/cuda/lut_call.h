// One call of lut_linear, and how its kernels cut it.
//
// A block owns some rows of W and one slice of K; grid x counts the former, y the slices, z tiles of rows of x. Slices
// follow from the shape of W alone, so that a row of x is summed in one order whatever batch it comes in.
#pragma once

#include <cstdint>

#include "../tensor_view.h"
#include "platform.h"

namespace qk::cuda {

// y = x W^T + b with W = centers[code] of shape [N, K]. Handed to kernels by value.
struct LutCall {
  const uint8_t* packed;  // the bit stream of W
  int64_t bytes;          // of it
  const float* centers;   // [G, levels]
  int levels;
  int64_t length;     // weights a row of centers, in row-major order of W
  const float* bias;  // [N], null for none
  const void* x;      // [batch, K]
  void* out;          // [batch, N], typed like x
  Dtype dtype;        // of x
  float* partials;    // [slices, batch, N], null where there is one slice
  int64_t batch, N, K;
  int64_t slice;  // columns of W a slice
};

struct Slices {
  int64_t length;  // columns, a multiple of `step`
  int64_t count;
};

constexpr int64_t kBlocksWanted = 528;  // four on each of the 132 multiprocessors of an H100 or H200
constexpr int64_t kShortestSlice =
    512;  // columns: below, filling tables and adding slices would cost more than products

// rows: of W, a block.  step: columns a kernel takes at once.
inline Slices slices_of(int64_t N, int64_t K, int64_t rows, int64_t step) {
  const int64_t blocks = (N + rows - 1) / rows;
  const int64_t wanted = (kBlocksWanted + blocks - 1) / (blocks > 0 ? blocks : 1);
  const int64_t most = K / kShortestSlice > 1 ? K / kShortestSlice : 1;
  const int64_t count = wanted < most ? wanted : most;
  const int64_t length = ((K + count - 1) / count + step - 1) / step * step;
  return {length > 0 ? length : step, length > 0 ? (K + length - 1) / length : 1};
}

// Where one slice is all of K the kernels of products write outputs, else partial sums.
template <class T>
__device__ void write_sum(const LutCall& call, int64_t slice, int64_t b, int64_t n, float sum) {
  if (call.partials != nullptr) {
    call.partials[(slice * call.batch + b) * call.N + n] = sum;
  } else {
    static_cast<T*>(call.out)[b * call.N + n] = from_float<T>(call.bias == nullptr ? sum : sum + call.bias[n]);
  }
}

}  // namespace qk::cuda
