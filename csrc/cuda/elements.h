// The elements of a tile a thread holds: whole 16-byte words, a word of each thread after a word of each thread. A tile
// that is full and aligned is read and written in words, any other element by element.
#pragma once

#include "platform.h"

namespace qk::cuda {

template <class T>
constexpr int kWord = 16 / static_cast<int>(sizeof(T));  // elements of a word

__device__ __forceinline__ void expand(const uint4& word, float (&to)[4], float) {
  to[0] = __uint_as_float(word.x);
  to[1] = __uint_as_float(word.y);
  to[2] = __uint_as_float(word.z);
  to[3] = __uint_as_float(word.w);
}

template <class Half>
__device__ __forceinline__ void expand(const uint4& word, float (&to)[8], Half) {
  unpack_pair<Half>(word.x, to[0], to[1]);
  unpack_pair<Half>(word.y, to[2], to[3]);
  unpack_pair<Half>(word.z, to[4], to[5]);
  unpack_pair<Half>(word.w, to[6], to[7]);
}

__device__ __forceinline__ uint4 contract(const float (&from)[4], float) {
  return make_uint4(__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]),
                    __float_as_uint(from[3]));
}

template <class Half>
__device__ __forceinline__ uint4 contract(const float (&from)[8], Half) {
  return make_uint4(pack_pair<Half>(from[0], from[1]), pack_pair<Half>(from[2], from[3]),
                    pack_pair<Half>(from[4], from[5]), pack_pair<Half>(from[6], from[7]));
}

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15u) == 0;
}

// One row's tile at `from`, of which `left` elements exist, seen by thread `thread` of `threads`.
struct Tile {
  int thread;
  int threads;
  int64_t left;

  // In the tile, of element e of this thread's kCount.
  template <class T>
  __device__ __forceinline__ int64_t index_of(int e) const {
    return (e / kWord<T> * threads + thread) * kWord<T> + e % kWord<T>;
  }

  // Zeros for elements that do not exist.
  template <class T, int kCount>
  __device__ __forceinline__ void load(const T* from, float (&to)[kCount]) const {
    static_assert(kCount % kWord<T> == 0, "whole words");
    if (left >= threads * kCount && is_aligned(from)) {
      uint4 words[kCount / kWord<T>];
#pragma unroll
      for (int w = 0; w < kCount / kWord<T>; ++w) {
        words[w] = load_streaming(reinterpret_cast<const uint4*>(from) + w * threads + thread);
      }
#pragma unroll
      for (int w = 0; w < kCount / kWord<T>; ++w) {
        float values[kWord<T>];
        expand(words[w], values, T{});
#pragma unroll
        for (int i = 0; i < kWord<T>; ++i) {
          to[w * kWord<T> + i] = values[i];
        }
      }
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const int64_t i = index_of<T>(e);
        to[e] = i < left ? to_float(from[i]) : 0.0f;
      }
    }
  }

  template <class T, int kCount>
  __device__ __forceinline__ void store(T* to, const float (&from)[kCount]) const {
    if (left >= threads * kCount && is_aligned(to)) {
#pragma unroll
      for (int w = 0; w < kCount / kWord<T>; ++w) {
        float values[kWord<T>];
#pragma unroll
        for (int i = 0; i < kWord<T>; ++i) {
          values[i] = from[w * kWord<T> + i];
        }
        store_streaming(reinterpret_cast<uint4*>(to) + w * threads + thread, contract(values, T{}));
      }
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const int64_t i = index_of<T>(e);
        if (i < left) {
          to[i] = from_float<T>(from[e]);
        }
      }
    }
  }
};

}  // namespace qk::cuda
