// The second kernel of quped_step: the sums of rows that several blocks worked on, and R of each tensor, added in
// order.
#pragma once

#include "quped_tensors.h"
#include "span_sums.h"

namespace qk::cuda {

// Outputs of one center from a row's sums: float_of(word) and count_of(word), words as in PartialWords.
template <class FloatOf, class CountOf>
__device__ void write_center(const StepTable& table, const StepTensor& t, int64_t row, int k, float sharpness,
                             const PartialWords& words, FloatOf&& float_of, CountOf&& count_of) {
  const int levels = t.levels;
  const int64_t at = row * levels + k;
  if (table.chain == Chain::kSoft) {
    t.center_grad[at] = center_gradient(t.centers + row * levels, levels, sharpness, k, float_of);
  } else if (table.chain != Chain::kNone) {
    t.center_grad[at] = static_cast<float>(float_of(k));
  }
  if (!table.l1) {
    t.sums[at] = static_cast<float>(float_of(words.chain + k));
  }
  const int on = words.chain + words.sums + k;
  const int64_t above = count_of(on + levels), below = count_of(on + 2 * levels);
  int64_t* const counts = t.counts + row * 3 * levels + k;
  counts[0] = count_of(on) + above + below;
  counts[levels] = above;
  counts[2 * levels] = below;
}

__device__ inline void finish_row(const StepTable& table, const StepTensor& t, int64_t row, double* sums) {
  const PartialWords words(table.chain, table.l1, t.levels);
  const int floats = words.chain + words.sums, all = words.all();
  auto* const counts = reinterpret_cast<long long*>(sums + floats);
  const float* const partials = t.partials + row * t.cut.spans * all;
  sum_spans(partials, t.cut.spans, all, floats, sums);
  sum_span_counts(partials + floats, t.cut.spans, all, words.counts, counts);
  const float P = t.sharpness == nullptr ? 1.0f : t.sharpness[row * t.sharpness_stride];
  const auto float_of = [&](int word) { return sums[word]; };
  const auto count_of = [&](int word) { return static_cast<int64_t>(counts[word - floats]); };
  for (int k = static_cast<int>(threadIdx.x); k < t.levels; k += kSumThreads) {
    write_center(table, t, row, k, P, words, float_of, count_of);
  }
}

__device__ inline void finish_distance(const StepTable& table, const StepTensor& t, int next_block, double* sums) {
  const int id = static_cast<int>(threadIdx.x);
  double sum = 0.0;
  for (int block = t.first_block + id; block < next_block; block += kSumThreads) {
    sum += table.distances[block];
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kEveryLane, sum, offset);
  }
  if (id % kWarp == 0) {
    sums[id / kWarp] = sum;
  }
  __syncthreads();
  if (id == 0) {
    double total = 0.0;
    for (int w = 0; w < kSumWarps; ++w) {
      total += sums[w];
    }
    *t.distance = static_cast<float>(total);
  }
}

}  // namespace qk::cuda
