// What distillation_loss and its backward share: their arguments, and the statistics of an example.
#pragma once

#include <string>

#include "../check.h"
#include "../math/distillation_loss.h"
#include "../tensor_view.h"
#include "rows.h"

namespace qk::cpu {

// Columns of statistics [N, 5], float32.
struct DistillationStatistics {
  math::SoftmaxStatistics student;
  math::SoftmaxStatistics teacher;
  float divergence;
};
constexpr int kDistillationStatistics = 5;
static_assert(sizeof(DistillationStatistics) == kDistillationStatistics * sizeof(float), "a row of statistics");

// N examples of K classes, with no centers.
inline Rows examples_of(const char* op, const TensorView& student, const TensorView& teacher,
                        const TensorView& statistics) {
  QK_CHECK(student.dim() > 0 && student.sizes.back() > 0, text(op, ": student_logits must be [..., classes]"),
           "shape " + shape_of(student.sizes));
  check_same_dtype(op, "teacher_logits", teacher, student);
  const int64_t classes = student.sizes.back();
  const int64_t examples = student.numel() / classes;
  QK_CHECK(statistics.sizes == (std::vector<int64_t>{examples, kDistillationStatistics}),
           text(op, ": statistics must have shape (", examples, ", ", kDistillationStatistics, ")"),
           shape_of(statistics.sizes));
  return {examples, classes, 0, nullptr};
}

// z = logits / T. The reciprocal is rounded as the eager formula rounds it: the maxima are then the same floats.
inline float reciprocal_of(double temperature) { return static_cast<float>(1.0 / temperature); }

}  // namespace qk::cpu
