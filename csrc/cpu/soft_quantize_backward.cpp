// soft_quantize_backward: the sigmoids are computed again, nothing is stored between the passes. One sweep gives both
// gradients. grad_centers: float32 lanes within a block, float64 across blocks and spans, in a fixed order.

#include <algorithm>
#include <limits>

#include "../kernels.h"
#include "../math/soft_quantize.h"
#include "chunk.h"
#include "row_sums.h"
#include "rows.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "soft_quantize_backward";
constexpr int64_t kWorkPerMidpoint = 6;

struct Row {
  int levels;
  float sharpness;
  float midpoints[kMaxLevels - 1];
  float differences[kMaxLevels - 1];

  Row(const float* centers, int levels_, float sharpness_) : levels(levels_), sharpness(sharpness_) {
    for (int j = 0; j + 1 < levels; ++j) {
      midpoints[j] = math::midpoint(centers[j], centers[j + 1]);
      differences[j] = centers[j + 1] - centers[j];
    }
  }
};

// One chunk: grad_x, and g dS/dc_k added to the lanes of center k.
template <int Size, class T>
void run_chunk(const Row& row, const T* grad, const T* x, int valid, T* grad_x, float* lanes) {
  alignas(64) float g[Size];
  alignas(64) float value[Size];
  alignas(64) float slope[Size];    // sum_j d_j b_j
  alignas(64) float s_below[Size];  // s_k of the midpoint below center k
  alignas(64) float db_below[Size];
  alignas(64) float term[Size];
  load_chunk<Size>(grad, valid, 0.0f, g);
  // Padding is a zero gradient at +inf, where every slope is 0: it adds nothing to any sum.
  load_chunk<Size>(x, valid, std::numeric_limits<float>::infinity(), value);
  for (int i = 0; i < Size; ++i) {
    slope[i] = 0.0f;
    s_below[i] = 1.0f;
    db_below[i] = 0.0f;
  }
  const float sharpness = row.sharpness;
  const float half_sharpness = 0.5f * sharpness;
  for (int j = 0; j + 1 < row.levels; ++j) {
    const float t = row.midpoints[j];
    const float d = row.differences[j];
    for (int i = 0; i < Size; ++i) {
      const math::Sigmoid above = math::sigmoid_and_slope(sharpness * (value[i] - t));
      const float db_above = d * above.slope;
      term[i] = g[i] * math::center_slope(s_below[i], above.value, db_below[i], db_above, half_sharpness);
      slope[i] += db_above;
      s_below[i] = above.value;
      db_below[i] = db_above;
    }
    add_to_lanes<Size>(term, lanes + j * kLanes);
  }
  for (int i = 0; i < Size; ++i) {
    term[i] = g[i] * math::center_slope(s_below[i], 0.0f, db_below[i], 0.0f, half_sharpness);
    slope[i] = g[i] * (sharpness * slope[i]);
  }
  add_to_lanes<Size>(term, lanes + (row.levels - 1) * kLanes);
  store_chunk<Size>(slope, valid, grad_x);
}

}  // namespace

void soft_quantize_backward(int threads, View grad, View x, View centers, View sharpness, View grad_x,
                            View grad_centers) {
  const Rows rows = rows_of(kOp, x, centers);
  const PerRow steepness = per_row(kOp, "sharpness", sharpness, rows);
  check_same_dtype(kOp, "grad", grad, x);
  check_same_dtype(kOp, "grad_x", grad_x, x);
  check_same(kOp, "grad_centers", grad_centers, centers);
  for_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    sum_rows(threads, rows, kWorkPerMidpoint * rows.levels, grad_centers.as<float>(),
             [&](const Span& span, double* sums) {
               const Row row(rows.centers_of(span.row), rows.levels, steepness.of(span.row));
               alignas(64) float lanes[kMaxLevels * kLanes];
               for_each_block(span, [&](const Span& block) {
                 std::fill_n(lanes, rows.levels * kLanes, 0.0f);
                 for_each_chunk(block.begin, block.end, [&](auto size, int64_t begin, int valid) {
                   run_chunk<decltype(size)::value>(row, grad.as<T>() + begin, x.as<T>() + begin, valid,
                                                    grad_x.as<T>() + begin, lanes);
                 });
                 for (int k = 0; k < rows.levels; ++k) {
                   sums[k] += sum_of_lanes(lanes + k * kLanes);
                 }
               });
             });
  });
}

}  // namespace qk::cpu
