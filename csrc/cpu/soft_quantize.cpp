// soft_quantize: one read, one exponential and one write an element. Spans of a row in parallel. Bound by the
// multipliers: five operations a midpoint, the reciprocal's three among them, and the exponential's six; for two
// centers in memory by memory.

#include "../kernels.h"
#include "rows.h"
#include "soft_row.h"
#include "span_list.h"

namespace qk::cpu {
namespace {

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

struct Item {
  Rows rows;
  PerRow steepness;
  const TensorView* x;
  const TensorView* out;

  Item(const char* op, View x_, View centers, View sharpness, View out_)
      : rows(rows_of(op, x_, centers)), steepness(per_row(op, "sharpness", sharpness, rows)), x(&x_), out(&out_) {
    check_same_dtype(op, "out", out_, x_);
  }

  int64_t work() const { return kWorkPerMidpoint * rows.levels; }

  void run(const Span& span) const {
    const SoftRow row(rows.centers_of(span.row), rows.levels, steepness.of(span.row), Midpoints::kDistinct);
    for_float_type(x->dtype, [&](auto type) {
      using T = decltype(type);
      const T* from = x->as<T>() + span.begin;
      T* to = out->as<T>() + span.begin;
      const int64_t n = span.end - span.begin;
      const bool streamed = should_stream(to, x->numel());
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
  }
};

}  // namespace

void soft_quantize(int threads, View x, View centers, View sharpness, View out) {
  const Item item("soft_quantize", x, centers, sharpness, out);
  for_each_span(threads, spans_of(item.rows), item.work(), [&](const Span& span) { item.run(span); });
}

void foreach_soft_quantize(int threads, Views x, Views centers, Views sharpness, Views out) {
  constexpr const char* kOp = "foreach_soft_quantize";
  check_count(kOp, "centers", centers.size(), x.size());
  check_count(kOp, "sharpness", sharpness.size(), x.size());
  check_count(kOp, "out", out.size(), x.size());
  std::vector<Item> items;
  SpanList spans;
  for (size_t i = 0; i < x.size(); ++i) {
    items.emplace_back(kOp, x[i], centers[i], sharpness[i], out[i]);
    spans.add(items[i].rows, items[i].work());
  }
  spans.for_each(threads, [&](size_t i, const Span& span) { items[i].run(span); });
}

}  // namespace qk::cpu
