// QK_CHECK: one sentence for a wrong argument: "<op>: <what was needed>, got <what came>". pybind11 turns it into ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace qk {

// Glues its arguments into one string; called only on the way to an error.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

[[noreturn]] inline void fail(const std::string& needed, const std::string& came) {
  throw std::invalid_argument(needed + ", got " + came);
}

}  // namespace qk

#define QK_CHECK(condition, needed, came) \
  do {                                    \
    if (!(condition)) {                   \
      ::qk::fail((needed), (came));       \
    }                                     \
  } while (false)
