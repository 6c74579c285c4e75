// Every native kernel: the table of contents.
//
// x and what is shaped like it has G * n elements, row r being elements [r n, (r + 1) n); centers is [m] or [G, m],
// ascending, m = 2..256; sharpness and strength are [1] or [G]. centers, sharpness and strength are float32 (centers
// that are only looked up may be of a half type), x is float32, bfloat16 or float16. Logits are [..., K], typed like x.
// Tensors are contiguous. A kernel writes every element of its outputs (the last arguments), computes in float32, and
// gives the same bits for any number of threads. Wrong arguments throw std::invalid_argument with a full sentence.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tensor_view.h"

namespace qk::cpu {

using View = const TensorView&;
using Views = const std::vector<TensorView>&;

void assign(int threads, View x, View centers, View codes);
void center_step(int threads, Views centers, Views center_grad, Views counts, Views sums, Views strength, View rate,
                 const std::string& norm, const std::string& method, double clip);
void dequantize(int threads, View codes, View centers, View out);
void dequantize_backward(int threads, View grad, View codes, View centers, View grad_centers);
void dequantize_packed(int threads, View packed, View centers, int64_t bits, const std::vector<int64_t>& shape,
                       View out);
void dequantize_packed_backward(int threads, View grad, View packed, View centers, int64_t bits,
                                const std::vector<int64_t>& shape, View grad_centers);
void distillation_loss(int threads, View student_logits, View teacher_logits, double temperature, View loss,
                       View statistics);
void distillation_loss_backward(int threads, View grad, View student_logits, View teacher_logits, double temperature,
                                View statistics, View grad_student, View grad_teacher);
void distance(int threads, View x, View centers, const std::string& norm, View out);
void distance_backward(int threads, View grad, View x, View centers, const std::string& norm, View grad_x,
                       View grad_centers);
void foreach_soft_quantize(int threads, Views x, Views centers, Views sharpness, Views out);
void foreach_soft_quantize_backward(int threads, Views grad, Views x, Views centers, Views sharpness, Views grad_x,
                                    Views grad_centers);
void hard_quantize(int threads, View x, View centers, bool straight_through, View out);
void hard_quantize_backward(int threads, View grad, View x, View centers, bool straight_through, View grad_x,
                            View grad_centers);
void init_centers(int threads, View x, int64_t levels, int64_t num_groups, const std::string& method,
                  const std::optional<TensorView>& weights, View centers);
void lut_linear(int threads, View x, View packed, View centers, const std::optional<TensorView>& bias, int64_t bits,
                const std::vector<int64_t>& shape, View out);
void pack_codes(int threads, View codes, int64_t bits, View packed);
void packed_embedding(int threads, View indices, View packed, View centers, int64_t bits,
                      const std::vector<int64_t>& shape, View out);
void packed_embedding_backward(int threads, View grad, View indices, View packed, View centers, int64_t bits,
                               const std::vector<int64_t>& shape, View grad_centers);
void prox_centers(int threads, View centers, View x, View strength, const std::string& norm, const std::string& method,
                  const std::optional<TensorView>& at, View out);
void prox_weights(int threads, View x, View centers, View strength, const std::string& norm, View out);
void quped_step(int threads, Views x, Views grad, Views quantized_grad, Views first, Views second, Views centers,
                Views sharpness, Views strength, const std::string& chain, const std::string& optimizer,
                const std::string& norm, double lr, double weight_decay, double beta1, double beta2, double eps,
                bool nesterov, int64_t step_number, bool clamp, bool wants_codes, int64_t pack_bits, Views center_grad,
                Views counts, Views sums, View distance, Views codes);
void soft_quantize(int threads, View x, View centers, View sharpness, View out);
void soft_quantize_backward(int threads, View grad, View x, View centers, View sharpness, View grad_x,
                            View grad_centers);
void unpack_codes(int threads, View packed, int64_t bits, const std::vector<int64_t>& shape, View codes);

}  // namespace qk::cpu
