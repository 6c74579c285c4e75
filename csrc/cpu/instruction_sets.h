// Which of the instruction sets in CMakeLists.txt run here. Asked from the baseline module, which runs everywhere.
#pragma once

#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace qk::cpu {

// Widest last; the system must save the wide registers too, which __builtin_cpu_supports looks at.
inline std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names = {"baseline"};
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  // F16C by its bit: older compilers do not know the name.
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool avx2 =
      f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (avx2) {
    names.emplace_back("avx2");
  }
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    names.emplace_back("avx512");
  }
#endif
  return names;
}

}  // namespace qk::cpu
