// The first kernel of quped_step: a block takes a span of a row of one of the tensors through gradient, optimizer,
// prox, codes and counts. Reads weights, gradients and state once and writes weights, state and codes once.
#pragma once

#include "elements.h"
#include "quped_cells.h"
#include "quped_rows.h"
#include "quped_weights.h"

namespace qk::cuda {

// Codes of a tile: a thread's four are neighbours.
__device__ __forceinline__ void store_codes(const Tile& tile, uint8_t* to, const int (&code)[kStepElements]) {
  uint8_t* const mine = to + tile.thread * kStepElements;
  if (tile.left >= tile.threads * kStepElements && (reinterpret_cast<uintptr_t>(to) & 3u) == 0) {
    *reinterpret_cast<uint32_t*>(mine) = static_cast<uint32_t>(code[0]) | static_cast<uint32_t>(code[1]) << 8 |
                                         static_cast<uint32_t>(code[2]) << 16 | static_cast<uint32_t>(code[3]) << 24;
  } else {
#pragma unroll
    for (int e = 0; e < kStepElements; ++e) {
      if (tile.index_of<float>(e) < tile.left) {
        mine[e] = static_cast<uint8_t>(code[e]);
      }
    }
  }
}

// kSoft: the chain is the soft quantizer's.
template <bool kSoft, bool kAdaptive, bool kNarrow>
__device__ void step_span(const StepTable& table, const StepTensor& t, float* shared) {
  constexpr int kCount = kStepElements;
  const Cut& cut = t.cut;
  const int levels = t.levels, rows = cut.rows_a_block(), id = static_cast<int>(threadIdx.x);
  const Place at(cut, static_cast<int64_t>(blockIdx.x) - t.first_block);
  const StepLayout layout(table.chain, table.l1, levels, rows, kNarrow);
  const PartialWords words(table.chain, table.l1, levels);
  int* const flags = reinterpret_cast<int*>(shared + layout.again);
  for (int i = id; i < rows; i += kThreads) {
    flags[i] = table.clamp ? 1 : 0;
  }
  for (int i = layout.chain + id; i < layout.totals; i += kThreads) {
    shared[i] = 0.0f;
  }
  __syncthreads();

  const bool exists = at.row < cut.rows;
  const float* const c = t.centers + (exists ? at.row * levels : 0);
  float* const edges = shared + layout.edges + (at.local << layout.steps);
  float* const own = shared + layout.own + at.local * levels;
  int* const first = reinterpret_cast<int*>(shared + layout.first) + at.local * levels;
  BackwardGroup* const groups = reinterpret_cast<BackwardGroup*>(shared + layout.tables) + at.local * layout.groups;
  make_cells(c, levels, layout.steps, at.thread, cut.row_threads(), edges, own, first, flags + at.local);
  float P = 1.0f;
  if constexpr (kSoft) {
    P = exists ? t.sharpness[at.row * t.sharpness_stride] : 1.0f;
  }
  const SoftRate rate(P);
  if constexpr (kSoft) {
    for (int g = at.thread; g < layout.groups; g += cut.row_threads()) {
      groups[g] = BackwardGroup(c, levels, g, P, rate.stretch);
    }
  }
  __syncthreads();

  const StepCells cells{edges, own, first, layout.steps};
  const bool again = flags[at.local] != 0;
  const float strength = exists ? t.strength[at.row * t.strength_stride] : 0.0f;
  const float pull = table.l1 ? strength : math::prox_l2_share(strength);
  Columns<kNarrow> chained(shared + layout.chain);
  unsigned* const counters = reinterpret_cast<unsigned*>(shared + layout.counts);
  float distance = 0.0f;
  const int64_t step = int64_t{kCount} << cut.row_shift;
  for (int64_t begin = at.begin; begin < at.end; begin += step) {
    const Tile tile{at.thread, cut.row_threads(), at.end - begin};
    const int64_t offset = at.row * cut.length + begin;
    float x[kCount], g[kCount], mean[kCount], square[kCount];
    tile.load(t.x + offset, x);
    if (table.chain != Chain::kNone) {
      float through[kCount];
      tile.load(t.through + offset, through);
      if constexpr (kSoft) {
        float stretched[kCount];
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          stretched[e] = x[e] * rate.stretch;
        }
        soft_gradient(groups, layout.groups, rate, stretched, through, g, chained);
      } else {
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          const bool here = tile.index_of<float>(e) < tile.left;
          add_by_cell<kNarrow>(shared + layout.chain, first[cells.passed(x[e])], through[e], here);
          g[e] = table.chain == Chain::kStraightThrough ? through[e] : 0.0f;
        }
      }
    }
    if (t.grad != nullptr) {
      float direct[kCount];
      tile.load(t.grad + offset, direct);
      const bool alone = table.chain == Chain::kNone || table.chain == Chain::kHard;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        g[e] = alone ? direct[e] : direct[e] + g[e];
      }
    }
    const bool reads_first = t.first != nullptr && (kAdaptive || !table.factors.first_step);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      mean[e] = square[e] = 0.0f;
    }
    if (reads_first) {
      tile.load(static_cast<const float*>(t.first) + offset, mean);
    }
    if constexpr (kAdaptive) {
      tile.load(static_cast<const float*>(t.second) + offset, square);
    }
    int code[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const bool here = tile.index_of<float>(e) < tile.left;
      const float y = moved_weight<kAdaptive>(table.factors, x[e], g[e], mean[e], square[e]);
      int cell = cells.passed(y);
      float value = prox(y, y == y ? own[cell] : y, pull, table.l1);
      if (again) {
        value = table.clamp ? clamped(value) : value;
        cell = cells.passed(value);
      }
      cell = value == value ? first[cell] : 0;  // an infinite weight can become NaN
      const float gap = value - own[cell];
      x[e] = value;
      code[e] = cell;
      if (here) {
        count_cell<kNarrow>(counters, levels, cell, gap > 0.0f ? 1 : gap < 0.0f ? 2 : 0);
        distance += table.l1 ? fabsf(gap) : gap * gap;
      }
      if (!table.l1) {
        add_by_cell<kNarrow>(shared + layout.sums, cell, gap, here);
      }
    }
    tile.store(t.x + offset, x);
    if (t.first != nullptr) {
      tile.store(t.first + offset, mean);
    }
    if constexpr (kAdaptive) {
      tile.store(t.second + offset, square);
    }
    if (t.codes != nullptr) {
      store_codes(tile, t.codes + offset, code);
    }
  }

  distance = warp_sum(distance);
  if (id % kWarp == 0) {
    shared[layout.distance + id / kWarp] = distance;
  }
  __syncthreads();
  float* const totals = shared + layout.totals;
  chained.total(cut, words.chain, totals);
  Columns<kNarrow>(shared + layout.sums).total(cut, words.sums, totals + words.chain * rows);
  total_counts<kNarrow>(cut, counters, levels, reinterpret_cast<unsigned*>(totals + (words.chain + words.sums) * rows));
  __syncthreads();
  if (id == 0) {
    double sum = 0.0;
    for (int w = 0; w < kWarps; ++w) {
      sum += static_cast<double>(shared[layout.distance + w]);
    }
    table.distances[blockIdx.x] = sum;
  }
  if (cut.spans > 1) {
    float* const mine = t.partials + (static_cast<int64_t>(blockIdx.x) - t.first_block) * words.all();
    for (int i = id; i < words.all(); i += kThreads) {
      mine[i] = totals[i];
    }
  } else if (exists) {
    const auto float_of = [&](int word) { return totals[word * rows + at.local]; };
    const auto count_of = [&](int word) { return static_cast<int64_t>(__float_as_uint(float_of(word))); };
    for (int k = at.thread; k < levels; k += cut.row_threads()) {
      write_center(table, t, at.row, k, P, words, float_of, count_of);
    }
  }
}

}  // namespace qk::cuda
