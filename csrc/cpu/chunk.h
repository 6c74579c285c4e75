// Chunks: a few vectors' worth of elements as float32 on the stack, so that every inner loop has a constant length.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../tensor_view.h"
#include "half.h"

namespace qk::cpu {

constexpr int kLanes = 16;  // one AVX-512 vector; also the number of partial sums, on every instruction set
constexpr int kChunk = 64;  // four such vectors hide the latency of one another

template <int Size>
using ChunkSize = std::integral_constant<int, Size>;

// body(ChunkSize<C>, begin, valid) over [begin, end): chunks of kChunk, then of kLanes, of which only the last may be
// partly valid. The order and the cut follow from begin and end alone.
template <class Body>
void for_each_chunk(int64_t begin, int64_t end, Body&& body) {
  for (; begin + kChunk <= end; begin += kChunk) {
    body(ChunkSize<kChunk>{}, begin, kChunk);
  }
  for (; begin < end; begin += kLanes) {
    body(ChunkSize<kLanes>{}, begin, static_cast<int>(std::min<int64_t>(kLanes, end - begin)));
  }
}

// The first `valid` of Size elements as float32, the others `padding`.
template <int Size, class T>
void load_chunk(const T* from, int valid, float padding, float* to) {
  if (valid == Size) {
    to_float<Size>(from, to);
    return;
  }
  T whole[Size] = {};
  std::memcpy(whole, from, static_cast<size_t>(valid) * sizeof(T));
  to_float<Size>(whole, to);
  for (int i = valid; i < Size; ++i) {
    to[i] = padding;
  }
}

template <int Size, class T>
void store_chunk(const float* from, int valid, T* to) {
  if (valid == Size) {
    from_float<Size>(from, to);
    return;
  }
  T whole[Size];
  from_float<Size>(from, whole);
  std::memcpy(to, whole, static_cast<size_t>(valid) * sizeof(T));
}

// Lane l of the sums gets elements l, l + kLanes, ... in order.
template <int Size>
void add_to_lanes(const float* values, float* lanes) {
  float sums[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    sums[l] = lanes[l];
  }
  for (int i = 0; i < Size; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      sums[l] += values[i + l];
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    lanes[l] = sums[l];
  }
}

inline double sum_of_lanes(const float* lanes) {
  double sum = 0.0;
  for (int l = 0; l < kLanes; ++l) {
    sum += static_cast<double>(lanes[l]);
  }
  return sum;
}

}  // namespace qk::cpu
