// distillation_loss_backward: with the statistics of the forward pass each class is independent; one sweep reads both
// logits and writes both gradients. Two exponentials a class: bound by memory outside the cache, by them inside.

#include <algorithm>

#include "../kernels.h"
#include "chunk.h"
#include "distillation_loss.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "distillation_loss_backward";
constexpr int64_t kWork = 16;

template <class T>
void run_span(const T* student, const T* teacher, DistillationStatistics kept, float reciprocal, float scale,
              const Span& span, T* grad_student, T* grad_teacher) {
  for_each_chunk(span.begin, span.end, [&](auto size, int64_t begin, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) float z[Size];
    alignas(64) float z_w[Size];
    load_chunk<Size>(student + begin, valid, 0.0f, z);
    load_chunk<Size>(teacher + begin, valid, 0.0f, z_w);
    for (int i = 0; i < Size; ++i) {
      const float log_p = kept.student.log_probability(z[i] * reciprocal);
      const float log_pw = kept.teacher.log_probability(z_w[i] * reciprocal);
      const math::DivergenceSlopes slopes = math::divergence_slopes(log_p, log_pw, kept.divergence);
      z[i] = scale * slopes.student;
      z_w[i] = scale * slopes.teacher;
    }
    store_chunk<Size>(z, valid, grad_student + begin);
    store_chunk<Size>(z_w, valid, grad_teacher + begin);
  });
}

}  // namespace

void distillation_loss_backward(int threads, View grad, View student_logits, View teacher_logits, double temperature,
                                View statistics, View grad_student, View grad_teacher) {
  const Rows examples = examples_of(kOp, student_logits, teacher_logits, statistics);
  QK_CHECK(grad.numel() == 1, text(kOp, ": grad must have one element"), std::to_string(grad.numel()));
  check_same_dtype(kOp, "grad_student", grad_student, student_logits);
  check_same_dtype(kOp, "grad_teacher", grad_teacher, student_logits);
  const double count = static_cast<double>(std::max<int64_t>(examples.count, 1));
  const float scale = *grad.as<float>() * static_cast<float>(temperature / count);
  const float reciprocal = reciprocal_of(temperature);
  const auto* kept = statistics.as<DistillationStatistics>();
  for_float_type(student_logits.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_span(threads, spans_of(examples), kWork, [&](const Span& span) {
      run_span(student_logits.as<T>(), teacher_logits.as<T>(), kept[span.row], reciprocal, scale, span,
               grad_student.as<T>(), grad_teacher.as<T>());
    });
  });
}

}  // namespace qk::cpu
