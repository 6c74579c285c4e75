// How lut_linear's kernels read a row of W out of the flat bit stream.
//
// A lane holds a piece of a row: 16 bytes, which are 128 / Bits consecutive codes, or 48 bytes, 128 codes, where Bits
// is
// 3. Lanes beside each other hold pieces beside each other. So one load of a warp touches as many runs of
// 16 x kLanes bytes as it has rows (eight runs of 64 bytes with four lanes a row): whole 32-byte sectors, but half of a
// 128-byte line, whose other half is the same lanes' next piece. That is what the flat stream costs against a form with
// rows interleaved: nothing in bytes, and nothing in instructions, as the order of k within a product is free: x is
// staged in shared memory in the order in which lanes meet it.
#pragma once

#include <cstdint>

#include "platform.h"

namespace qk::cuda {

template <int Bits>
struct Piece {
  static constexpr int kCodes = Bits == 3 ? 128 : 128 / Bits;
  static constexpr int kWords = kCodes * Bits / 32;
  static_assert(kWords % 4 == 0 && kCodes % 8 == 0, "loads of 16 bytes, units of 8 codes");

  uint32_t words[kWords];

  // From an address that is a multiple of 16.
  __device__ __forceinline__ void load(const uint8_t* from) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      // Two lanes' pieces of 48 bytes share a sector, which should then wait in the first cache.
      const uint4 four = Bits == 3 ? __ldg(reinterpret_cast<const uint4*>(from + 4 * i))
                                   : load_streaming(reinterpret_cast<const uint4*>(from + 4 * i));
      words[i] = four.x;
      words[i + 1] = four.y;
      words[i + 2] = four.z;
      words[i + 3] = four.w;
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = 0;
    }
  }

  // Bits [at, at + Width) of the piece, moved to bit `Place`. Unrolled, `at` is a constant: a shift and a mask.
  template <int Width, int Place>
  __device__ __forceinline__ uint32_t field(int at) const {
    const int word = at / 32, below = at % 32;
    uint32_t moved;
    if (below + Width > 32) {
      moved = static_cast<uint32_t>((static_cast<uint64_t>(words[(word + 1) % kWords]) << 32 | words[word]) >>
                                    (below - Place));
    } else {
      moved = below >= Place ? words[word] >> (below - Place) : words[word] << (Place - below);
    }
    return moved & (((1u << Width) - 1u) << Place);
  }
};

// Whether rows of W can be read in pieces: each starts on a multiple of 16 bytes and holds whole pieces.
inline bool pieces_fit(const void* packed, int64_t K, int64_t bits) {
  return reinterpret_cast<uintptr_t>(packed) % 16 == 0 && K % 8 == 0 && K / 8 * bits % 16 == 0;
}

}  // namespace qk::cuda
