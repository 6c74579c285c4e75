// Codes out of range are told before anything is written. HighestCode gathers what many tasks saw.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>

#include "../check.h"
#include "parallel.h"

namespace qk::cpu {

class HighestCode {
 public:
  // From any thread; the maximum does not depend on the order.
  void see(int code) {
    int seen = highest_.load(std::memory_order_relaxed);
    while (code > seen && !highest_.compare_exchange_weak(seen, code, std::memory_order_relaxed)) {
    }
  }

  int value() const { return highest_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int> highest_{-1};
};

// The largest of n codes, -1 for none.
inline int highest_of(const uint8_t* codes, int64_t n) {
  uint8_t highest = 0;
  for (int64_t i = 0; i < n; ++i) {
    highest = std::max(highest, codes[i]);
  }
  return n > 0 ? highest : -1;
}

inline void check_codes_below_levels(const char* op, const HighestCode& highest, int levels) {
  QK_CHECK(highest.value() < levels, text(op, ": codes must be below m = ", levels), std::to_string(highest.value()));
}

// Throws where one of n codes is `levels` or more; 256 levels, which no byte exceeds, cost nothing.
inline void check_codes(const char* op, int threads, const uint8_t* codes, int64_t n, int levels) {
  if (levels > UINT8_MAX) {
    return;
  }
  HighestCode highest;
  parallel_for(threads, n, kGrain * 8,
               [&](int64_t first, int64_t last) { highest.see(highest_of(codes + first, last - first)); });
  check_codes_below_levels(op, highest, levels);
}

}  // namespace qk::cpu
