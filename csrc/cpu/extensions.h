// Extensions of the processor beyond the instruction set a module is built for: asked at run time, and left out where
// QUPEDKERN_DISABLE names them ("avx512_bf16,avx512_vbmi"), so that what older processors run can be tested.
#pragma once

#include <cstdlib>
#include <cstring>

namespace qk::cpu {

inline bool is_disabled(const char* extension) {
  const char* names = std::getenv("QUPEDKERN_DISABLE");
  return names != nullptr && std::strstr(names, extension) != nullptr;
}

}  // namespace qk::cpu
