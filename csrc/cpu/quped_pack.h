// SpanPacker: the codes of one span into the packed stream while they are in L1. Groups of eight codes that lie in one
// span are written at once; the few codes of a group shared with another span wait for stitch_edges.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../math/pack_codes.h"
#include "bit_stream.h"

namespace qk::cpu {

// Codes of elements [at, at + count), all of one group of eight.
struct Edge {
  int64_t at = 0;
  int count = 0;
  uint8_t codes[8] = {};
};

struct SpanEdges {
  Edge head, tail;
};

class SpanPacker {
 public:
  // The span begins at element `at` of the tensor.
  SpanPacker(const char* op, int bits, int64_t at, uint8_t* packed, SpanEdges* edges)
      : op_(op), bits_(bits), at_(at), packed_(packed), edges_(edges) {
    edges->head.at = at;
    edges->head.count = 0;
    missing_ = static_cast<int>((8 - at % 8) % 8);
  }

  // The next n codes of the span, at most kMost.
  void put(const uint8_t* codes, int n) {
    const int first = std::min(missing_, n);
    std::memcpy(edges_->head.codes + edges_->head.count, codes, static_cast<size_t>(first));
    edges_->head.count += first;
    missing_ -= first;
    at_ += first;
    std::memcpy(waiting_ + held_, codes + first, static_cast<size_t>(n - first));
    held_ += n - first;
    const int groups = held_ / 8;
    for_bits(op_, bits_, [&](auto constant) {
      constexpr int Bits = decltype(constant)::value;
      uint8_t* to = packed_ + at_ / 8 * Bits;
      for (int i = 0; i < groups; ++i) {
        math::store_bytes(math::pack_eight<Bits>(math::load_bytes(waiting_ + i * 8, 8)), Bits, to + i * Bits);
      }
    });
    at_ += groups * 8;
    held_ -= groups * 8;
    std::memmove(waiting_, waiting_ + groups * 8, static_cast<size_t>(held_));
  }

  void end() {
    edges_->tail.at = at_;
    edges_->tail.count = held_;
    std::memcpy(edges_->tail.codes, waiting_, static_cast<size_t>(held_));
  }

  static constexpr int kMost = 1024;

 private:
  const char* op_;
  int bits_;
  int64_t at_;  // of the first code that waits
  uint8_t* packed_;
  SpanEdges* edges_;
  int missing_;  // codes the head still takes
  int held_ = 0;
  uint8_t waiting_[kMost + 8];
};

// The groups that spans share, from their edges in order.
inline void stitch_edges(const std::vector<SpanEdges>& spans, int bits, int64_t numel, uint8_t* packed) {
  int64_t group = -1;
  uint64_t word = 0;
  const auto write = [&] {
    if (group >= 0) {
      math::store_bytes(word, (codes_in_group(group, numel) * bits + 7) / 8, packed + group * bits);
    }
  };
  for (const SpanEdges& span : spans) {
    for (const Edge* edge : {&span.head, &span.tail}) {
      for (int i = 0; i < edge->count; ++i) {
        const int64_t at = edge->at + i;
        if (at / 8 != group) {
          write();
          group = at / 8;
          word = 0;
        }
        word |= static_cast<uint64_t>(edge->codes[i]) << (at % 8 * bits);
      }
    }
  }
  write();
}

}  // namespace qk::cpu
