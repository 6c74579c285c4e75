// What lut_mma.h multiplies: pieces of rows of W, decoded in registers, by units of x in shared memory.
#pragma once

#include <type_traits>

#include "../math/pack_codes.h"
#include "lut_tables.h"

namespace qk::cuda {
namespace {

constexpr int kRowTiles = 2;     // of sixteen rows of W, a warp
constexpr int kTileColumns = 8;  // rows of x

// Columns of x in shared memory at once.
template <int Tiles>
constexpr int kStage = Tiles == 1 ? 1024 : 512;

// 16-byte units a row of x in shared memory; the last four keep neighbouring rows off each other's banks.
template <int Tiles>
constexpr int kRowUnits = kStage<Tiles> / kUnit + 4;

template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    mma_m16n8k16_bf16(sum, a, b);
  } else {
    mma_m16n8k16_f16(sum, a, b);
  }
}

// Where a lane reads: offsets from an address that a block shares take one register, pointers two.
struct Lane {
  const uint8_t* block;  // the first of the block's rows of W
  uint32_t at;           // bytes from there to the lane's piece of its first row
  uint32_t eight_rows;   // bytes from one of its rows to the next
  int rows_left;         // rows of W from its first on; 0 past the end of a row
};

// Adds the products of one piece of each of the lane's rows. x: the lane's first unit of the piece in row 0 of its
// tile.
template <class T, int Bits, int Tiles>
__device__ __forceinline__ void add_products(const Lane& lane, const unsigned char* own, const uint4* x,
                                             float (&sums)[kRowTiles][Tiles][4]) {
  Piece<Bits> pieces[2 * kRowTiles];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    if (8 * i < lane.rows_left) {
      pieces[i].load(lane.block + (lane.at + i * lane.eight_rows));
    } else {
      pieces[i].clear();
    }
  }
#pragma unroll
  for (int u = 0; u < Piece<Bits>::kCodes / kUnit; ++u) {
    uint4 upper[kRowTiles], lower[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      upper[i] = FieldTable<Bits>::unit(pieces[2 * i], u, own);
      lower[i] = FieldTable<Bits>::unit(pieces[2 * i + 1], u, own);
    }
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const uint4 eight = x[tile * kTileColumns * kRowUnits<Tiles> + 4 * u];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        multiply<T>(sums[i][tile], {upper[i].x, lower[i].x, upper[i].y, lower[i].y}, {eight.x, eight.y});
        multiply<T>(sums[i][tile], {upper[i].z, lower[i].z, upper[i].w, lower[i].w}, {eight.z, eight.w});
      }
    }
  }
}

// In the low bits; `from` is a multiple of Bits bytes from one of 16.
template <int Bits>
__device__ __forceinline__ uint32_t eight_codes(const uint8_t* from) {
  if constexpr (Bits == 4) {
    return __ldg(reinterpret_cast<const uint32_t*>(from));
  } else if constexpr (Bits == 2) {
    return __ldg(reinterpret_cast<const uint16_t*>(from));
  } else {
    return static_cast<uint32_t>(math::load_bytes(from, Bits));
  }
}

// The same for centers in three parts, for one tile of rows of W and one of x. Reads eight codes of a row at a time.
template <class T, int Bits>
__device__ __forceinline__ void add_products_of_parts(const Lane& lane, const uint2* parts, const uint4* x,
                                                      float (&sums)[1][1][4]) {
#pragma unroll 1
  for (int u = 0; u < Piece<Bits>::kCodes / kUnit; ++u) {
    uint32_t codes[2] = {0, 0};  // eight of each row
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (8 * row < lane.rows_left) {
        codes[row] = eight_codes<Bits>(lane.block + (lane.at + row * lane.eight_rows + u * Bits));
      }
    }
#pragma unroll 1
    for (int step = 0; step < 2; ++step) {
      uint2 values[2][4];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values[row][j] = parts[codes[row] >> (j * Bits) & ((1u << Bits) - 1u)];
        }
      }
      const uint2 four = reinterpret_cast<const uint2*>(x + 4 * u)[step];
      uint32_t high[2] = {four.x, four.y}, low[2];
      if constexpr (std::is_same_v<T, float16>) {
        split_pair(four.x, high[0], low[0]);
        split_pair(four.y, high[1], low[1]);
      }
#pragma unroll
      for (int which = 0; which < 3; ++which) {
        const uint32_t a[4] = {pair_of(values[0][0], values[0][1], which), pair_of(values[1][0], values[1][1], which),
                               pair_of(values[0][2], values[0][3], which), pair_of(values[1][2], values[1][3], which)};
        mma_m16n8k16_bf16(sums[0][0], a, high);
        if constexpr (std::is_same_v<T, float16>) {
          mma_m16n8k16_bf16(sums[0][0], a, low);
        }
        if (which == 0) {
          high[0] = finite_pair(high[0]);
          high[1] = finite_pair(high[1]);
        }
      }
      codes[0] >>= 4 * Bits;
      codes[1] >>= 4 * Bits;
    }
  }
}

}  // namespace
}  // namespace qk::cuda
