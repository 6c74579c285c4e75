// lut_linear in float32: any x, one table or one a row, rows of W that can be read in pieces (lut_pieces.h).
//
// A warp takes sixteen rows of W: lane (r, t) = (lane / 8, lane % 8) holds pieces of rows 4 r .. 4 r + 3, eight lanes
// side by side, and adds their products with fma, eight rows of x at a time; lanes t are added at the end in one order.
// Centers come from tables in shared memory, one word a weight without conflicts where one table serves all and has at
// most 32 entries; x, 0.25 words a weight and row of x, is staged there as float32 in the order of lanes' steps.
//
// Bound by instructions, four a weight and one more a row of x: below the bandwidth of the packed bytes.

#include "lut_kernels.h"

namespace qk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;     // a row of W
constexpr int kLaneRows = 4;  // of W, a lane
constexpr int kWarpRows = kWarp / kLanes * kLaneRows;
constexpr int kRows = kThreads / kWarp * kWarpRows;
constexpr int kStage = 1024;  // columns of x in shared memory at once
constexpr int kStep = 4;      // columns a load of x

// Entries from one row's table to the next: the tables of the four lanes r, four rows apart, share few banks.
template <int Bits>
constexpr int kTableStep = Bits == 1   ? 2
                           : Bits <= 3 ? 10
                           : Bits == 4 ? 20
                                       : 1 << Bits;

template <int Bits>
constexpr int kTableFloats = (Bits <= 4 ? kRows : 1) * kTableStep<Bits>;

template <int Bits, int Columns>
constexpr size_t kSharedBytes = sizeof(float) * (kTableFloats<Bits> + size_t{kStage} * Columns);

__device__ __forceinline__ float element(const LutCall& call, int64_t i) {
  switch (call.dtype) {
    case Dtype::bfloat16:
      return to_float(static_cast<const bfloat16*>(call.x)[i]);
    case Dtype::float16:
      return to_float(static_cast<const float16*>(call.x)[i]);
    default:
      return static_cast<const float*>(call.x)[i];
  }
}

__device__ __forceinline__ void write(const LutCall& call, int64_t b, int64_t n, float sum) {
  switch (call.dtype) {
    case Dtype::bfloat16:
      return write_sum<bfloat16>(call, blockIdx.y, b, n, sum);
    case Dtype::float16:
      return write_sum<float16>(call, blockIdx.y, b, n, sum);
    default:
      return write_sum<float>(call, blockIdx.y, b, n, sum);
  }
}

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows [first, first + Columns) of x, columns [begin, end), zeros up to a multiple of eight pieces.
template <int Bits, int Columns>
__device__ void stage_x(const LutCall& call, int first, int begin, int end, float4* staged) {
  constexpr int kSteps = Piece<Bits>::kCodes / kStep, kChunkSteps = kLanes * kSteps;
  const int chunks = static_cast<int>((end - begin + kChunkSteps * kStep - 1) / (kChunkSteps * kStep));
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < chunks * kChunkSteps * Columns; i += kThreads) {
    const int row = i / (chunks * kChunkSteps), source = i % (chunks * kChunkSteps);
    const int chunk = source / kChunkSteps, piece = source % kChunkSteps / kSteps, step = source % kSteps;
    const int64_t at = least(first + row, call.batch - 1) * call.K + (begin + source * kStep);
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (begin + source * kStep < end) {
      four = make_float4(element(call, at), element(call, at + 1), element(call, at + 2), element(call, at + 3));
    }
    staged[row * (kStage / kStep) + chunk * kChunkSteps + step * kLanes + piece] = four;
  }
}

template <int Bits>
__device__ void fill_tables(const LutCall& call, int first_row, bool one_table, float* tables) {
  const int count = one_table ? 1 : kRows;
  for (int i = static_cast<int>(threadIdx.x); i < count << Bits; i += kThreads) {
    const int row = i >> Bits, code = i & ((1 << Bits) - 1);
    const int64_t run = one_table ? 0 : least(first_row + row, call.N - 1) * call.K / call.length;
    tables[row * kTableStep<Bits> + code] =
        __ldg(call.centers + run * call.levels + (code < call.levels ? code : call.levels - 1));
  }
}

// Blocks a multiprocessor: what compiles without spilling registers for sm_80 and sm_90.
template <int Bits, int Columns>
constexpr int kResident = Columns == 1 ? (Bits == 1 ? 1 : 3) : (Bits == 4 ? 1 : 2);

