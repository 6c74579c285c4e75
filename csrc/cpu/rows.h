// Rows of centers and the runs of elements they own, and the cut of a row into spans that tasks work on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "../check.h"
#include "../tensor_view.h"
#include "parallel.h"

namespace qk::cpu {

constexpr int kMaxLevels = 256;  // codes are uint8

// G rows of n elements, each with m centers.
struct Rows {
  int64_t count;
  int64_t length;
  int levels;
  const float* centers;

  const float* centers_of(int64_t row) const { return centers + row * levels; }
};

inline Rows rows_of(const char* op, const TensorView& x, const TensorView& centers) {
  const bool shaped =
      (centers.dim() == 1 || centers.dim() == 2) && centers.sizes.back() >= 2 && centers.sizes.back() <= kMaxLevels;
  QK_CHECK(shaped, text(op, ": centers must be [m] or [G, m] with m from 2 to ", kMaxLevels),
           "shape " + shape_of(centers.sizes));
  const int64_t count = centers.dim() == 2 ? centers.sizes[0] : 1;
  const int64_t numel = x.numel();
  const bool even = count > 0 ? numel % count == 0 : numel == 0;
  QK_CHECK(even, text(op, ": the rows of centers must divide the number of elements evenly"),
           text(count, " rows for ", numel, " elements"));
  return {count, count > 0 ? numel / count : 0, static_cast<int>(centers.sizes.back()), centers.as<float>()};
}

// A sharpness or strength: one for all rows or one for each.
struct PerRow {
  const float* values;
  int64_t stride;

  float of(int64_t row) const { return values[row * stride]; }
};

inline PerRow per_row(const char* op, const char* name, const TensorView& tensor, const Rows& rows) {
  const int64_t count = tensor.numel();
  QK_CHECK(count == 1 || count == rows.count, text(op, ": ", name, " must have shape [1] or [", rows.count, "]"),
           "shape " + shape_of(tensor.sizes));
  return {tensor.as<float>(), count == 1 ? 0 : 1};
}

inline void check_same(const char* op, const char* name, const TensorView& tensor, const TensorView& like) {
  QK_CHECK(tensor.sizes == like.sizes, text(op, ": ", name, " must have shape ", shape_of(like.sizes)),
           shape_of(tensor.sizes));
}

inline void check_same_dtype(const char* op, const char* name, const TensorView& tensor, const TensorView& like) {
  check_same(op, name, tensor, like);
  QK_CHECK(tensor.dtype == like.dtype, text(op, ": ", name, " must be ", name_of(like.dtype)), name_of(tensor.dtype));
}

// A row is cut into spans of whole blocks. The cut follows from the shape alone: sums are float32 within a block,
// float64 across the blocks of a span and across spans, all in order. At most about kSpans spans keep the scratch
// small.
constexpr int64_t kBlock = 4096;
constexpr int64_t kSpans = 128;

struct Spans {
  int64_t length;   // elements of a row
  int64_t span;     // elements of a span, the last of a row may be shorter
  int64_t per_row;  // at least 1, so that empty rows are visited too
  int64_t count;
};

inline Spans spans_of(const Rows& rows) {
  const int64_t blocks = (rows.length + kBlock - 1) / kBlock;
  const int64_t wanted =
      std::clamp<int64_t>(kSpans / std::max<int64_t>(rows.count, 1), 1, std::max<int64_t>(blocks, 1));
  const int64_t span = std::max<int64_t>((blocks + wanted - 1) / wanted, 1) * kBlock;
  const int64_t per_row = std::max<int64_t>((rows.length + span - 1) / span, 1);
  return {rows.length, span, per_row, per_row * rows.count};
}

struct Span {
  int64_t index;
  int64_t row;
  int64_t begin;  // elements [begin, end) of the whole tensor
  int64_t end;
};

inline Span span_at(const Spans& spans, int64_t index) {
  const int64_t row = index / spans.per_row;
  const int64_t offset = (index % spans.per_row) * spans.span;
  const int64_t begin = row * spans.length + offset;
  return {index, row, begin, begin + std::min(spans.span, spans.length - offset)};
}

// task(each_span) once a task, in parallel; each_span(body) calls body(const Span&) for the spans of the task in order.
// `work` is the cost of one element in elementary operations.
template <class Task>
void for_each_run_of_spans(int threads, const Spans& spans, int64_t work, Task&& task) {
  const int64_t cost = std::max<int64_t>(std::min(spans.span, spans.length), 1) * work;
  const int64_t grain = std::max<int64_t>(kGrain / cost, 1);
  parallel_for(threads, spans.count, grain, [&](int64_t first, int64_t last) {
    task([&](auto&& body) {
      for (int64_t i = first; i < last; ++i) {
        body(span_at(spans, i));
      }
    });
  });
}

// body(const Span&) for every span, in parallel.
template <class Body>
void for_each_span(int threads, const Spans& spans, int64_t work, Body&& body) {
  for_each_run_of_spans(threads, spans, work, [&](const auto& each_span) { each_span(body); });
}

// body(Span) for the blocks of a span, in order.
template <class Body>
void for_each_block(const Span& span, Body&& body) {
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    body(Span{span.index, span.row, begin, std::min(begin + kBlock, span.end)});
  }
}

}  // namespace qk::cpu
