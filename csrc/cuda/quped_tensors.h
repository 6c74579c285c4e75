// What the kernels of quped_step are told: a table of tensors, passed by value so that a launch needs no copy to the
// device and a captured graph holds it; and where a block keeps what.
#pragma once

#include "../math/step_factors.h"
#include "columns.h"
#include "soft_gradient.h"

namespace qk::cuda {

enum class Chain { kNone, kSoft, kHard, kStraightThrough };

constexpr int kStepTensors = 18;     // the table stays below the 4 KB that every driver takes
constexpr int kStepElements = 4;     // of a tile, a thread
constexpr int64_t kStepTiles = 250;  // of a span: counts of a thread stay below 2^10
constexpr int kNarrowLevels = 16;    // up to so many centers each thread has its own columns

// One tensor. Null where there is none.
struct StepTensor {
  float* x;
  const float* grad;
  const float* through;
  float* first;
  float* second;
  uint8_t* codes;
  const float* centers;
  const float* sharpness;
  const float* strength;
  float* center_grad;
  int64_t* counts;
  float* sums;
  float* distance;
  float* partials;  // [blocks, words] where rows have several spans
  Cut cut;
  int levels;
  int sharpness_stride, strength_stride;  // 0 or 1
  int first_block;
  int first_row;  // among the rows of all tensors that have several spans
};

struct StepTable {
  math::StepFactors factors;
  double* distances;  // [blocks]
  Chain chain;
  bool l1, clamp;
  int count;
  int blocks;
  int rows;  // that have several spans
  StepTensor tensor[kStepTensors];
};
static_assert(sizeof(StepTable) <= 4096, "kernel parameters");

QK_HD int bits_for(int levels) {
  int bits = 1;
  while (1 << bits < levels) {
    ++bits;
  }
  return bits;
}

QK_HD bool by_cell(Chain chain) { return chain == Chain::kHard || chain == Chain::kStraightThrough; }

// Sums of a row for its center_grad.
QK_HD int chain_columns(Chain chain, int levels) {
  return chain == Chain::kSoft ? soft_columns(groups_of(levels)) : by_cell(chain) ? levels : 0;
}

// Words of a partial: chain columns, sums of gaps (l2), then counts on, above and below each center.
struct PartialWords {
  int chain, sums, counts;

  QK_HD PartialWords(Chain how, bool l1, int levels)
      : chain(chain_columns(how, levels)), sums(l1 ? 0 : levels), counts(3 * levels) {}
  QK_HD int all() const { return chain + sums + counts; }
};

// Offsets, in words of 4 bytes, into a block's shared memory. Tables hold those of each of its rows.
struct StepLayout {
  int groups, steps;
  int tables, edges, own, first, again, distance, chain, sums, counts, totals, words;

  QK_HD StepLayout(Chain how, bool l1, int levels, int rows, bool narrow) {
    const int places = narrow ? kThreads : kWarps;
    const PartialWords partial(how, l1, levels);
    groups = how == Chain::kSoft ? groups_of(levels) : 0;
    steps = bits_for(levels);
    int next = 0;
    const auto take = [&next](int count) {
      const int at = next;
      next += (count + 3) / 4 * 4;
      return at;
    };
    tables = take(rows * groups * static_cast<int>(sizeof(BackwardGroup) / 4));
    edges = take(rows << steps);
    own = take(rows * levels);
    first = take(rows * levels);
    again = take(rows);
    distance = take(kWarps);
    chain = take(partial.chain * places);
    sums = take(partial.sums * places);
    counts = take(narrow ? levels * kThreads : 3 * levels);
    totals = take(partial.all() * rows);
    words = next;
  }
  QK_HD size_t bytes() const { return static_cast<size_t>(words) * 4; }
};

}  // namespace qk::cuda
