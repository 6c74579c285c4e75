// PackedRows: a packed table [V, D] and the indices of the rows wanted of it, checked; shared by packed_embedding and
// its gradient.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "packed_codes.h"
#include "parallel.h"
#include "rows.h"

namespace qk::cpu {

struct PackedRows {
  PackedCodes codes;
  Rows rows;  // of centers, over the whole table
  const int64_t* index;
  int64_t tokens;
  int64_t width;  // D

  int64_t grain() const { return std::max<int64_t>(kGrain / std::max<int64_t>(width, 1), 1); }

  // body(row of centers, first element, count, offset in the table's row) for the parts of a row of the table that have
  // one row of centers each: one part, unless blocks of centers are shorter than a row or end inside it.
  template <class Body>
  void for_each_piece(int64_t wanted, Body&& body) const {
    const int64_t begin = wanted * width, end = begin + width;
    for (int64_t at = begin; at < end;) {
      const int64_t row = at / rows.length, stop = std::min(end, (row + 1) * rows.length);
      body(row, at, stop - at, at - begin);
      at = stop;
    }
  }
};

// Every check of the two ops: indices inside the table, and no code of the rows they name past the last center.
inline PackedRows packed_rows_of(const char* op, int threads, const TensorView& indices, const TensorView& packed,
                                 const TensorView& centers, int64_t bits, const std::vector<int64_t>& shape) {
  QK_CHECK(shape.size() == 2, text(op, ": shape must be [V, D]"), shape_of(shape));
  const TensorView whole{nullptr, shape, Dtype::uint8};
  const Rows rows = rows_of(op, whole, centers);
  const PackedCodes codes = packed_codes_of(op, packed, bits, whole.numel());
  check_levels(op, rows.levels, bits);
  const PackedRows table{codes, rows, indices.as<int64_t>(), indices.numel(), shape[1]};
  for (int64_t token = 0; token < table.tokens; ++token) {
    const int64_t index = table.index[token];
    QK_CHECK(index >= 0 && index < shape[0], text(op, ": indices must be from 0 to ", shape[0] - 1),
             std::to_string(index));
  }
  if (rows.levels < 1 << bits) {
    HighestCode highest;
    parallel_for(threads, table.tokens, table.grain(), [&](int64_t first, int64_t last) {
      LanesByShift by_shift(codes.bits);
      for (int64_t token = first; token < last; ++token) {
        highest.see(codes.highest(by_shift, table.index[token] * table.width, table.width));
      }
    });
    check_codes_below_levels(op, highest, rows.levels);
  }
  return table;
}

}  // namespace qk::cpu
