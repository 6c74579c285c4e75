// Cells of one row of centers: which one an element falls into, and the center it holds. All loops have constant
// lengths.
#pragma once

#include <cstdint>

#include "../math/cell.h"
#include "rows.h"

namespace qk::cpu {

// Of equal centers the first owns the cell.
struct Cells {
  int levels;
  bool repeats = false;
  float midpoints[kMaxLevels - 1];
  float values[kMaxLevels];
  int32_t first[kMaxLevels];

  Cells(const float* centers, int levels_) : levels(levels_) {
    for (int k = 0; k < levels; ++k) {
      const bool equal = k > 0 && centers[k] == centers[k - 1];
      first[k] = equal ? first[k - 1] : k;
      values[k] = centers[first[k]];
      repeats = repeats || equal;
      if (k > 0) {
        midpoints[k - 1] = math::midpoint(centers[k - 1], centers[k]);
      }
    }
  }
};

// code = #{j : x > t_j}, mapped to the first of equal centers; NaN gives 0.
template <int Size>
void codes_of(const Cells& cells, const float* value, int32_t* code) {
  int32_t count[Size] = {};
  for (int j = 0; j + 1 < cells.levels; ++j) {
    const float t = cells.midpoints[j];
    for (int i = 0; i < Size; ++i) {
      count[i] += math::is_above(value[i], t) ? 1 : 0;
    }
  }
  for (int i = 0; i < Size; ++i) {
    code[i] = cells.repeats ? cells.first[count[i]] : count[i];
  }
}

// The center of each element's cell, the same as values[code]; NaN stays NaN.
template <int Size>
void nearest_of(const Cells& cells, const float* value, float* nearest) {
  for (int i = 0; i < Size; ++i) {
    nearest[i] = cells.values[0];
  }
  for (int j = 0; j + 1 < cells.levels; ++j) {
    const float t = cells.midpoints[j];
    const float center = cells.values[j + 1];
    for (int i = 0; i < Size; ++i) {
      nearest[i] = math::is_above(value[i], t) ? center : nearest[i];
    }
  }
  for (int i = 0; i < Size; ++i) {
    nearest[i] = value[i] != value[i] ? value[i] : nearest[i];
  }
}

}  // namespace qk::cpu
