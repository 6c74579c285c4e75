// The CPU kernels without Python, for sanitizers and for counting instructions.
//
// driver isas            the instruction sets this processor runs
// driver compiler        what built it
// driver sweep           every kernel of csrc/kernels.h on tails, hostile values and wrong codes, with one thread and
//                        several; the cuts of tensors too large to allocate; and what `threads` does. Exit code 1 with
//                        a sentence where something is wrong.
// driver threads         every kernel on tensors worth several threads: with one and several, called from several
//                        threads at once, and in a forked child
// driver count CASE N    N runs of a micro case (counted.cpp) on one thread
// driver cases           their names and how many elements a run has

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <mutex>
#include <regex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "check.h"
#include "counted.h"
#include "cpu/instruction_sets.h"
#include "exercises.h"
#include "index_arithmetic.h"

namespace {

using namespace driver;

#if defined(__clang__)
constexpr const char* kCompiler = "clang++ " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif
constexpr int kCallers = 4;
constexpr int64_t kMostWork = 1 << 20;  // elements times centers of one setting

// Every shape with a type and hostility of its own.
std::vector<Setting> settings() {
  std::vector<Setting> all;
  unsigned turn = 0;
  for (int64_t length : {0, 1, 3, 15, 16, 17, 63, 64, 65, 1000, 4096, 4097, 40003, 300001}) {
    for (int64_t groups : {1, 3, 37}) {
      for (int levels : {2, 3, 4, 5, 16, 17, 256}) {
        if (groups * length * levels <= kMostWork) {
          const auto dtype = static_cast<Dtype>(turn % 3);  // float32, bfloat16, float16
          all.push_back({groups, length, levels, dtype, turn / 3 % 2 == 1, turn});
          ++turn;
        }
      }
    }
  }
  return all;
}

// A few that are worth several threads.
std::vector<Setting> large_settings() {
  return {{1, 40003, 4, Dtype::float32, false, 1},
          {3, 20001, 16, Dtype::bfloat16, true, 2},
          {37, 4097, 2, Dtype::float16, false, 3}};
}

void run_all(const std::vector<Setting>& chosen) {
  for (const Exercise& exercise : exercises()) {
    for (const Setting& setting : chosen) {
      try {
        exercise.run(setting);
      } catch (const std::exception& error) {
        throw std::runtime_error(qk::text(exercise.kernel, ": ", std::string(error.what())));
      }
    }
  }
}

void check_that_no_kernel_is_left_out() {
  std::set<std::string> declared;
  std::ifstream header(QK_KERNELS_H);
  const std::regex declaration("^void (\\w+)\\(.*");
  std::smatch found;
  for (std::string line; std::getline(header, line);) {
    if (std::regex_match(line, found, declaration)) {
      declared.insert(found[1]);
    }
  }
  if (declared.empty()) {
    throw std::runtime_error("no kernel was found in " QK_KERNELS_H);
  }
  for (const Exercise& exercise : exercises()) {
    declared.erase(exercise.kernel);
  }
  for (const std::string& kernel : declared) {
    throw std::runtime_error(
        qk::text(kernel, ": the driver does not run it; add a function to tests/native/exercises.cpp"));
  }
}

void run_from_many_threads() {
  std::mutex mutex;
  std::string wrong;
  std::vector<std::thread> callers;
  for (int i = 0; i < kCallers; ++i) {
    callers.emplace_back([&] {
      try {
        run_all(large_settings());
      } catch (const std::exception& error) {
        const std::lock_guard<std::mutex> lock(mutex);
        wrong = error.what();
      }
    });
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
  if (!wrong.empty()) {
    throw std::runtime_error(qk::text("several callers at once: ", wrong));
  }
}

void run_in_a_fork() {
#if !defined(_WIN32)
  const pid_t child = fork();
  if (child == 0) {
    try {
      run_all(large_settings());
    } catch (const std::exception& error) {
      std::fprintf(stderr, "driver: in a forked child: %s\n", error.what());
      _exit(1);
    }
    _exit(0);
  }
  int status = 1;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
    throw std::runtime_error("a forked child failed");
  }
  run_all(large_settings());  // the parent's threads are still there
#endif
}

void threads() {
  check_that_no_kernel_is_left_out();
  run_all(large_settings());
  run_from_many_threads();
  run_in_a_fork();
  std::printf("%zu kernels: the same bytes for 1, 2 and 5 threads, from %d callers, after a fork\n", exercises().size(),
              kCallers);
}

void sweep() {
  check_that_no_kernel_is_left_out();
  check_index_arithmetic();
  const std::vector<Setting> all = settings();
  run_all(all);
  std::printf("%zu kernels on %zu settings\n", exercises().size(), all.size());
  threads();
}

}  // namespace

int main(int count, char** words) {
  const std::string command = count > 1 ? words[1] : "";
  try {
    if (command == "isas" && count == 2) {
      for (const std::string& name : qk::cpu::supported_instruction_sets()) {
        std::printf("%s\n", name.c_str());
      }
      return 0;
    }
    if (command == "compiler" && count == 2) {
      std::printf("%s\n", kCompiler);
      return 0;
    }
    if (command == "cases" && count == 2) {
      for (const CountedCase& counted : counted_cases()) {
        std::printf("%s %lld\n", counted.name, static_cast<long long>(kCountedElements));
      }
      return 0;
    }
    if (command == "count" && count == 4) {
      run_counted(words[2], std::atoi(words[3]));
      return 0;
    }
    if (command == "sweep" && count == 2) {
      sweep();
      return 0;
    }
    if (command == "threads" && count == 2) {
      threads();
      return 0;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "driver: %s\n", error.what());
    return 1;
  }
  std::fprintf(stderr, "driver: give isas, compiler, sweep, threads, cases, or count CASE N\n");
  return 2;
}
