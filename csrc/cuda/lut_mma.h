// lut_linear on tensor cores: bfloat16 and float16 x, 1 to 4 bits, one table.
//
// Weights are operand A of mma.m16n8k16, decoded in registers (lut_tables.h); eight rows of x are operand B, so one row
// costs what eight do. Products are exact, sums float32. A warp takes 32 rows of W, two tiles of sixteen; lane (g, t) =
// (lane / 4, lane % 4) holds pieces (lut_pieces.h) of rows g, g + 8, g + 16 and g + 24, four lanes side by side. Step s
// of a piece multiplies its codes 4 s .. 4 s + 3, in the slots 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of the instruction, by
// the same k of x: 8 consecutive numbers of x, one 16-byte load from shared memory, are the B operand of two steps. x
// is staged in units of 8 in the order (step, lane), rows 64 bytes off each other's banks: loads without conflicts.
//
// Each width of codes is compiled in a file of its own, lut_mma_<bits>.cu.
//
// Bound by the packed bytes at small batches (shared memory below 4 bits: 0.5 words a weight for the table, 0.06 words
// a tile of eight rows of x), by shared memory and tensor cores at large ones.

#pragma once

#include "lut_kernels.h"
#include "lut_mma_products.h"

namespace qk::cuda {
namespace {

// Threads a block: with 64 sums a thread needs up to 168 registers, of which a multiprocessor has 384 times as many.
template <int Tiles>
constexpr int kThreads = Tiles == 8 ? 384 : 256;
constexpr int kWarpRows = 16 * kRowTiles;
template <int Tiles>
constexpr int kRows = kThreads<Tiles> / kWarp * kWarpRows;

// Blocks a multiprocessor: by registers, 64 or 128 a thread, and shared memory.
template <int Bits, int Tiles>
constexpr int kResident = Tiles == 8 || (Tiles == 4 && Bits == 3) ? 1
                          : Tiles > 1 || Bits % 2 == 1            ? 2
                          : Bits == 4                             ? 4
                                                                  : 3;

template <int Bits, int Tiles>
constexpr size_t kSharedBytes = FieldTable<Bits>::kBytes + size_t{kTileColumns} * Tiles * kRowUnits<Tiles> * 16;

__device__ __forceinline__ int lane_of() { return static_cast<int>(threadIdx.x) % kWarp; }

// The warp's.
template <int Tiles>
__device__ __forceinline__ int first_row() {
  return static_cast<int>(blockIdx.x) * kRows<Tiles> + static_cast<int>(threadIdx.x) / kWarp * kWarpRows;
}

// Rows [first, first + 8 Tiles) of x, columns [begin, end), filled with zeros up to a multiple of four pieces. A warp
// takes a row at a time, by asynchronous copies, which need no registers, where x is aligned for them.
template <int Bits, int Tiles, int Threads>
__device__ __forceinline__ void stage_x(const LutCall& call, int first, int begin, int end, uint4* staged) {
  constexpr int kUnits = Piece<Bits>::kCodes / kUnit, kChunkUnits = 4 * kUnits;
  const int units = (end - begin + kChunkUnits * kUnit - 1) / (kChunkUnits * kUnit) * kChunkUnits;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto* x = static_cast<const uint16_t*>(call.x);
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / kWarp; row < kTileColumns * Tiles; row += Threads / kWarp) {
    const int64_t b = first + row < call.batch ? first + row : call.batch - 1;  // a spare row's sums are not written
    const uint16_t* const from = x + b * call.K + begin;
#pragma unroll 1
    for (int source = lane; source < units; source += kWarp) {
      const int chunk = source / kChunkUnits, piece = source % kChunkUnits / kUnits, u = source % kUnits;
      uint4* const to = staged + row * kRowUnits<Tiles> + chunk * kChunkUnits + u * 4 + piece;
      const uint16_t* const eight = from + source * kUnit;
      if (begin + source * kUnit >= end) {
        *to = make_uint4(0, 0, 0, 0);
      } else if (aligned) {
        copy_async_16(to, eight);
      } else {
        *to = make_uint4(eight[0] | uint32_t{eight[1]} << 16, eight[2] | uint32_t{eight[3]} << 16,
                         eight[4] | uint32_t{eight[5]} << 16, eight[6] | uint32_t{eight[7]} << 16);
      }
    }
  }
  copy_async_commit();
  copy_async_wait<0>();
}

// The block's slice of K, a stage of x at a time: body(lane, its first unit of x) for every four pieces of a row.
template <int Bits, int Tiles, int Threads, class Body>
__device__ __forceinline__ void for_each_chunk(const LutCall& call, int block_row, int first_row, int first_x,
                                               uint4* staged, Body&& body) {
  constexpr int kChunk = 4 * Piece<Bits>::kCodes;
  static_assert(kStage<Tiles> % kChunk == 0, "a stage is whole chunks");
  const int g = lane_of() / 4, t = lane_of() % 4, row = first_row + g;
  const int begin = static_cast<int>(blockIdx.y) * static_cast<int>(call.slice);
  const int end = call.K - begin < call.slice ? static_cast<int>(call.K) : begin + static_cast<int>(call.slice);
  const uint32_t row_bytes = static_cast<uint32_t>(call.K / 8 * Bits);
  Lane lane{call.packed + block_row * (call.K / 8 * Bits),
            static_cast<uint32_t>(row - block_row) * row_bytes +
                static_cast<uint32_t>(begin + t * Piece<Bits>::kCodes) / 8 * Bits,
            8 * row_bytes, 0};
  const uint4* const x = staged + g * kRowUnits<Tiles> + t;
  for (int stage = begin; stage < end; stage += kStage<Tiles>) {
    const int columns = end - stage < kStage<Tiles> ? end - stage : kStage<Tiles>;
    __syncthreads();  // tables are filled, and all warps have read the stage before
    stage_x<Bits, Tiles, Threads>(call, first_x, stage, stage + columns, staged);
    __syncthreads();
#pragma unroll 1
    for (int column = 0; column < columns; column += kChunk) {
      lane.rows_left = column + t * Piece<Bits>::kCodes < columns ? static_cast<int>(call.N) - row : 0;
      body(lane, x + column / kUnit);
      lane.at += kChunk / 8 * Bits;
    }
  }
}

// scale: of the sums, a power of two.
template <class T, int RowTiles, int Tiles>
__device__ __forceinline__ void write_sums(const LutCall& call, int first_row, int first_x,
                                           const float (&sums)[RowTiles][Tiles][4], int scale) {
  const int row = first_row + lane_of() / 4, column = first_x + 2 * (lane_of() % 4);
#pragma unroll
  for (int i = 0; i < RowTiles; ++i) {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int n = row + 16 * i + j / 2 * 8, b = column + tile * kTileColumns + j % 2;
        if (n < call.N && b < call.batch) {
          write_sum<T>(call, blockIdx.y, b, n, scale == 0 ? sums[i][tile][j] : ldexpf(sums[i][tile][j], -scale));
        }
      }
    }
  }
}

