// ValueTable<kBits>: the center of each of sixteen codes below 2^kBits. Up to 16 centers are one in-register
// permutation; AVX-512 makes 32 of a pair of registers, and 64 to 256 of several pairs and selections; elsewhere more
// than 16 are read from memory. Codes past the last center give 0, whatever memory holds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "rows.h"
#include "simd_bits.h"

namespace qk::cpu {

template <int kBits>
class ValueTable {
  static_assert(kBits >= 3 && kBits <= 8, "few entries are padded to eight");
  static constexpr int kEntries = kBits <= 4 ? kLookup : 1 << kBits;

 public:
  ValueTable() = default;
  ValueTable(const ValueTable&) = delete;
  ValueTable& operator=(const ValueTable&) = delete;

  template <class T>
  void fill(const T* centers, int levels) {
    for (int i = 0; i < levels; i += kVec) {
      const int count = std::min(kVec, levels - i);
      store(count == kVec ? load(centers + i) : load_some(centers + i, count), entries_ + i);
    }
    if (levels != levels_) {
      std::fill(entries_ + (levels + kVec - 1) / kVec * kVec, entries_ + kEntries, 0.0f);
      levels_ = levels;
    }
    if constexpr (kBits <= 4) {
      few_ = Lookup(entries_);
    }
  }

  Vec of(Ints codes) const {
    if constexpr (kBits <= 4) {
      return lookup<kBits>(few_, codes);
    } else {
      return many(codes);
    }
  }

 private:
#if defined(__AVX512F__) && defined(__AVX512BW__)
  template <int kWidth, int kFirst>
  Vec among(Ints codes) const {
    if constexpr (kWidth == 5) {
      return float_of(lookup(BinTable(entries_ + kFirst), codes));
    } else {
      const Vec low = among<kWidth - 1, kFirst>(codes);
      const Vec high = among<kWidth - 1, kFirst + (1 << (kWidth - 1))>(codes);
      return select({_mm512_test_epi32_mask(codes.v, _mm512_set1_epi32(1 << (kWidth - 1)))}, high, low);
    }
  }
  Vec many(Ints codes) const { return among<kBits, 0>(codes); }
#else
  Vec many(const Ints& codes) const {
    alignas(64) int32_t code[kVec];
    alignas(64) float value[kVec];
    store(codes, code);
    for (int i = 0; i < kVec; ++i) {
      value[i] = entries_[code[i]];
    }
    return load(value);
  }
#endif

  alignas(64) float entries_[kEntries] = {};
  Lookup few_;
  int levels_ = 0;
};

// body(std::integral_constant<int, kBits>) for the smallest table of `levels` entries.
template <int kBits = 3, class Body>
void for_table_bits(int levels, Body&& body) {
  if constexpr (kBits < 8) {
    if (levels > 1 << kBits) {
      for_table_bits<kBits + 1>(levels, body);
      return;
    }
  }
  body(std::integral_constant<int, kBits>{});
}

}  // namespace qk::cpu
