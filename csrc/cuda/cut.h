// How work is cut: rows of weights into spans, one a block, and those into tiles of a few elements a thread. Short rows
// share a block. The cut follows from the shapes alone, so the order of every sum does, on any GPU.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "../check.h"
#include "platform.h"

namespace qk::cuda {

using View = const TensorView&;
using Views = const std::vector<TensorView>&;

constexpr int kMaxLevels = 256;  // codes are uint8
constexpr int kThreads = 128;    // of a block
constexpr int kWarps = kThreads / kWarp;
// Blocks that are wanted where there is work for them: 16 on each of 132 multiprocessors. When emulated so few that the
// sizes of tests have spans of several tiles.
#if defined(QK_CUDA_EMULATED)
constexpr int64_t kBlocks = 6;
#else
constexpr int64_t kBlocks = 2112;
#endif

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Rows {
  int64_t count;
  int64_t length;
  int levels;
};

inline Rows rows_of(const char* op, View x, View centers) {
  const bool shaped =
      (centers.dim() == 1 || centers.dim() == 2) && centers.sizes.back() >= 2 && centers.sizes.back() <= kMaxLevels;
  QK_CHECK(shaped, text(op, ": centers must be [m] or [G, m] with m from 2 to ", kMaxLevels),
           "shape " + shape_of(centers.sizes));
  const int64_t count = centers.dim() == 2 ? centers.sizes[0] : 1;
  const int64_t numel = x.numel();
  QK_CHECK(count > 0 ? numel % count == 0 : numel == 0,
           text(op, ": the rows of centers must divide the number of elements evenly"),
           text(count, " rows for ", numel, " elements"));
  return {count, count > 0 ? numel / count : 0, static_cast<int>(centers.sizes.back())};
}

// A sharpness or strength: one for all rows or one for each.
struct PerRow {
  const float* values;
  int64_t stride;

  QK_HD float of(int64_t row) const { return values[row * stride]; }
};

inline PerRow per_row(const char* op, const char* name, View tensor, const Rows& rows) {
  const int64_t count = tensor.numel();
  QK_CHECK(count == 1 || count == rows.count, text(op, ": ", name, " must have shape [1] or [", rows.count, "]"),
           "shape " + shape_of(tensor.sizes));
  return {tensor.as<float>(), count == 1 ? 0 : 1};
}

inline void check_like(const char* op, const char* name, View tensor, View like) {
  QK_CHECK(tensor.sizes == like.sizes, text(op, ": ", name, " must have shape ", shape_of(like.sizes)),
           shape_of(tensor.sizes));
  QK_CHECK(tensor.dtype == like.dtype, text(op, ": ", name, " must be ", name_of(like.dtype)), name_of(tensor.dtype));
}

inline void check_workspace(const char* op, View workspace, int64_t bytes) {
  QK_CHECK(workspace.numel() >= bytes, text(op, ": workspace must have ", bytes, " bytes"),
           std::to_string(workspace.numel()));
}

struct Cut {
  int64_t rows;
  int64_t length;  // elements of a row
  int64_t span;    // elements of a span; the last of a row may be shorter
  int spans;       // of a row
  int row_shift;   // 2^row_shift threads share a row

  QK_HD int row_threads() const { return 1 << row_shift; }
  QK_HD int rows_a_block() const { return kThreads >> row_shift; }
  int64_t blocks() const { return ceil_div(rows, rows_a_block()) * spans; }
  dim3 grid() const { return dim3(static_cast<unsigned>(blocks())); }
};

// elements: of a tile, a thread. Rows that are shorter than a tile of the whole block get fewer threads, at least
// 2^least_shift. most_tiles: of a span.
inline Cut cut_of(const Rows& rows, int elements, int least_shift, int64_t most_tiles = int64_t{1} << 40) {
  int shift = least_shift;
  while ((1 << shift) < kThreads && (int64_t{elements} << shift) < rows.length) {
    ++shift;
  }
  const int64_t tiles = std::max<int64_t>(ceil_div(rows.length, int64_t{elements} << shift), 1);
  const int64_t wanted = std::clamp<int64_t>(kBlocks / std::max<int64_t>(rows.count, 1), 1, tiles);
  const int64_t span = std::min(ceil_div(tiles, wanted), most_tiles) * (int64_t{elements} << shift);
  const int spans = static_cast<int>(std::max<int64_t>(ceil_div(rows.length, span), 1));
  return {rows.count, rows.length, span, spans, shift};
}

// Where a thread works.
struct Place {
  int64_t row;
  int local;      // the row's place among those of the block
  int thread;     // among those of the row
  int64_t begin;  // the elements of its span are [begin, end) of the row; none where the row does not exist
  int64_t end;

  __device__ explicit Place(const Cut& cut, int64_t block)
      : row(block / cut.spans * cut.rows_a_block() + (threadIdx.x >> cut.row_shift)),
        local(static_cast<int>(threadIdx.x) >> cut.row_shift),
        thread(static_cast<int>(threadIdx.x) & (cut.row_threads() - 1)),
        begin(block % cut.spans * cut.span),
        end(row < cut.rows ? (begin + cut.span < cut.length ? begin + cut.span : cut.length) : begin) {}
};

}  // namespace qk::cuda
