// prox_centers. l1 exact: two passes, one that counts the members of each cell by their keys, one that keeps those near
// the crossing (prox_selection.h); bound by the comparisons with midpoints and the scattered counts. The others: one
// pass that adds by code. Rows in parallel, or the spans of a single row.

#include <algorithm>
#include <limits>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../kernels.h"
#include "cells.h"
#include "chunk.h"
#include "prox_members.h"
#include "prox_selection.h"
#include "row_sums.h"
#include "rows.h"
#include "sum_by_code.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "prox_centers";
constexpr int64_t kCounters = 16384;  // of one row: 128 KiB, a part of the second-level cache

// What one call works on. mu is `centers`; the cells are those of `rows`.
template <class T>
struct Problem {
  const T* x;
  const float* mu;
  Rows rows;
  PerRow strengths;
};

// visit(first, last) for elements [first, last) of a row, in as few parts as there are threads.
template <class Visit>
void in_parts(int threads, int64_t length, int levels, Visit&& visit) {
  const int64_t part = std::max((length + threads - 1) / std::max(threads, 1), kGrain / levels);
  parallel_for(threads, length, part, visit);
}

template <class T>
void l1_exact_of_row(int threads, const Problem<T>& problem, int64_t row, float* out) {
  const int levels = problem.rows.levels;
  const int64_t length = problem.rows.length;
  const T* x = problem.x + row * length;
  const Cells cells(problem.rows.centers_of(row), levels);
  uint32_t buckets = 16;
  while (int64_t{2} * buckets * levels <= std::min(kCounters, length)) {
    buckets *= 2;
  }
  std::vector<CellSelection> selections(static_cast<size_t>(levels));
  start_selections(cells, buckets, selections);
  Windows windows(cells, selections);
  const int64_t stride = buckets + 2;
  std::vector<int64_t> counts(static_cast<size_t>(stride * levels));
  std::mutex merging;  // of integers, and of lists whose order does not matter
  in_parts(threads, length, levels, [&](int64_t first, int64_t last) {
    std::vector<int64_t> own(counts.size());
    count_members(x, cells, windows, buckets, first, last, own.data());
    const std::lock_guard<std::mutex> lock(merging);
    for (size_t i = 0; i < counts.size(); ++i) {
      counts[i] += own[i];
    }
  });
  const float strength = problem.strengths.of(row);
  for (int k = 0; k < levels; ++k) {
    CellSelection& selection = selections[static_cast<size_t>(k)];
    selection.narrow(counts.data() + k * stride, problem.mu[row * levels + k], strength);
    windows.set(k, selection.crossing());
  }
  const std::vector<CellSelection> narrowed = selections;
  in_parts(threads, length, levels, [&](int64_t first, int64_t last) {
    std::vector<CellSelection> own = narrowed;
    show_members(x, cells, windows, first, last, own);
    const std::lock_guard<std::mutex> lock(merging);
    for (size_t k = 0; k < own.size(); ++k) {
      selections[k].add(own[k]);
    }
  });
  for (int k = 0; k < levels; ++k) {
    out[k] = selections[static_cast<size_t>(k)].minimiser();
  }
}

template <class T>
void l1_exact(int threads, const Problem<T>& problem, float* out) {
  const int64_t work = std::max<int64_t>(problem.rows.length, 1) * problem.rows.levels;
  parallel_for(threads, problem.rows.count, std::max<int64_t>(kGrain / work, 1), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      l1_exact_of_row(threads, problem, row, out + row * problem.rows.levels);
    }
  });
}

