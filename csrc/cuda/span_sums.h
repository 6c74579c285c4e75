// The second kernel of sums: blocks left partials [rows, spans, columns], float32; a block for each row adds them in
// order, in float64.
#pragma once

#include "cut.h"

namespace qk::cuda {

constexpr int kSumThreads = 1024;
constexpr int kSumWarps = kSumThreads / kWarp;

// sums[column] over the spans of a row, by all kSumThreads threads; ends with a barrier.
__device__ inline void sum_spans(const float* partials, int spans, int columns, double* sums) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int column = warp; column < columns; column += kSumWarps) {
    double sum = 0.0;
    for (int span = lane; span < spans; span += kWarp) {
      sum += static_cast<double>(partials[static_cast<int64_t>(span) * columns + column]);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kEveryLane, sum, offset);
    }
    if (lane == 0) {
      sums[column] = sum;
    }
  }
  __syncthreads();
}

}  // namespace qk::cuda
