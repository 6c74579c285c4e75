// What pack_codes and unpack_codes share: the cut of a stream into tasks that touch no common byte, and the choice by
// bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "../check.h"
#include "parallel.h"

namespace qk::cpu {

constexpr int kMaxBits = 8;

inline int64_t packed_bytes(int64_t numel, int64_t bits) { return numel / 8 * bits + (numel % 8 * bits + 7) / 8; }

// body(std::integral_constant<int, bits>) for bits from 1 to 8.
template <int Bits = 1, class Body>
void for_bits(const char* op, int64_t bits, Body&& body) {
  if constexpr (Bits > kMaxBits) {
    fail(text(op, ": bits must be between 1 and ", kMaxBits), std::to_string(bits));
  } else if (bits == Bits) {
    body(std::integral_constant<int, Bits>{});
  } else {
    for_bits<Bits + 1>(op, bits, body);
  }
}

// body(first, last) over groups of eight codes, the last of which may be short.
template <class Body>
void for_each_group(int threads, int64_t numel, Body&& body) {
  parallel_for(threads, (numel + 7) / 8, kGrain / 8, body);
}

// Codes in group `group` of numel: eight, fewer in the last.
inline int codes_in_group(int64_t group, int64_t numel) {
  return static_cast<int>(std::min<int64_t>(8, numel - group * 8));
}

}  // namespace qk::cpu
