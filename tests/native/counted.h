// Micro cases whose instructions are counted under valgrind (tests/native/count_instructions.py).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace driver {

constexpr int64_t kCountedElements = 65536;

struct CountedCase {
  const char* name;
  void (*run)(int repeats);
};

const std::vector<CountedCase>& counted_cases();

// Throws std::invalid_argument for an unknown name.
void run_counted(const std::string& name, int repeats);

}  // namespace driver
