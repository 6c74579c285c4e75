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

void dequantize_packed(Stream stream, View packed, View centers, int64_t bits, const std::vector<int64_t>& shape,
                       View out);
int64_t lut_linear_workspace(View x, View packed, View centers, const std::optional<TensorView>& bias, int64_t bits,
                             const std::vector<int64_t>& shape);
void lut_linear(Stream stream, View x, View packed, View centers, const std::optional<TensorView>& bias, int64_t bits,
                const std::vector<int64_t>& shape, View out, View workspace);
int64_t quped_step_workspace(Views x, Views grad, Views quantized_grad, Views first, Views second, Views centers,
                             Views sharpness, Views strength, const std::string& chain, const std::string& optimizer,
                             const std::string& norm, double lr, double weight_decay, double beta1, double beta2,
                             double eps, bool nesterov, int64_t step_number, bool clamp, bool wants_codes,
                             int64_t pack_bits);
void quped_step(Stream stream, Views x, Views grad, Views quantized_grad, Views first, Views second, Views centers,
                Views sharpness, Views strength, const std::string& chain, const std::string& optimizer,
                const std::string& norm, double lr, double weight_decay, double beta1, double beta2, double eps,
                bool nesterov, int64_t step_number, bool clamp, bool wants_codes, int64_t pack_bits, Views center_grad,
                Views counts, Views sums, View distance, Views codes, View workspace);
void soft_quantize(Stream stream, View x, View centers, View sharpness, View out);
int64_t soft_quantize_backward_workspace(View grad, View x, View centers, View sharpness);
void soft_quantize_backward(Stream stream, View grad, View x, View centers, View sharpness, View grad_x,
                            View grad_centers, View workspace);

}  // namespace qk::cuda
