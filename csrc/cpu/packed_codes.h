// PackedCodes: a packed stream of codes as kernels read it: vectors of sixteen from any code on, never a byte past its
// end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

#include "../check.h"
#include "../tensor_view.h"
#include "bit_stream.h"
#include "code_check.h"
#include "code_lanes.h"

namespace qk::cpu {

// CodeLanes of every bit a run may begin at, each made when it is first needed; one a task.
class LanesByShift {
 public:
  explicit LanesByShift(int bits) : bits_(bits) {}

  const CodeLanes& of(int shift) {
    std::optional<CodeLanes>& lanes = lanes_[shift];
    if (!lanes) {
      lanes.emplace(bits_, shift);
    }
    return *lanes;
  }

 private:
  int bits_;
  std::optional<CodeLanes> lanes_[8];
};

struct PackedCodes {
  const uint8_t* bytes;
  int64_t size;  // bytes
  int bits;

  // body(codes, offset, valid) for the codes [first, first + count), sixteen at a time; only the last may be partly
  // valid, and its other lanes are 0.
  template <class Body>
  void for_each_vector(LanesByShift& by_shift, int64_t first, int64_t count, Body&& body) const {
    const int64_t bit = first * bits;
    const CodeLanes lanes = by_shift.of(static_cast<int>(bit % 8));
    const uint8_t* from = bytes + bit / 8;
    const int64_t step = 2 * bits, readable = size - bit / 8 - kCodeBytes;
    const int64_t inside = readable < 0 ? 0 : (readable / step + 1) * kVec;
    const int64_t whole = std::min(count / kVec * kVec, inside);
    int64_t i = 0;
    for (; i < whole; i += kVec, from += step) {
      body(lanes.of(from), i, kVec);
    }
    for (; i < count; i += kVec, from += step) {
      uint8_t rest[kCodeBytes] = {};
      std::memcpy(rest, from, static_cast<size_t>(std::min<int64_t>(kCodeBytes, bytes + size - from)));
      const int valid = static_cast<int>(std::min<int64_t>(kVec, count - i));
      const Ints codes = lanes.of(rest);
      body(valid == kVec ? codes : keep(first_lanes(valid), codes), i, valid);
    }
  }

  // The codes [first, first + count), one a byte; to has room for whole vectors.
  void unpack(LanesByShift& by_shift, int64_t first, int64_t count, uint8_t* to) const {
    for_each_vector(by_shift, first, count, [&](Ints codes, int64_t offset, int) { store_bytes(codes, to + offset); });
  }

  // The largest code of [first, first + count), -1 for none.
  int highest(LanesByShift& by_shift, int64_t first, int64_t count) const {
    Ints most = splat(0);
    for_each_vector(by_shift, first, count, [&](Ints codes, int64_t, int) { most = larger(most, codes); });
    alignas(64) int32_t lane[kVec];
    store(most, lane);
    return count > 0 ? *std::max_element(lane, lane + kVec) : -1;
  }
};

inline PackedCodes packed_codes_of(const char* op, const TensorView& packed, int64_t bits, int64_t numel) {
  QK_CHECK(bits >= 1 && bits <= kMaxBits, text(op, ": bits must be between 1 and ", kMaxBits), std::to_string(bits));
  QK_CHECK(
      packed.numel() == packed_bytes(numel, bits),
      text(op, ": packed must have ", packed_bytes(numel, bits), " bytes for ", numel, " codes of ", bits, " bits"),
      std::to_string(packed.numel()));
  return {packed.as<uint8_t>(), packed.numel(), static_cast<int>(bits)};
}

// More centers than codes can name would be no error, and no use.
inline void check_levels(const char* op, int levels, int64_t bits) {
  QK_CHECK(levels <= (1 << bits), text(op, ": ", bits, " bits tell ", 1 << bits, " centers apart"),
           text("rows of ", levels));
}

// Throws where a code of the `numel` is m or more, before anything is written. Costs nothing where every code is below.
inline void check_packed_codes(const char* op, int threads, const PackedCodes& codes, int64_t numel, int levels) {
  if (levels >= 1 << codes.bits) {
    return;
  }
  HighestCode highest;
  parallel_for(threads, (numel + kGrain - 1) / kGrain, 1, [&](int64_t first, int64_t last) {
    LanesByShift by_shift(codes.bits);
    const int64_t begin = first * kGrain, end = std::min(last * kGrain, numel);
    highest.see(codes.highest(by_shift, begin, end - begin));
  });
  check_codes_below_levels(op, highest, levels);
}

}  // namespace qk::cpu
