// One tensor of quped_step: where its parts are, and how what its spans find out becomes its outputs. Spans of a row
// are added in order, so that no output depends on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "quped_pack.h"
#include "quped_part.h"
#include "span_list.h"

namespace qk::cpu {

// One tensor. Null where there is none.
struct Item {
  Rows rows;
  Spans spans;
  PerRow strength;
  PerRow sharpness;
  float* x;
  const float* grad;
  const float* through;
  float* first;
  float* second;
  float* center_grad;
  int64_t* counts;
  float* sums;
  uint8_t* codes;
  std::vector<SpanEdges> edges;       // [spans], where codes are packed
  std::vector<double> distance;       // [spans]
  std::vector<int64_t> span_counts;   // [spans, 3, m], where a row has several spans
  std::vector<double> span_sums;      // [spans, m]
  std::vector<double> span_gradient;  // [spans, m]
};

// Of equal centers the first has all members.
template <class T>
void to_first(const Cells& cells, T* totals) {
  for (int k = 0; k < cells.levels; ++k) {
    if (cells.first[k] != k) {
      totals[cells.first[k]] += totals[k];
      totals[k] = T{0};
    }
  }
}

// Sums of a row are rounded once; counts are exact.
struct RowOutputs {
  int levels;
  bool by_cell;
  float* center_grad;
  int64_t* counts;
  float* sums;

  RowOutputs(const Item& item, int64_t row) : levels(item.rows.levels) {
    center_grad = item.center_grad == nullptr ? nullptr : item.center_grad + row * levels;
    counts = item.counts + row * 3 * levels;
    sums = item.sums == nullptr ? nullptr : item.sums + row * levels;
  }
};

inline void keep_totals(Item& item, const Span& span, const SpanTotals& totals) {
  const int m = item.rows.levels;
  item.distance[static_cast<size_t>(span.index)] = totals.distance;
  if (item.spans.per_row == 1) {
    const RowOutputs out(item, span.row);
    for (int k = 0; k < m; ++k) {
      out.counts[k] = totals.members[k];
      out.counts[m + k] = totals.above[k];
      out.counts[2 * m + k] = totals.below[k];
      if (out.sums != nullptr) {
        out.sums[k] = static_cast<float>(totals.sums[k]);
      }
      if (out.center_grad != nullptr) {
        out.center_grad[k] = static_cast<float>(totals.center_grad[k]);
      }
    }
    return;
  }
  int64_t* counts = item.span_counts.data() + span.index * 3 * m;
  std::copy_n(totals.members, m, counts);
  std::copy_n(totals.above, m, counts + m);
  std::copy_n(totals.below, m, counts + 2 * m);
  std::copy_n(totals.sums, m, item.span_sums.data() + span.index * m);
  std::copy_n(totals.center_grad, m, item.span_gradient.data() + span.index * m);
}

// Spans of each row in order.
inline void add_spans(Item& item) {
  const int m = item.rows.levels;
  const int64_t per_row = item.spans.per_row;
  if (per_row == 1) {
    return;
  }
  for (int64_t row = 0; row < item.rows.count; ++row) {
    const RowOutputs out(item, row);
    for (int k = 0; k < 3 * m; ++k) {
      int64_t count = 0;
      for (int64_t i = row * per_row; i < (row + 1) * per_row; ++i) {
        count += item.span_counts[static_cast<size_t>(i * 3 * m + k)];
      }
      out.counts[k] = count;
    }
    for (int k = 0; k < m; ++k) {
      double sum = 0.0, gradient = 0.0;
      for (int64_t i = row * per_row; i < (row + 1) * per_row; ++i) {
        sum += item.span_sums[static_cast<size_t>(i * m + k)];
        gradient += item.span_gradient[static_cast<size_t>(i * m + k)];
      }
      if (out.sums != nullptr) {
        out.sums[k] = static_cast<float>(sum);
      }
      if (out.center_grad != nullptr) {
        out.center_grad[k] = static_cast<float>(gradient);
      }
    }
  }
}

}  // namespace qk::cpu
