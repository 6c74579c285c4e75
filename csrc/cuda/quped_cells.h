// Cells in quped_step: a search in shared memory, and sums and counts by cell in columns.
#pragma once

#include "../math/cell.h"
#include "quped_tensors.h"

namespace qk::cuda {

// One row's cells. passed: how many midpoints an element is above; of equal centers the first has all members.
struct StepCells {
  const float* edges;  // [2^steps], infinite past the last
  const float* own;    // [levels]: the center of the cell
  const int* first;    // [levels]: of equal centers
  int steps;

  // NaN is above none.
  __device__ __forceinline__ int passed(float value) const {
    int count = 0;
    for (int step = 1 << (steps - 1); step > 0; step /= 2) {
      count += math::is_above(value, edges[count + step - 1]) ? step : 0;
    }
    return count;
  }
};

// Fills a row's tables by its own threads; `again` becomes 1 where a center lies in a lower cell than its own, as an
// ulp from the next one can: the prox may then leave a cell.
__device__ inline void make_cells(const float* centers, int levels, int steps, int thread, int threads, float* edges,
                                  float* own, int* first, int* again) {
  for (int k = thread; k < 1 << steps; k += threads) {
    const bool exists = k + 1 < levels;
    const float edge = exists ? math::midpoint(centers[k], centers[k + 1]) : INFINITY;
    edges[k] = edge;
    if (exists && centers[k + 1] != centers[k] && !math::is_above(centers[k + 1], edge)) {
      *again = 1;
    }
  }
  for (int k = thread; k < levels; k += threads) {
    int same = k;
    while (same > 0 && centers[same - 1] == centers[k]) {
      --same;
    }
    own[k] = centers[same];
    first[k] = same;
  }
}

// memory[cell] += value in the columns of Columns<kNarrow>; every lane calls, those without an element say so.
template <bool kNarrow>
__device__ __forceinline__ void add_by_cell(float* memory, int cell, float value, bool exists) {
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (kNarrow) {
    if (exists) {
      memory[cell * kThreads + thread] += value;
    }
  } else {
#pragma unroll 1
    for (int lane = 0; lane < kWarp; ++lane) {  // one after another: an order that does not change
      if (exists && lane == thread % kWarp) {
        memory[cell * kWarps + thread / kWarp] += value;
      }
      __syncwarp();
    }
  }
}

// Narrow: a thread's counts of a cell in one word, on its center in bits 0 to 9, above in 10 to 20, below in 21 to 31.
// Else counters [3, levels] of the block. side: 0 on, 1 above, 2 below.
template <bool kNarrow>
__device__ __forceinline__ void count_cell(unsigned* memory, int levels, int cell, int side) {
  if constexpr (kNarrow) {
    memory[cell * kThreads + static_cast<int>(threadIdx.x)] += side == 0 ? 1u : side == 1 ? 1u << 10 : 1u << 21;
  } else {
    atomicAdd(memory + side * levels + cell, 1u);
  }
}

// totals[(side levels + cell) rows + r] for the rows of the block. Between barriers.
template <bool kNarrow>
__device__ void total_counts(const Cut& cut, const unsigned* memory, int levels, unsigned* totals) {
  const int thread = static_cast<int>(threadIdx.x), rows = cut.rows_a_block(), threads = cut.row_threads();
  if constexpr (kNarrow) {
    const int lane = thread % kWarp, width = threads < kWarp ? threads : kWarp, parts = threads / width;
    const int chunks = kThreads / (kWarp * parts);
    for (int i = thread / kWarp; i < levels * chunks; i += kWarps) {
      const int cell = i / chunks, from = i % chunks * kWarp * parts;
      unsigned on = 0, above = 0, below = 0;
      for (int p = 0; p < parts; ++p) {
        const unsigned word = memory[cell * kThreads + from + p * kWarp + lane];
        on += word & 1023u;
        above += word >> 10 & 2047u;
        below += word >> 21;
      }
      for (int offset = width / 2; offset > 0; offset /= 2) {
        on += __shfl_xor_sync(kEveryLane, on, offset);
        above += __shfl_xor_sync(kEveryLane, above, offset);
        below += __shfl_xor_sync(kEveryLane, below, offset);
      }
      if (lane % width == 0) {
        const int row = (from + lane) >> cut.row_shift;
        totals[cell * rows + row] = on;
        totals[(levels + cell) * rows + row] = above;
        totals[(2 * levels + cell) * rows + row] = below;
      }
    }
  } else {
    for (int i = thread; i < 3 * levels; i += kThreads) {
      totals[i] = memory[i];
    }
  }
}

}  // namespace qk::cuda
