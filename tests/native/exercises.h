// One function per kernel of csrc/kernels.h: it makes arguments for a setting and calls the kernel through `Same`.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tensor.h"

namespace driver {

struct Setting {
  int64_t groups;
  int64_t length;  // weights a group, classes an example
  int levels;
  Dtype dtype;
  bool hostile;
  unsigned seed;

  std::string name() const;
};

// call(threads, outputs) on fresh outputs; `written` are those before the call: poisoned, or copies of what a kernel
// updates in place.
using Call = std::function<void(int threads, std::vector<Tensor>& outputs)>;

// Runs the call with one and with several threads. Throws std::runtime_error where a byte of an output differs.
void same_for_all_threads(const Setting& setting, const std::vector<Tensor>& written, const Call& call);

// Throws std::runtime_error unless the call throws std::invalid_argument, for one thread and for several.
void refused(const Setting& setting, const std::vector<Tensor>& written, const Call& call);

struct Exercise {
  const char* kernel;
  void (*run)(const Setting& setting);
};

const std::vector<Exercise>& exercises();

}  // namespace driver
