#pragma once

namespace driver {

// Throws std::runtime_error with a sentence where a cut is wrong.
void check_index_arithmetic();

}  // namespace driver
