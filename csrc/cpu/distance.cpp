// distance: one read of x; the comparisons with the midpoints bound it from m of about 8. Summed in float32 lanes
// within a block, in float64 across blocks, spans and rows, in order.

#include "../math/distance.h"

#include <vector>

#include "../kernels.h"
#include "cells.h"
#include "chunk.h"
#include "rows.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "distance";

template <class T, class Term>
double sum_of_span(const T* x, const Cells& cells, const Span& span, Term term) {
  double sum = 0.0;
  for_each_block(span, [&](const Span& block) {
    alignas(64) float lanes[kLanes] = {};
    for_each_chunk(block.begin, block.end, [&](auto size, int64_t begin, int valid) {
      constexpr int Size = decltype(size)::value;
      alignas(64) float value[Size];
      alignas(64) float nearest[Size];
      load_chunk<Size>(x + begin, valid, cells.values[0], value);  // padding on a center adds nothing
      nearest_of<Size>(cells, value, nearest);
      for (int i = 0; i < Size; ++i) {
        value[i] = term(value[i] - nearest[i]);
      }
      add_to_lanes<Size>(value, lanes);
    });
    sum += sum_of_lanes(lanes);
  });
  return sum;
}

}  // namespace

void distance(int threads, View x, View centers, const std::string& norm, View out) {
  QK_CHECK(norm == "l1" || norm == "l2", text(kOp, ": norm must be 'l1' or 'l2'"), "'" + norm + "'");
  QK_CHECK(out.numel() == 1, text(kOp, ": out must have one element"), "shape " + shape_of(out.sizes));
  const Rows rows = rows_of(kOp, x, centers);
  const Spans spans = spans_of(rows);
  std::vector<double> partial(static_cast<size_t>(spans.count));
  for_float_type(x.dtype, [&](auto type) {
    const auto* values = x.as<decltype(type)>();
    for_each_span(threads, spans, rows.levels, [&](const Span& span) {
      const Cells cells(rows.centers_of(span.row), rows.levels);
      partial[static_cast<size_t>(span.index)] =
          norm == "l1" ? sum_of_span(values, cells, span, [](float gap) { return math::distance_l1(gap); })
                       : sum_of_span(values, cells, span, [](float gap) { return math::distance_l2(gap); });
    });
  });
  double sum = 0.0;
  for (double part : partial) {
    sum += part;
  }
  *out.as<float>() = static_cast<float>(sum);
}

}  // namespace qk::cpu
