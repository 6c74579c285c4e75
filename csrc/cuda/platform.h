// What a CUDA kernel may use. Every file of csrc/cuda includes this one and nothing of CUDA's, so that the same sources
// compile with nvcc and, where QK_CUDA_EMULATED is defined, with any C++17 compiler against tests/cuda_emulator, which
// runs them on the CPU.
//
// The keywords: __global__, __device__, __restrict__, __launch_bounds__, __forceinline__, __grid_constant__.
// The built-ins: threadIdx, blockIdx, blockDim, gridDim, dim3, (u)int2, (u)int4, float2, float4 and their make_
// functions,
//   __syncthreads, __syncwarp, __shfl_sync, __shfl_xor_sync, __shfl_down_sync, __shfl_up_sync, __ballot_sync,
//   __any_sync,
//   __all_sync, __ldg, __threadfence, atomicAdd on integers, __popc, __clz, __ffs, __byte_perm, __funnelshift_l,
//   __funnelshift_r, __float_as_uint, __uint_as_float, __float_as_int, __int_as_float, float functions of <cmath>.
// In qk::cuda:
//   kWarp, kEveryLane
//   QK_SHARED(type, name, count)                    __shared__ type name[count]
//   QK_DYNAMIC_SHARED(type, name)                   type* name: the launch's dynamic shared memory, 128-byte aligned
//   launch(kernel, grid, block, shared_bytes, stream, args...)   throws std::runtime_error where it cannot start
//   raise_shared_limit(kernel, bytes)               before a launch with more than 48 KB of dynamic shared memory
//   fill_zero(pointer, bytes, stream)               asynchronous
//   OnDevice(device)                                a scope in which that device is current
//   mma_m16n8k16_bf16(d, a, b), mma_m16n8k16_f16    d += a b with PTX's fragment layout, float32 accumulators
//   copy_async_16(shared, global), copy_async_commit(), copy_async_wait<N>()
//   exp2_approx, rcp_approx, rsqrt_approx           one special function; results and arguments below 2^-126 are 0
//   min_or_nan(a, b), max_or_nan(a, b)              one instruction; NaN where either is
//   load_streaming(const uint4*), store_streaming(uint4*, uint4)   16 bytes that no cache needs to keep
//   to_float(T), from_float<T>(float)               T: float, bfloat16, float16; to nearest even, NaN stays NaN
//   unpack_pair<T>(word, low, high), pack_pair<T>(low, high)       two halves in a word, the first in the low bits
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../math/macros.h"
#include "../tensor_view.h"

#if defined(QK_CUDA_EMULATED)
#include "cuda_emulator.h"
#else
#include "device.h"
#include "launch.h"
#endif

namespace qk::cuda {

constexpr int kWarp = 32;
constexpr unsigned kEveryLane = 0xffffffffu;

constexpr size_t kStaticSharedLimit = 48 * 1024;  // of dynamic shared memory, unless raised

// What a call from Python hands a kernel's launcher beside its tensors.
struct Stream {
  int device;
  cudaStream_t handle;
};

}  // namespace qk::cuda
