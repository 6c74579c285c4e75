// QK_CHECK: one sentence for a wrong argument: "<op>: <what was needed>, got <what came>". pybind11 turns it into
// ValueError.
#pragma once

#include <stdexcept>
#include <string>

namespace qk {

inline std::string part(const char* words) { return words; }
inline std::string part(const std::string& words) { return words; }
template <class Integer>
std::string part(Integer number) {
  return std::to_string(number);
}

// Glues its arguments, words and integers, into one string; called only on the way to an error.
template <class... Parts>
std::string text(const Parts&... parts) {
  return (part(parts) + ...);
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