template <int Bits, int Columns>
__global__ void __launch_bounds__(kThreads, kResident<Bits, Columns>) lut_fma_kernel(const __grid_constant__ LutCall call) {
  constexpr int kChunk = kLanes * Piece<Bits>::kCodes;
  static_assert(kStage % kChunk == 0, "a stage is whole chunks");
  QK_DYNAMIC_SHARED(float4, staged);
  float* const tables = reinterpret_cast<float*>(staged + kStage / kStep * Columns);

  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int t = lane % kLanes, row_in_block = warp * kWarpRows + lane / kLanes * kLaneRows;
  const int N = static_cast<int>(call.N), first_row = static_cast<int>(blockIdx.x) * kRows;
  const int first_x = static_cast<int>(blockIdx.z) * Columns, begin = static_cast<int>(blockIdx.y * call.slice);
  const int end = static_cast<int>(least(begin + call.slice, call.K));
  const bool one_table = call.length == call.N * call.K;
  fill_tables<Bits>(call, first_row, one_table, tables);

  // Offsets from the block's first row take one register, pointers two.
  const uint8_t* const block = call.packed + first_row * (call.K / 8 * Bits);
  const uint32_t row_bytes = static_cast<uint32_t>(call.K / 8 * Bits);
  uint32_t at = static_cast<uint32_t>(row_in_block) * row_bytes +
                static_cast<uint32_t>(begin + t * Piece<Bits>::kCodes) / 8 * Bits;
  const float* table[kLaneRows];
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    table[i] = tables + (one_table ? 0 : (row_in_block + i) * kTableStep<Bits>);
  }
  float sums[kLaneRows][Columns] = {};

  for (int stage = begin; stage < end; stage += kStage) {
    const int columns = end - stage < kStage ? end - stage : kStage;
    __syncthreads();  // all warps have read the stage before
    stage_x<Bits, Columns>(call, first_x, stage, stage + columns, staged);
    __syncthreads();
#pragma unroll 1
    for (int column = 0; column < columns; column += kChunk) {
      Piece<Bits> pieces[kLaneRows];
      const int rows_left = column + t * Piece<Bits>::kCodes < columns ? N - first_row - row_in_block : 0;
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
        if (i < rows_left) {
          pieces[i].load(block + (at + i * row_bytes));
        } else {
          pieces[i].clear();
        }
      }
      at += kChunk / 8 * Bits;
      const float4* const x = staged + column / kStep + t;
#pragma unroll
      for (int step = 0; step < Piece<Bits>::kCodes / kStep; ++step) {
        float weights[kLaneRows][kStep];
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
          for (int j = 0; j < kStep; ++j) {
            const uint32_t byte = pieces[i].template field<Bits, 2>((step * kStep + j) * Bits);
            weights[i][j] = *reinterpret_cast<const float*>(reinterpret_cast<const unsigned char*>(table[i]) + byte);
          }
        }
#pragma unroll
        for (int c = 0; c < Columns; ++c) {
          const float4 four = x[c * (kStage / kStep) + step * kLanes];
#pragma unroll
          for (int i = 0; i < kLaneRows; ++i) {
            sums[i][c] = fmaf(weights[i][0], four.x, sums[i][c]);
            sums[i][c] = fmaf(weights[i][1], four.y, sums[i][c]);
            sums[i][c] = fmaf(weights[i][2], four.z, sums[i][c]);
            sums[i][c] = fmaf(weights[i][3], four.w, sums[i][c]);
          }
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
    for (int c = 0; c < Columns; ++c) {
      float sum = sums[i][c];
#pragma unroll
      for (int other = kLanes / 2; other > 0; other /= 2) {
        sum += __shfl_xor_sync(kEveryLane, sum, other);
      }
      const int n = first_row + row_in_block + i, b = first_x + c;
      if (t == c % kLanes && n < N && b < call.batch) {
        write(call, b, n, sum);
      }
    }
  }
}

template <int Bits, int Columns>
void launch_columns(const LutCall& call, int64_t slices, cudaStream_t stream) {
  const auto kernel = &lut_fma_kernel<Bits, Columns>;
  raise_shared_limit(kernel, kSharedBytes<Bits, Columns>);
  const auto blocks = [](int64_t count, int64_t size) { return static_cast<unsigned>((count + size - 1) / size); };
  const dim3 grid(blocks(call.N, kRows), static_cast<unsigned>(slices), blocks(call.batch, Columns));
  launch(kernel, grid, dim3(kThreads), kSharedBytes<Bits, Columns>, stream, call);
}

}  // namespace

template <int Bits>
Slices lut_fma_slices(int64_t N, int64_t K) {
  return slices_of(N, K, kRows, kLanes * Piece<Bits>::kCodes);
}

template <int Bits>
void lut_fma(const LutCall& call, int64_t slices, cudaStream_t stream) {
  if (call.batch == 1) {
    launch_columns<Bits, 1>(call, slices, stream);
  } else {
    launch_columns<Bits, 8>(call, slices, stream);
  }
}

template Slices lut_fma_slices<1>(int64_t, int64_t);
template Slices lut_fma_slices<2>(int64_t, int64_t);
template Slices lut_fma_slices<3>(int64_t, int64_t);
template Slices lut_fma_slices<4>(int64_t, int64_t);
template Slices lut_fma_slices<8>(int64_t, int64_t);
template void lut_fma<1>(const LutCall&, int64_t, cudaStream_t);
template void lut_fma<2>(const LutCall&, int64_t, cudaStream_t);
template void lut_fma<3>(const LutCall&, int64_t, cudaStream_t);
template void lut_fma<4>(const LutCall&, int64_t, cudaStream_t);
template void lut_fma<8>(const LutCall&, int64_t, cudaStream_t);

}  // namespace qk::cuda
