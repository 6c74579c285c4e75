// Every CUDA kernel: the table of contents. Arguments and outputs as in csrc/kernels.h, on one device; what is asked of
// them there holds here, with these differences: codes that are too large are clamped, and a kernel with scratch memory
// takes it as its last argument, uint8 of at least <op>_workspace(arguments) bytes, 256-byte aligned, with any
// contents. Launches go to the given stream and nothing is allocated, so calls can be captured in a graph.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "platform.h"

namespace qk::cuda {

using View = const TensorView&;
using Views = const std::vector<TensorView>&;

void soft_quantize(Stream stream, View x, View centers, View sharpness, View out);
int64_t soft_quantize_backward_workspace(View grad, View x, View centers, View sharpness);
void soft_quantize_backward(Stream stream, View grad, View x, View centers, View sharpness, View grad_x,
                            View grad_centers, View workspace);

}  // namespace qk::cuda
