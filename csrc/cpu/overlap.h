// Whether tensors that a kernel writes lie apart from all others of its call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "../check.h"
#include "../tensor_view.h"

namespace qk::cpu {

// No written tensor may share memory with another tensor of the lists, all float32.
inline void check_apart(const char* op, const char* needed,
                        std::initializer_list<const std::vector<TensorView>*> written,
                        std::initializer_list<const std::vector<TensorView>*> read) {
  struct Range {
    const char* begin;
    const char* end;
    bool written;
  };
  std::vector<Range> ranges;
  const auto add = [&](const std::vector<TensorView>* list, bool is_written) {
    for (const TensorView& tensor : *list) {
      const int64_t bytes = tensor.numel() * static_cast<int64_t>(sizeof(float));
      if (bytes > 0) {
        ranges.push_back({tensor.as<char>(), tensor.as<char>() + bytes, is_written});
      }
    }
  };
  for (const auto* list : written) {
    add(list, true);
  }
  for (const auto* list : read) {
    add(list, false);
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  const char *end_of_any = nullptr, *end_of_written = nullptr;
  for (const Range& range : ranges) {
    const char* reach = range.written ? end_of_any : end_of_written;
    QK_CHECK(reach == nullptr || reach <= range.begin, text(op, ": ", needed), "tensors that do");
    end_of_any = std::max(end_of_any, range.end);
    end_of_written = range.written ? std::max(end_of_written, range.end) : end_of_written;
  }
}

}  // namespace qk::cpu
