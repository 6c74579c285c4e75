// CUDA's keywords and built-ins on the CPU, for kernels written against csrc/cuda/platform.h.
//
// A launch runs block by block. The threads of a block are fibers that run until they end or wait: a barrier or a warp
// collective is a rendezvous, and one that can never complete is an error that names the line, not a hang. Lanes of a
// warp do not run in step, so what only works if they do fails here. Which of the threads that can run goes first is
// selectable (run.h): forward, backward or shuffled, and a kernel whose result depends on it lacks a barrier.
// Shared memory holds NaN when a block starts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define threadIdx (::qk::emulator::current().index)
#define blockIdx (::qk::emulator::current().block)
#define blockDim (::qk::emulator::current().block_size)
#define gridDim (::qk::emulator::current().grid_size)

#define QK_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::qk::emulator::dynamic_shared())
// A place of its own in every instance of a template, as __shared__ has it.
#define QK_SHARED(type, name, count) \
  static char name##_site_;          \
  type* const name = static_cast<type*>(::qk::emulator::shared(&name##_site_, sizeof(type) * (count)))

// Where a call stands, by default arguments.
#define QK_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

using cudaStream_t = void*;

namespace qk::emulator {

struct Thread {
  uint3 index;
  uint3 block;
  dim3 block_size;
  dim3 grid_size;
};

const Thread& current();
void* dynamic_shared();
void* shared(const void* site, size_t bytes);

void barrier(const char* file, int line);

// Waits until all lanes of the mask have come here, then completes the operation once for all of them: arguments[l] is
// what lane l came with, null for lanes outside the mask.
using Complete = void (*)(void* const* arguments);
void collective(unsigned mask, Complete complete, void* argument, const char* file, int line);

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  const void* kernel;
};
void run(const Launch& launch, const std::function<void()>& body);
void raise_limit(const void* kernel, size_t bytes);

// A value each lane brings and what it takes away.
struct Exchange {
  uint64_t value;
  uint64_t result;
  int source;
};

template <class T>
T exchange(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>, "as CUDA's shuffles take");
  Exchange mine{0, 0, source};
  std::memcpy(&mine.value, &value, sizeof(T));
  collective(
      mask,
      [](void* const* arguments) {
        for (int lane = 0; lane < 32; ++lane) {
          auto* own = static_cast<Exchange*>(arguments[lane]);
          if (own != nullptr) {
            const auto* other = static_cast<const Exchange*>(arguments[own->source]);
            own->result = other == nullptr ? 0xffffffffffffffffull : other->value;  // of a lane outside: undefined
          }
        }
      },
      &mine, file, line);
  T result;
  std::memcpy(&result, &mine.result, sizeof(T));
  return result;
}

inline int lane() {
  const Thread& t = current();
  return static_cast<int>((t.index.x + t.block_size.x * (t.index.y + t.block_size.y * t.index.z)) % 32);
}

struct Vote {
  bool value;
  unsigned result;
};

inline unsigned ballot(unsigned mask, bool value, const char* file, int line) {
  Vote mine{value, 0};
  collective(
      mask,
      [](void* const* arguments) {
        unsigned result = 0;
        for (int l = 0; l < 32; ++l) {
          if (arguments[l] != nullptr && static_cast<Vote*>(arguments[l])->value) {
            result |= 1u << l;
          }
        }
        for (int l = 0; l < 32; ++l) {
          if (arguments[l] != nullptr) {
            static_cast<Vote*>(arguments[l])->result = result;
          }
        }
      },
      &mine, file, line);
  return mine.result;
}

}  // namespace qk::emulator

inline void __syncthreads(QK_SITE) { qk::emulator::barrier(file, line); }

inline void __syncwarp(unsigned mask = 0xffffffffu, QK_SITE) {
  qk::emulator::collective(mask, [](void* const*) {}, nullptr, file, line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, QK_SITE) {
  const int lane = qk::emulator::lane();
  return qk::emulator::exchange(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), file, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32, QK_SITE) {
  const int lane = qk::emulator::lane(), source = lane ^ other;
  return qk::emulator::exchange(mask, value, (source & ~(width - 1)) > (lane | (width - 1)) ? lane : source, file,
                                line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, QK_SITE) {
  const int lane = qk::emulator::lane(), source = lane + delta;
  return qk::emulator::exchange(mask, value, source > (lane | (width - 1)) ? lane : source, file, line);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, QK_SITE) {
  const int lane = qk::emulator::lane(), source = lane - delta;
  return qk::emulator::exchange(mask, value, source < (lane & ~(width - 1)) ? lane : source, file, line);
}

inline unsigned __ballot_sync(unsigned mask, bool value, QK_SITE) {
  return qk::emulator::ballot(mask, value, file, line);
}
inline int __any_sync(unsigned mask, bool value, QK_SITE) { return qk::emulator::ballot(mask, value, file, line) != 0; }
inline int __all_sync(unsigned mask, bool value, QK_SITE) {
  return qk::emulator::ballot(mask, value, file, line) == mask;
}

inline void __threadfence() {}

template <class T>
T __ldg(const T* from) {
  return *from;
}

template <class T>
T atomicAdd(T* to, T value) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4, "float atomics have no order");
  const T before = *to;
  *to = static_cast<T>(before + value);
  return before;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((((static_cast<uint64_t>(high) << 32) | low) << (by & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32) | low) >> (by & 31));
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = (static_cast<uint64_t>(high) << 32) | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = (selector >> (4 * i)) & 15u;
    const auto byte = static_cast<unsigned>(bytes >> (8 * (pick & 7u))) & 255u;
    const unsigned sign = byte & 128u ? 255u : 0u;
    result |= (pick & 8u ? sign : byte) << (8 * i);
  }
  return result;
}

template <class To, class From>
To qk_bits(From value) {
  To to;
  static_assert(sizeof(To) == sizeof(From), "");
  std::memcpy(&to, &value, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float value) { return qk_bits<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return qk_bits<float>(value); }
inline int __float_as_int(float value) { return qk_bits<int>(value); }
inline float __int_as_float(int value) { return qk_bits<float>(value); }

namespace qk::cuda {

template <class... Expected, class... Actual>
void launch(void (*kernel)(Expected...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Actual&&... args) {
  const std::tuple<std::decay_t<Expected>...> held(args...);
  emulator::run({grid, block, shared_bytes, reinterpret_cast<const void*>(kernel)}, [&] { std::apply(kernel, held); });
}

template <class... Parameters>
void raise_shared_limit(void (*kernel)(Parameters...), size_t bytes) {
  emulator::raise_limit(reinterpret_cast<const void*>(kernel), bytes);
}

inline void fill_zero(void* pointer, size_t bytes, cudaStream_t) { std::memset(pointer, 0, bytes); }

struct OnDevice {
  explicit OnDevice(int) {}
};

}  // namespace qk::cuda

#include "arithmetic.h"
