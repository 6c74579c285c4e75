// sum_rows: m sums over each row, the same bits for any number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace qk::cpu {

// add(span, sums) adds the terms of one span to sums [m], which start at zero; spans of a row are then added in order
// and rounded once into out [G, m], every element of which is written.
template <class Add>
void sum_rows(int threads, const Rows& rows, int64_t work, float* out, Add&& add) {
  const Spans spans = spans_of(rows);
  const int levels = rows.levels;
  if (spans.per_row == 1) {
    for_each_span(threads, spans, work, [&](const Span& span) {
      double sums[kMaxLevels] = {};
      add(span, sums);
      for (int k = 0; k < levels; ++k) {
        out[span.row * levels + k] = static_cast<float>(sums[k]);
      }
    });
    return;
  }
  std::vector<double> partial(static_cast<size_t>(spans.count * levels));  // at most about kSpans rows of m
  for_each_span(threads, spans, work, [&](const Span& span) { add(span, partial.data() + span.index * levels); });
  for (int64_t row = 0; row < rows.count; ++row) {
    for (int k = 0; k < levels; ++k) {
      double sum = 0.0;
      for (int64_t i = row * spans.per_row; i < (row + 1) * spans.per_row; ++i) {
        sum += partial[static_cast<size_t>(i * levels + k)];
      }
      out[row * levels + k] = static_cast<float>(sum);
    }
  }
}

}  // namespace qk::cpu