template <class T, int Bits, int Tiles>
__global__ void __launch_bounds__(kThreads<Tiles>, kResident<Bits, Tiles>)
    lut_mma_kernel(const __grid_constant__ LutCall call) {
  QK_DYNAMIC_SHARED(uint4, shared);
  auto* const table = reinterpret_cast<unsigned char*>(shared);
  auto* const staged = reinterpret_cast<uint4*>(table + FieldTable<Bits>::kBytes);
  const int thread = static_cast<int>(threadIdx.x), first_x = static_cast<int>(blockIdx.z) * kTileColumns * Tiles;
  bool exact = true;  // alike in all threads
  for (int i = 0; i < call.levels; ++i) {
    exact = exact && fits<T>(__ldg(call.centers + i));
  }
  if (exact) {
    FieldTable<Bits>::template fill<T>(shared, call.centers, call.levels, thread, kThreads<Tiles>);
    const unsigned char* const own = table + FieldTable<Bits>::first_byte(lane_of());
    float sums[kRowTiles][Tiles][4] = {};
    for_each_chunk<Bits, Tiles, kThreads<Tiles>>(
        call, static_cast<int>(blockIdx.x) * kRows<Tiles>, first_row<Tiles>(), first_x, staged,
        [&](const Lane& lane, const uint4* x) { add_products<T, Bits, Tiles>(lane, own, x, sums); });
    write_sums<T>(call, first_row<Tiles>(), first_x, sums, 0);
    return;
  }
  auto* const parts = reinterpret_cast<uint2*>(table);
  const int scale = std::is_same_v<T, float16> ? scale_of(call.centers, call.levels) : 0;
  if (thread < 1 << Bits) {
    const float center = __ldg(call.centers + (thread < call.levels ? thread : call.levels - 1));
    const Parts three = parts_of(ldexpf(center, scale));
    parts[thread] = make_uint2(three.high_middle, three.low);
  }
#pragma unroll 1
  for (int i = 0; i < Tiles * kRowTiles; ++i) {  // one pair of tiles at a time: seldom worth registers
    const int row = first_row<Tiles>() + i % kRowTiles * 16, column = first_x + i / kRowTiles * kTileColumns;
    float sums[1][1][4] = {};
    for_each_chunk<Bits, 1, kThreads<Tiles>>(
        call, static_cast<int>(blockIdx.x) * kRows<Tiles>, row, column, staged,
        [&](const Lane& lane, const uint4* x) { add_products_of_parts<T, Bits>(lane, parts, x, sums); });
    write_sums<T>(call, row, column, sums, scale);
  }
}

template <class T, int Bits, int Tiles>
void launch_tiles(const LutCall& call, int64_t slices, cudaStream_t stream) {
  const auto kernel = &lut_mma_kernel<T, Bits, Tiles>;
  raise_shared_limit(kernel, kSharedBytes<Bits, Tiles>);
  const auto blocks = [](int64_t count, int64_t size) { return static_cast<unsigned>((count + size - 1) / size); };
  const dim3 grid(blocks(call.N, kRows<Tiles>), static_cast<unsigned>(slices),
                  blocks(call.batch, kTileColumns * Tiles));
  launch(kernel, grid, dim3(kThreads<Tiles>), kSharedBytes<Bits, Tiles>, stream, call);
}

template <class T, int Bits>
void launch_batch(const LutCall& call, int64_t slices, cudaStream_t stream) {
  if (call.batch <= kTileColumns) {
    launch_tiles<T, Bits, 1>(call, slices, stream);
  } else if (call.batch <= 2 * kTileColumns) {
    launch_tiles<T, Bits, 2>(call, slices, stream);
  } else if (call.batch <= 4 * kTileColumns) {
    launch_tiles<T, Bits, 4>(call, slices, stream);
  } else {
    launch_tiles<T, Bits, 8>(call, slices, stream);
  }
}

}  // namespace

template <int Bits>
Slices lut_mma_slices(int64_t N, int64_t K) {
  return slices_of(N, K, kRows<1>, 4 * Piece<Bits>::kCodes);
}

template <int Bits>
void lut_mma(const LutCall& call, int64_t slices, cudaStream_t stream) {
  if (call.dtype == Dtype::bfloat16) {
    launch_batch<bfloat16, Bits>(call, slices, stream);
  } else {
    launch_batch<float16, Bits>(call, slices, stream);
  }
}

}  // namespace qk::cuda
