// soft_quantize: one read, one exponential and one write an element. Spans of a row in parallel. Bound by the
// multipliers: five operations a midpoint, the reciprocal's three among them, and the exponential's six; a long row
// with many midpoints by the lookups of soft_window.h; two centers in memory by memory.

#include <vector>

#include "../kernels.h"
#include "rows.h"
#include "soft_row.h"
#include "soft_window.h"
#include "span_list.h"

namespace qk::cpu {
namespace {

constexpr int64_t kWorkPerMidpoint = 3;

// The coefficients of SoftWindow take about as long as this many elements.
constexpr int64_t kWindowLength = 4096;

struct Forward {
  SoftRow row;
  SoftWindow window;

  Forward(const Rows& rows, int64_t index, float sharpness)
      : row(rows.centers_of(index), rows.levels, sharpness, Midpoints::kDistinct),
        window(row, rows.length >= kWindowLength) {}
};

// Into [c_1, c_m], which the sum of rounded terms can leave; past the range that x was clamped to it is an outer
// center, which the sum can stop short of. NaN stays.
QK_HD Vec into_range(const SoftRow& row, Vec sum, Vec x, Vec clamped, float x_min, float x_max) {
  const Vec lowest = splat(row.lowest), highest = splat(row.highest);
  const Vec inside = smaller(highest, larger(lowest, sum));
  if (any(x != clamped)) {
    return select(splat(x_max) < x, highest, select(x < splat(x_min), lowest, inside));
  }
  return inside;
}

template <Groups kKind>
struct EveryMidpoint {
  template <int N>
  static QK_HD void run(const Forward& with, const Vec (&x)[N], Vec (&sum)[N]) {
    const SoftRow& row = with.row;
    const Vec one = splat(1.0f);
    Vec clamped[N];
    for (int i = 0; i < N; ++i) {
      clamped[i] = clamp_to(row, x[i]);
      sum[i] = splat(row.lowest);
    }
    for_each_midpoint<kKind>(row, clamped, [&](const SoftMidpoint& midpoint, const Vec(&power)[N]) {
      const Vec factor = splat(midpoint.factor), step = splat(midpoint.step);
      for (int i = 0; i < N; ++i) {
        sum[i] = fma(step, reciprocal(fma(power[i], factor, one)), sum[i]);
      }
    });
    for (int i = 0; i < N; ++i) {
      sum[i] = into_range(row, sum[i], x[i], clamped[i], row.x_min, row.x_max);
    }
  }
};

struct NearMidpoints {
  template <int N>
  static QK_HD void run(const Forward& with, const Vec (&x)[N], Vec (&sum)[N]) {
    sums_near(with.row, with.window, x, sum);
    for (int i = 0; i < N; ++i) {
      const Vec clamped = with.window.clamp(x[i]);
      sum[i] = into_range(with.row, sum[i], x[i], clamped, with.window.x_min, with.window.x_max);
    }
  }
};

template <class Method, class T>
void run_span(const Forward& with, const T* x, int64_t n, T* out) {
  constexpr int kStep = kInterleave * kVec;
  for (; n >= kStep; n -= kStep, x += kStep, out += kStep) {
    Vec value[kInterleave], sum[kInterleave];
    for (int i = 0; i < kInterleave; ++i) {
      value[i] = load(x + i * kVec);
    }
    Method::run(with, value, sum);
    for (int i = 0; i < kInterleave; ++i) {
      store(sum[i], out + i * kVec);
    }
  }
  for (; n > 0; n -= kVec, x += kVec, out += kVec) {
    const int valid = static_cast<int>(std::min<int64_t>(kVec, n));
    const Vec value[1] = {load_some(x, valid)};
    Vec sum[1];
    Method::run(with, value, sum);
    store_some(sum[0], valid, out);
  }
}

template <class T>
void soft_quantize_all(const Forward& with, const T* x, int64_t n, T* out) {
  if (with.window.terms > 0) {
    return run_span<NearMidpoints>(with, x, n, out);
  }
  switch (with.row.kind) {
    case Groups::kOne:
      return run_span<EveryMidpoint<Groups::kOne>>(with, x, n, out);
    case Groups::kShared:
      return run_span<EveryMidpoint<Groups::kShared>>(with, x, n, out);
    case Groups::kOwn:
      return run_span<EveryMidpoint<Groups::kOwn>>(with, x, n, out);
  }
}

struct Item {
  Rows rows;
  PerRow steepness;
  const TensorView* x;
  const TensorView* out;
  std::vector<Forward> shared;  // of rows that several spans work on: few, then

  Item(const char* op, View x_, View centers, View sharpness, View out_)
      : rows(rows_of(op, x_, centers)), steepness(per_row(op, "sharpness", sharpness, rows)), x(&x_), out(&out_) {
    check_same_dtype(op, "out", out_, x_);
    if (spans_of(rows).per_row > 1) {
      shared.reserve(static_cast<size_t>(rows.count));
      for (int64_t row = 0; row < rows.count; ++row) {
        shared.emplace_back(rows, row, steepness.of(row));
      }
    }
  }

  int64_t work() const { return kWorkPerMidpoint * rows.levels; }

  void run(const Span& span) const {
    if (shared.empty()) {
      run(Forward(rows, span.row, steepness.of(span.row)), span);
    } else {
      run(shared[static_cast<size_t>(span.row)], span);
    }
  }

 private:
  void run(const Forward& with, const Span& span) const {
    for_float_type(x->dtype, [&](auto type) {
      using T = decltype(type);
      const T* from = x->as<T>() + span.begin;
      T* to = out->as<T>() + span.begin;
      if (!should_stream(to, x->numel())) {
        return soft_quantize_all(with, from, span.end - span.begin, to);
      }
      alignas(64) T ready[kBlock];  // of a block on its way past the caches
      for_each_block(span, [&](const Span& block) {
        const int64_t offset = block.begin - span.begin, n = block.end - block.begin;
        soft_quantize_all(with, from + offset, n, ready);
        stream_block(ready, n, to + offset);
      });
      end_stream();
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
