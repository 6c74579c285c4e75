// LutWeights: the weight of lut_linear as it is stored, codes in a bit stream and a table for every `length` of them.
#pragma once

#include <cstdint>

namespace qk::cpu {

// The most codes that row `row` may be asked for at once, and what follows from the flat row-major stream.
struct LutWeights {
  const uint8_t* packed;
  int64_t bytes;         // of packed; nothing behind is read
  int64_t out_features;  // N rows
  int64_t in_features;   // K codes a row
  const float* centers;  // [G, levels]
  int levels;
  int64_t length;  // codes a row of centers

  const uint8_t* end() const { return packed + bytes; }
  const float* table_of(int64_t code) const { return centers + code / length * levels; }
};

}  // namespace qk::cpu
