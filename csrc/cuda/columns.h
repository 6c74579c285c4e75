// Sums of many kinds over a block, in an order that the shapes alone decide: a column of shared memory for each sum.
// With few columns every thread adds into a place of its own, with many a warp adds up first and shares one.
#pragma once

#include "cut.h"

namespace qk::cuda {

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kEveryLane, value, offset);
  }
  return value;
}

// kOfThreads: a place a thread. Else rows must have whole warps, and a warp's lanes add together.
template <bool kOfThreads>
class Columns {
 public:
  static constexpr int kPlaces = kOfThreads ? kThreads : kWarps;

  static size_t bytes(int columns) { return sizeof(float) * static_cast<size_t>(columns) * kPlaces; }

  __device__ explicit Columns(float* memory) : memory_(memory) {}

  // Before a barrier.
  __device__ void clear(int columns) const {
    for (int i = static_cast<int>(threadIdx.x); i < columns * kPlaces; i += kThreads) {
      memory_[i] = 0.0f;
    }
  }

  __device__ __forceinline__ void add(int column, float value) {
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kOfThreads) {
      memory_[column * kPlaces + thread] += value;
    } else {
      const float sum = warp_sum(value);
      if (thread % kWarp == 0) {
        memory_[column * kPlaces + thread / kWarp] += sum;
      }
    }
  }

  // totals[column * rows + r]: a column's sum over the threads of the block's r-th row. Between barriers.
  __device__ void total(const Cut& cut, int columns, float* totals) const {
    const int thread = static_cast<int>(threadIdx.x), rows = cut.rows_a_block(), threads = cut.row_threads();
    if constexpr (kOfThreads) {
      const int lane = thread % kWarp, width = threads < kWarp ? threads : kWarp, parts = threads / width;
      const int chunks = kThreads / (kWarp * parts);
      for (int i = thread / kWarp; i < columns * chunks; i += kWarps) {
        const int column = i / chunks, first = i % chunks * kWarp * parts;
        float sum = 0.0f;
        for (int p = 0; p < parts; ++p) {
          sum += memory_[column * kPlaces + first + p * kWarp + lane];
        }
        for (int offset = width / 2; offset > 0; offset /= 2) {
          sum += __shfl_xor_sync(kEveryLane, sum, offset);
        }
        if (lane % width == 0) {
          totals[column * rows + ((first + lane) >> cut.row_shift)] = sum;
        }
      }
    } else {
      const int parts = threads / kWarp;
      for (int i = thread; i < columns * rows; i += kThreads) {
        float sum = 0.0f;
        for (int p = 0; p < parts; ++p) {
          sum += memory_[i / rows * kPlaces + i % rows * parts + p];
        }
        totals[i] = sum;
      }
    }
  }

 private:
  float* memory_;
};

}  // namespace qk::cuda
