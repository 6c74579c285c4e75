// The temperature-scaled divergence KL(p_w || p) of one example, p = softmax(z), p_w = softmax(z_w): sums over some of
// its classes, how two such parts become one, and the gradients per class.
#pragma once

#include <cmath>

#include "exp.h"

namespace qk::math {

// Sums over some classes of one softmax, relative to their largest z.
struct SoftmaxPart {
  double max = -HUGE_VAL;
  double sum = 0.0;  // sum exp(z - base)

  // What is subtracted: exp(-inf - -inf) would be NaN where all these classes have probability 0.
  double base() const { return max == -HUGE_VAL ? 0.0 : max; }

  // log sum; NaN, as the softmax itself is, where every class is -inf or one is +inf or NaN.
  double log_sum() const { return sum > 0.0 ? std::log(sum) : static_cast<double>(NAN); }

  // Comparisons pass a NaN logit over, the sum does not.
  double max_or_nan() const { return sum > 0.0 ? max : static_cast<double>(NAN); }
};

struct DivergencePart {
  SoftmaxPart student;
  SoftmaxPart teacher;
  double cross = 0.0;  // sum e_w ((z_w - base_w) - (z - base)), e_w = exp(z_w - base_w)
};

inline double share_of(const SoftmaxPart& part, const SoftmaxPart& whole) {
  return part.max == -HUGE_VAL ? 0.0 : std::exp(part.max - whole.base());
}

// `whole` with another part's classes. cross moves to the common bases; a part without weight adds nothing to it, were
// it infinite.
inline DivergencePart joined(const DivergencePart& a, const DivergencePart& b) {
  DivergencePart whole;
  whole.student.max = a.student.max > b.student.max ? a.student.max : b.student.max;
  whole.teacher.max = a.teacher.max > b.teacher.max ? a.teacher.max : b.teacher.max;
  for (const DivergencePart* part : {&a, &b}) {
    const double share = share_of(part->teacher, whole.teacher);
    whole.student.sum += part->student.sum * share_of(part->student, whole.student);
    whole.teacher.sum += part->teacher.sum * share;
    if (share != 0.0) {
      const double shift =
          (part->teacher.base() - whole.teacher.base()) - (part->student.base() - whole.student.base());
      whole.cross += share * (part->cross + part->teacher.sum * shift);
    }
  }
  return whole;
}

// sum p_w (log p_w - log p)
inline double divergence(const DivergencePart& all) {
  return all.cross / all.teacher.sum - (all.teacher.log_sum() - all.student.log_sum());
}

// One class's term of cross, from shifted = z - base of both; 0 where the teacher's probability is.
QK_HD float cross_term(float e_w, float shifted_w, float shifted) {
  return e_w == 0.0f ? 0.0f : e_w * (shifted_w - shifted);
}

// Per example, in float32, what the backward pass needs.
struct SoftmaxStatistics {
  float max;
  float log_sum;

  QK_HD float log_probability(float z) const { return (z - max) - log_sum; }
};

// Per class: dKL/dz = p - p_w, dKL/dz_w = p_w (log p_w - log p - KL), 0 where p_w is.
struct DivergenceSlopes {
  float student;
  float teacher;
};

QK_HD DivergenceSlopes divergence_slopes(float log_p, float log_pw, float divergence) {
  const float p = exp_of_nonpositive(log_p);
  const float p_w = exp_of_nonpositive(log_pw);
  const float pull = p_w * ((log_pw - log_p) - divergence);
  return {p - p_w, p_w == 0.0f ? 0.0f : pull};
}

}  // namespace qk::math
