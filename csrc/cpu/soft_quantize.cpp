// soft_quantize: one read, one exponential and one write an element. Spans of a row in parallel. Bound by the
// multipliers: five operations a midpoint, the reciprocal's three among them, and the exponential's six; for two
// centers in memory by memory.

#include "../kernels.h"
#include "rows.h"
#include "soft_row.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "soft_quantize";
constexpr int64_t kWorkPerMidpoint = 3;

template <Groups kKind, int N>
QK_HD void soft_vectors(const SoftRow& row, const Vec (&x)[N], Vec (&sum)[N]) {
  const Vec one = splat(1.0f), lowest = splat(row.lowest), highest = splat(row.highest);
  Vec clamped[N];
  for (int i = 0; i < N; ++i) {
    clamped[i] = clamp_to(row, x[i]);
    sum[i] = lowest;
  }
  for_each_midpoint<kKind>(row, clamped, [&](int j, const Vec(&power)[N]) {
    const Vec factor = splat(row.factor[j]), step = splat(row.step[j]);
    for (int i = 0; i < N; ++i) {
      sum[i] = fma(step, reciprocal(fma(power[i], factor, one)), sum[i]);
    }
  });
  for (int i = 0; i < N; ++i) {
    // The sum of rounded terms can pass the ends; NaN stays.
    sum[i] = smaller(highest, larger(lowest, sum[i]));
    if (any(x[i] != clamped[i])) {  // far out S is the last center, which the sum can stop short of
      sum[i] = select(splat(row.x_max) < x[i], highest, select(x[i] < splat(row.x_min), lowest, sum[i]));
    }
  }
}

template <Groups kKind, class T>
void run_span(const SoftRow& row, const T* x, int64_t n, bool streamed, T* out) {
  int64_t begin = 0;
  for (; begin + kInterleave * kVec <= n; begin += kInterleave * kVec) {
    Vec value[kInterleave], sum[kInterleave];
    for (int i = 0; i < kInterleave; ++i) {
      value[i] = load(x + begin + i * kVec);
    }
    soft_vectors<kKind>(row, value, sum);
    for (int i = 0; i < kInterleave; ++i) {
      store_or_stream(sum[i], streamed, out + begin + i * kVec);
    }
  }
  for (; begin < n; begin += kVec) {
    const int valid = static_cast<int>(std::min<int64_t>(kVec, n - begin));
    const Vec value[1] = {load_some(x + begin, valid)};
    Vec sum[1];
    soft_vectors<kKind>(row, value, sum);
    store_some(sum[0], valid, out + begin);
  }
}

}  // namespace

void soft_quantize(int threads, View x, View centers, View sharpness, View out) {
  const Rows rows = rows_of(kOp, x, centers);
  const PerRow steepness = per_row(kOp, "sharpness", sharpness, rows);
  check_same_dtype(kOp, "out", out, x);
  for_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_span(threads, spans_of(rows), kWorkPerMidpoint * rows.levels, [&](const Span& span) {
      const SoftRow row(rows.centers_of(span.row), rows.levels, steepness.of(span.row), Midpoints::kDistinct);
      const T* from = x.as<T>() + span.begin;
      T* to = out.as<T>() + span.begin;
      const int64_t n = span.end - span.begin;
      const bool streamed = should_stream(to, x.numel());
      switch (row.kind) {
        case Groups::kOne:
          run_span<Groups::kOne>(row, from, n, streamed, to);
          break;
        case Groups::kShared:
          run_span<Groups::kShared>(row, from, n, streamed, to);
          break;
        case Groups::kOwn:
          run_span<Groups::kOwn>(row, from, n, streamed, to);
          break;
      }
      if (streamed) {
        end_stream();
      }
    });
  });
}

}  // namespace qk::cpu
