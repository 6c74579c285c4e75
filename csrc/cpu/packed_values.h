// PackedValues: runs of a packed weight as values, for kernels that write them out or multiply with them.
#pragma once

#include <cstdint>

#include "packed_codes.h"
#include "rows.h"
#include "value_table.h"

namespace qk::cpu {

// T: float, bfloat16 or float16, the type of centers and values; one object a task, for it holds the present row's
// table.
template <int kBits, class T>
class PackedValues {
 public:
  PackedValues(const PackedCodes& codes, const T* centers, const Rows& rows)
      : codes_(codes), by_shift_(codes.bits), centers_(centers), levels_(rows.levels) {}

  // The values of elements [first, first + count), all of one row of centers. past_caches: the whole output is too
  // large to stay in them.
  void write(int64_t row, int64_t first, int64_t count, bool past_caches, T* to) {
    if (row != row_) {
      table_.fill(centers_ + row * levels_, levels_);
      row_ = row;
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      if (past_caches && reinterpret_cast<uintptr_t>(to) % (kVec * sizeof(float)) == 0) {
        each_vector(first, count, to, [](Vec values, T* at) { stream(values, at); });
        end_stream();
        return;
      }
    }
    each_vector(first, count, to, [](Vec values, T* at) { store(values, at); });
  }

 private:
  template <class Store>
  void each_vector(int64_t first, int64_t count, T* to, Store&& store_all) {
    codes_.for_each_vector(by_shift_, first, count, [&](Ints codes, int64_t offset, int valid) {
      const Vec values = table_.of(codes);
      if (valid == kVec) {
        store_all(values, to + offset);
      } else {
        store_some(values, valid, to + offset);
      }
    });
  }

  PackedCodes codes_;
  LanesByShift by_shift_;
  const T* centers_;
  int levels_;
  int64_t row_ = -1;
  ValueTable<kBits> table_;
};

// body(value of the type of centers, std::integral_constant<int, table bits>)
template <class Body>
void for_packed_values(const TensorView& centers, const Rows& rows, Body&& body) {
  for_float_type(centers.dtype, [&](auto type) { for_table_bits(rows.levels, [&](auto bits) { body(type, bits); }); });
}

}  // namespace qk::cpu