// Sums over the members of each cell, into sums [G, m]: term(row, code, value) of each, float32 in blocks and float64
// across them.
template <class T, class Term>
void sum_of_terms(int threads, const Problem<T>& problem, float* sums, Term&& term) {
  const Rows& rows = problem.rows;
  sum_rows(threads, rows, rows.levels, sums, [&](const Span& span, double* partial) {
    const Cells cells(rows.centers_of(span.row), rows.levels);
    CodeSums by_code(rows.levels, partial);
    for_each_block(span, [&](const Span& block) {
      for_each_chunk(block.begin, block.end, [&](auto size, int64_t begin, int valid) {
        constexpr int Size = decltype(size)::value;
        alignas(64) float value[Size];
        alignas(64) int32_t code[Size];
        load_chunk<Size>(problem.x + begin, valid, 0.0f, value);
        codes_of<Size>(cells, value, code);
        for (int i = 0; i < Size; ++i) {
          value[i] = i < valid ? term(span.row, cells, code[i], value[i]) : 0.0f;
        }
        by_code.add<Size>(value, code, valid);
      });
      by_code.end_block();
    });
  });
}

// mu + sum (x - mu) 2t / (1 + 2t n), in the form that neither overflows nor moves at t = 0.
template <class T>
void l2(int threads, const Problem<T>& problem, float* out) {
  const int levels = problem.rows.levels;
  const int64_t centers = problem.rows.count * levels;
  std::vector<float> gaps(static_cast<size_t>(centers)), members(static_cast<size_t>(centers));
  sum_of_terms(threads, problem, gaps.data(), [&](int64_t row, const Cells&, int32_t code, float value) {
    return value - problem.mu[row * levels + code];
  });
  sum_of_terms(threads, problem, members.data(), [](int64_t, const Cells&, int32_t, float) { return 1.0f; });
  for (int64_t i = 0; i < centers; ++i) {
    const auto k = static_cast<size_t>(i);
    out[i] = problem.mu[i] + gaps[k] / (0.5f / problem.strengths.of(i / levels) + std::max(members[k], 1.0f));
  }
}

// mu +- t (#above - #below): sums of -1, 0 and 1 below 2^24 a block are exact.
template <class T>
void counted(int threads, const Problem<T>& problem, bool toward, float* out) {
  const int levels = problem.rows.levels;
  const int64_t centers = problem.rows.count * levels;
  std::vector<float> surplus(static_cast<size_t>(centers));
  sum_of_terms(threads, problem, surplus.data(), [](int64_t, const Cells& cells, int32_t code, float value) {
    const float own = cells.values[code];
    return (value > own ? 1.0f : 0.0f) - (value < own ? 1.0f : 0.0f);
  });
  for (int64_t i = 0; i < centers; ++i) {
    const float move = problem.strengths.of(i / levels) * surplus[static_cast<size_t>(i)];
    out[i] = toward ? problem.mu[i] + move : problem.mu[i] - move;
  }
}

// NaN last, as torch.sort has it.
void sort_rows(const Rows& rows, float* out) {
  for (int64_t row = 0; row < rows.count; ++row) {
    float* first = out + row * rows.levels;
    float* numbers = std::stable_partition(first, first + rows.levels, [](float value) { return value == value; });
    std::stable_sort(first, numbers);
  }
}

}  // namespace

void prox_centers(int threads, View centers, View x, View strength, const std::string& norm, const std::string& method,
                  const std::optional<TensorView>& at, View out) {
  QK_CHECK(norm == "l1" || norm == "l2", text(kOp, ": norm must be 'l1' or 'l2'"), "'" + norm + "'");
  QK_CHECK(method == "exact" || method == "counted" || method == "authors",
           text(kOp, ": method must be 'exact' or 'counted' or 'authors'"), "'" + method + "'");
  if (at) {
    check_same(kOp, "at", *at, centers);
  }
  check_same(kOp, "out", out, centers);
  const Rows rows = rows_of(kOp, x, at ? *at : centers);
  const PerRow strengths = per_row(kOp, "strength", strength, rows);
  for_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem{x.as<T>(), centers.as<float>(), rows, strengths};
    if (norm == "l2") {
      l2(threads, problem, out.as<float>());
    } else if (method == "exact") {
      l1_exact(threads, problem, out.as<float>());
    } else {
      counted(threads, problem, method == "counted", out.as<float>());
    }
  });
  sort_rows(rows, out.as<float>());
}

}  // namespace qk::cpu
