// soft_quantize: m - 1 sigmoids an element. Spans of a row in parallel; a chunk stays in L1 while the midpoints pass
// over it. Bound by the exponentials.

#include "../math/soft_quantize.h"

#include "../kernels.h"
#include "chunk.h"
#include "rows.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "soft_quantize";
constexpr int64_t kWorkPerMidpoint = 4;

template <class T>
void run_span(const T* x, const float* centers, int levels, float sharpness, const Span& span, T* out) {
  float midpoints[kMaxLevels - 1];
  float differences[kMaxLevels - 1];
  for (int j = 0; j + 1 < levels; ++j) {
    midpoints[j] = math::midpoint(centers[j], centers[j + 1]);
    differences[j] = centers[j + 1] - centers[j];
  }
  const float lowest = centers[0];
  const float highest = centers[levels - 1];
  for_each_chunk(span.begin, span.end, [&](auto size, int64_t begin, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) float value[Size];
    alignas(64) float sum[Size];
    load_chunk<Size>(x + begin, valid, 0.0f, value);
    for (int i = 0; i < Size; ++i) {
      sum[i] = lowest;
    }
    for (int j = 0; j + 1 < levels; ++j) {
      const float t = midpoints[j];
      const float d = differences[j];
      for (int i = 0; i < Size; ++i) {
        sum[i] += math::soft_step(value[i], t, d, sharpness);
      }
    }
    for (int i = 0; i < Size; ++i) {
      sum[i] = math::soft_clamp(sum[i], value[i], lowest, highest);
    }
    store_chunk<Size>(sum, valid, out + begin);
  });
}

}  // namespace

void soft_quantize(int threads, View x, View centers, View sharpness, View out) {
  const Rows rows = rows_of(kOp, x, centers);
  const PerRow steepness = per_row(kOp, "sharpness", sharpness, rows);
  check_same_dtype(kOp, "out", out, x);
  for_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_span(threads, spans_of(rows), kWorkPerMidpoint * rows.levels, [&](const Span& span) {
      run_span(x.as<T>(), rows.centers_of(span.row), rows.levels, steepness.of(span.row), span, out.as<T>());
    });
  });
}

}  // namespace qk::cpu
