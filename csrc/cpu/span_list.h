// The spans of many tensors as one list of tasks: twenty small layers are one parallel job.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "../check.h"
#include "rows.h"

namespace qk::cpu {

// Rows of each tensor of a list. Within a tensor the cut into spans is that of spans_of, so that a tensor gets the same
// bits alone and in a list.
class SpanList {
 public:
  void add(const Rows& rows, int64_t work) {
    const Spans spans = spans_of(rows);
    const int64_t cost = std::max<int64_t>(std::min(spans.span, spans.length), 1) * work;
    first_.push_back(count_);
    spans_.push_back(spans);
    count_ += spans.count;
    cost_ += cost * spans.count;
  }

  const Spans& of(size_t tensor) const { return spans_[tensor]; }

  // body(tensor, Span) for every span of every tensor, in parallel.
  template <class Body>
  void for_each(int threads, Body&& body) const {
    const int64_t grain = std::max<int64_t>(kGrain * count_ / std::max<int64_t>(cost_, 1), 1);
    parallel_for(threads, count_, grain, [&](int64_t first, int64_t last) {
      size_t tensor = static_cast<size_t>(std::upper_bound(first_.begin(), first_.end(), first) - first_.begin()) - 1;
      for (int64_t i = first; i < last; ++i) {
        while (tensor + 1 < first_.size() && i >= first_[tensor + 1]) {
          ++tensor;
        }
        body(tensor, span_at(spans_[tensor], i - first_[tensor]));
      }
    });
  }

 private:
  std::vector<Spans> spans_;
  std::vector<int64_t> first_;  // the task each tensor begins with
  int64_t count_ = 0;
  int64_t cost_ = 0;  // elementary operations of all
};

// One tensor for each of the `count` of another list.
inline void check_count(const char* op, const char* name, size_t got, size_t count) {
  QK_CHECK(got == count, text(op, ": ", name, " must hold ", count, " tensors"), std::to_string(got));
}

}  // namespace qk::cpu
