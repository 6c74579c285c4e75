// What tests choose of the emulator.
#pragma once

#include <cstdint>
#include <string>

namespace qk::emulator {

// "forward", "backward" or "shuffled": which of the threads that can run goes first.
void set_order(const std::string& order, uint32_t seed);

}  // namespace qk::emulator
