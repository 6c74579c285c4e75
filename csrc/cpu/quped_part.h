// What the two halves of quped_step pass on over a run of elements of one row: moved weights in, new weights, their
// cells and what is counted of them out. quped_narrow.h and quped_wide.h make the second half of it: nearest center,
// prox, clamp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../math/prox_weights.h"
#include "cells.h"
#include "quped_optimizer.h"
#include "simd_bits.h"

namespace qk::cpu {

constexpr int kPart = 1024;  // elements whose moved weights wait in L1

struct Prox {
  bool l1;
  float strength;  // l1: t; l2: the share of the way
  float bound;     // of |x|; infinite without clamp
  bool again;      // whether the new weight may lie in another cell than the moved one

  Prox(bool l1_, bool clamp, float t, const Cells& cells)
      : l1(l1_),
        strength(l1_ ? t : math::prox_l2_share(t)),
        bound(clamp ? 1.0f : std::numeric_limits<float>::infinity()),
        again(clamp) {
    // The prox leaves no cell, but a center that is its own lower midpoint, an ulp from the next, is not in its cell.
    for (int k = 1; k < cells.levels; ++k) {
      again = again || (cells.first[k] == k && !math::is_above(cells.values[k], cells.midpoints[k - 1]));
    }
  }
};

// What one span finds out, by center.
struct SpanTotals {
  explicit SpanTotals(int levels) {
    const int rounded = std::max(levels, 16);  // NarrowRow adds to all its fields
    for (int64_t* counts : {members, above, below}) {
      std::fill_n(counts, rounded, int64_t{0});
    }
    std::fill_n(sums, rounded, 0.0);
    std::fill_n(center_grad, rounded, 0.0);
  }

  int64_t members[kMaxLevels];
  int64_t above[kMaxLevels];
  int64_t below[kMaxLevels];
  double sums[kMaxLevels];         // of x - c over the members
  double center_grad[kMaxLevels];  //
  double distance = 0.0;
};

// One run of elements: moved weights in, new weights out; cells and gaps of the new weights for sums.
struct Part {
  alignas(64) float moved[kPart];
  alignas(64) int32_t cell[kPart];  // midpoints passed: of equal centers not yet the first
  alignas(64) float gap[kPart];     // x - c
};

// Moved weights that wait in a buffer, which is readable up to a whole vector. The next run's streams are fetched
// meanwhile: nothing else reads memory.
struct Buffered {
  static constexpr bool kBuffered = true;
  const float* moved;
  const float* next[4];  // repeated where there are fewer streams

  QK_HD Vec whole(int i) const {
    for (const float* stream : next) {
      fetch(stream + i);
    }
    return load(moved + i);
  }
  QK_HD Vec some(int i, int) const { return load(moved + i); }
};

}  // namespace qk::cpu
