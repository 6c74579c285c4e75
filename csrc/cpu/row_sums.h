// m sums over each row, the same bits for any number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace qk::cpu {

class RowSums {
 public:
  // out [G, m], every element of which is written by the time finish returns.
  RowSums(const Rows& rows, float* out) : rows_(rows), spans_(spans_of(rows)), out_(out) {
    if (spans_.per_row > 1) {
      partial_.resize(static_cast<size_t>(spans_.count * rows_.levels));  // at most about kSpans rows of m
    }
  }

  // body(span, sums) adds the terms of one span to sums [m], which start at zero. Different spans may be added at once.
  template <class Body>
  void add(const Span& span, Body&& body) {
    if (spans_.per_row > 1) {
      body(span, partial_.data() + span.index * rows_.levels);
      return;
    }
    double sums[kMaxLevels] = {};
    body(span, sums);
    for (int k = 0; k < rows_.levels; ++k) {
      out_[span.row * rows_.levels + k] = static_cast<float>(sums[k]);
    }
  }

  // Adds the spans of each row in order and rounds once.
  void finish() {
    const int levels = rows_.levels;
    for (int64_t row = 0; spans_.per_row > 1 && row < rows_.count; ++row) {
      for (int k = 0; k < levels; ++k) {
        double sum = 0.0;
        for (int64_t i = row * spans_.per_row; i < (row + 1) * spans_.per_row; ++i) {
          sum += partial_[static_cast<size_t>(i * levels + k)];
        }
        out_[row * levels + k] = static_cast<float>(sum);
      }
    }
  }

 private:
  Rows rows_;
  Spans spans_;
  float* out_;
  std::vector<double> partial_;
};

// The sums of one tensor, as RowSums makes them.
template <class Body>
void sum_rows(int threads, const Rows& rows, int64_t work, float* out, Body&& body) {
  RowSums sums(rows, out);
  for_each_span(threads, spans_of(rows), work, [&](const Span& span) { sums.add(span, body); });
  sums.finish();
}

}  // namespace qk::cpu
