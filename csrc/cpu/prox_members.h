// The two passes of prox_centers over the members of all cells at once: counting them by their keys, and showing each
// selection those it asked for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cells.h"
#include "chunk.h"
#include "prox_selection.h"

namespace qk::cpu {

// body(size, code, key, valid) for the chunks of elements [begin, end) of x.
template <class T, class Body>
void for_each_members(const T* x, const Cells& cells, int64_t begin, int64_t end, Body&& body) {
  for_each_chunk(begin, end, [&](auto size, int64_t at, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) float value[Size];
    alignas(64) int32_t code[Size];
    alignas(64) uint32_t key[Size];
    load_chunk<Size>(x + at, valid, 0.0f, value);
    codes_of<Size>(cells, value, code);
    for (int i = 0; i < Size; ++i) {
      key[i] = member_key(value[i]);
    }
    body(size, code, key, valid);
  });
}

// Members of code k have keys from that of the midpoint below it to that of the midpoint above the last center equal to
// it.
inline void start_selections(const Cells& cells, uint32_t buckets, std::vector<CellSelection>& selections) {
  for (int k = 0; k < cells.levels; ++k) {
    int last = k;
    while (last + 1 < cells.levels && cells.first[last + 1] == cells.first[k]) {
      ++last;
    }
    const uint32_t low = k == 0 ? 0 : member_key(cells.midpoints[k - 1]);
    const uint32_t high = last + 1 == cells.levels ? kLastKey : member_key(cells.midpoints[last]);
    selections[static_cast<size_t>(k)].start(low, std::max(low, high), member_key(cells.values[k]), buckets);
  }
}

// The windows of all cells, one array a field: looked up by code they are gathers.
struct Windows {
  alignas(64) uint32_t low[kMaxLevels], high[kMaxLevels], shift[kMaxLevels], pivot[kMaxLevels];

  Windows(const Cells& cells, const std::vector<CellSelection>& selections) {
    for (int k = 0; k < cells.levels; ++k) {
      set(k, selections[static_cast<size_t>(k)].window());
      pivot[k] = member_key(cells.values[k]);
    }
  }

  KeyWindow of(int32_t code) const { return {low[code], high[code], shift[code]}; }

  void set(int k, const KeyWindow& window) {
    low[k] = window.low;
    high[k] = window.high;
    shift[k] = window.shift;
  }
};

// counts[k (buckets + 2) + b]: members of cell k in bucket b, those on its center in the last.
template <class T>
void count_members(const T* x, const Cells& cells, const Windows& windows, uint32_t buckets, int64_t begin, int64_t end,
                   int64_t* counts) {
  const uint32_t stride = buckets + 2;
  for_each_members(x, cells, begin, end, [&](auto size, const int32_t* code, const uint32_t* key, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) uint32_t slot[Size];
    for (int i = 0; i < Size; ++i) {
      const uint32_t bucket = windows.of(code[i]).bucket_of(key[i], buckets);
      slot[i] = static_cast<uint32_t>(code[i]) * stride + (key[i] == windows.pivot[code[i]] ? buckets + 1 : bucket);
    }
    for (int i = 0; i < valid; ++i) {
      ++counts[slot[i]];
    }
  });
}

// Shows each selection the members in its window, and those below that exceed what it has seen there.
template <class T>
void show_members(const T* x, const Cells& cells, const Windows& windows, int64_t begin, int64_t end,
                  std::vector<CellSelection>& selections) {
  alignas(64) uint32_t below[kMaxLevels] = {};
  for_each_members(x, cells, begin, end, [&](auto size, const int32_t* code, const uint32_t* key, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) int32_t wanted[Size];
    for (int i = 0; i < Size; ++i) {
      const KeyWindow window = windows.of(code[i]);
      const int32_t higher = key[i] > below[code[i]] ? 1 : 0, inside = key[i] <= window.high ? 1 : 0;
      const int32_t member = key[i] < window.low ? higher : inside;
      wanted[i] = key[i] == windows.pivot[code[i]] ? 0 : member;
    }
    int count = 0, which[Size];
    for (int i = 0; i < valid; ++i) {
      which[count] = i;
      count += wanted[i];
    }
    for (int i = 0; i < count; ++i) {
      const int32_t k = code[which[i]];
      CellSelection& selection = selections[static_cast<size_t>(k)];
      selection.see(key[which[i]]);
      below[k] = selection.below();
    }
  });
}

}  // namespace qk::cpu
