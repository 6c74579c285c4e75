// soft_quantize from the two midpoints beside x alone, where a row's sharpness is large enough for that.
//
// Between two midpoints all others are at least g away, the smallest distance of two. Above, their s_j add up to at
// most D (q + q^2 + ...), q = exp(-P g), D the largest step, and 1 - s_j below likewise: where 2 D q / (1 - q) <= u
// max|c|, leaving them out costs less than one of the m - 1 additions that are saved, each of which may round by u
// max|c|.
#pragma once

#include "soft_group.h"

namespace qk::cuda {

constexpr int kLeastWindowLevels = 5;
constexpr int64_t kLeastWindowTiles = 2;  // of a span: the tables are made by few threads

// Midpoint j of a row, stretched.
__device__ inline float midpoint_position(const float* c, int j, float stretch) {
  return static_cast<float>((0.5 * static_cast<double>(c[j]) + 0.5 * static_cast<double>(c[j + 1])) * stretch);
}

// The smallest distance of a midpoint to the next; infinite where there is one alone.
__device__ inline double smallest_gap(const float* c, int levels) {
  double gap = INFINITY;
  for (int j = 0; j + 2 < levels; ++j) {
    const double between = 0.5 * (static_cast<double>(c[j + 2]) - static_cast<double>(c[j]));
    gap = between < gap ? between : gap;
  }
  return gap;
}

// Of the elements between midpoint k - 1 and midpoint k, positions stretched.
struct alignas(16) WindowCell {
  float lower, upper;  // positions
  float lower_step, upper_step;
  float base;  // S below both
  float unused[3];
};

QK_HD int window_steps(int levels) {
  int steps = 1;
  while (1 << steps < levels) {
    ++steps;
  }
  return steps;
}

struct WindowTable {
  WindowCell* cells;  // [levels]
  float* edges;       // [2^steps], infinite past the last
  int steps;

  static QK_HD size_t bytes(int levels) {
    return sizeof(WindowCell) * static_cast<size_t>(levels) + (sizeof(float) << window_steps(levels));
  }

  __device__ WindowTable(char* memory, int levels)
      : cells(reinterpret_cast<WindowCell*>(memory)),
        edges(reinterpret_cast<float*>(cells + levels)),
        steps(window_steps(levels)) {}

  __device__ void fill(const float* c, int levels, float stretch, int thread, int threads) const {
    const auto position = [&](int j) { return midpoint_position(c, j, stretch); };
    for (int k = thread; k < levels; k += threads) {
      const bool below = k > 0, above = k + 1 < levels;
      WindowCell& cell = cells[k];
      cell.lower = below ? position(k - 1) : -kFarAway;
      cell.upper = above ? position(k) : kFarAway;
      cell.lower_step = below ? c[k] - c[k - 1] : 0.0f;
      cell.upper_step = above ? c[k + 1] - c[k] : 0.0f;
      cell.base = c[below ? k - 1 : 0];
    }
    for (int k = thread; k < 1 << steps; k += threads) {
      edges[k] = k + 1 < levels ? position(k) : INFINITY;
    }
  }

  // S before it is held within the outer centers; x stretched. NaN stays.
  __device__ __forceinline__ float sum(const SoftRate& rate, float x) const {
    int k = 0;
    for (int step = 1 << (steps - 1); step > 0; step /= 2) {
      k += x > edges[k + step - 1] ? step : 0;
    }
    const WindowCell cell = cells[k];
    const float low = 1.0f + exp2_approx(min_or_nan(rate.exponent(x, cell.lower), ForwardGroup::kOwnMost));
    const float high = 1.0f + exp2_approx(min_or_nan(rate.exponent(x, cell.upper), ForwardGroup::kOwnMost));
    const float above = QK_FMA(cell.lower_step, high, cell.upper_step * low);
    return QK_FMA(above, rcp_approx(low * high), cell.base);
  }
};

// Whether the row may be computed so, by one thread.
__device__ inline bool window_suffices(const float* c, int levels, float sharpness) {
  double step = 0.0;
  for (int j = 0; j + 1 < levels; ++j) {
    const double between = static_cast<double>(c[j + 1]) - static_cast<double>(c[j]);
    step = between > step ? between : step;
  }
  const double largest = fmax(fabs(static_cast<double>(c[0])), fabs(static_cast<double>(c[levels - 1])));
  const double q = exp2(-kLog2E * static_cast<double>(sharpness) * smallest_gap(c, levels));
  return 2.0 * step * q <= 0x1p-24 * largest * (1.0 - q);
}

}  // namespace qk::cuda
