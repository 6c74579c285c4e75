// The second kernel of sums: blocks left partials [rows, spans, stride], words of 4 bytes; a block for each row adds
// them in order, floats in float64.
#pragma once

#include "cut.h"

namespace qk::cuda {

constexpr int kSumThreads = 1024;
constexpr int kSumWarps = kSumThreads / kWarp;

// Adds value_of(word) over the spans of a row, words [spans, stride] at `partials`, for `columns` of them, by all
// kSumThreads threads; ends with a barrier.
template <class Sum, class ValueOf>
__device__ __forceinline__ void sum_columns(const float* partials, int spans, int stride, int columns, Sum* sums,
                                            ValueOf&& value_of) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int column = warp; column < columns; column += kSumWarps) {
    Sum sum = 0;
    for (int span = lane; span < spans; span += kWarp) {
      sum += value_of(partials[static_cast<int64_t>(span) * stride + column]);
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

__device__ inline void sum_spans(const float* partials, int spans, int stride, int columns, double* sums) {
  sum_columns(partials, spans, stride, columns, sums, [](float value) { return static_cast<double>(value); });
}

// Counts lie in the words as unsigned integers.
__device__ inline void sum_span_counts(const float* partials, int spans, int stride, int columns, long long* sums) {
  sum_columns(partials, spans, stride, columns, sums,
              [](float value) { return static_cast<long long>(__float_as_uint(value)); });
}

}  // namespace qk::cuda
