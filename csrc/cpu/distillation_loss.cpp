// distillation_loss: two softmax denominators and the divergence between them, in one reading of the logits. A block of
// classes is passed over twice in L1, for its maxima and then for sums relative to them; blocks, spans and examples are
// joined in float64 in an order fixed by the shape. Two exponentials a class: bound by memory once the logits leave the
// cache, by the exponentials before, and by the logarithms of the denominators where classes are few.

#include "distillation_loss.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "../kernels.h"
#include "chunk.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "distillation_loss";
constexpr int64_t kWork = 16;
constexpr float kNone =
    -std::numeric_limits<float>::infinity();  // a class of probability 0: what tails are padded with

template <int Size, class T>
void load_softened(const T* logits, int valid, float reciprocal, float* z) {
  load_chunk<Size>(logits, valid, kNone, z);
  for (int i = 0; i < Size; ++i) {
    z[i] *= reciprocal;
  }
}

// A lane for each element of a chunk; one maximum is the same whatever the order.
template <int Size>
void raise_lanes(const float* z, float* lanes) {
  for (int i = 0; i < Size; ++i) {
    lanes[i] = z[i] > lanes[i] ? z[i] : lanes[i];
  }
}

// By halves, so that no comparison waits for the one before it.
template <int Size = kChunk>
float highest_of(float* lanes) {
  if constexpr (Size > 1) {
    raise_lanes<Size / 2>(lanes + Size / 2, lanes);
    return highest_of<Size / 2>(lanes);
  }
  return lanes[0];
}

template <class T>
void find_maxima(const T* student, const T* teacher, float reciprocal, const Span& block, math::DivergencePart& part) {
  alignas(64) float lanes[2][kChunk];
  std::fill_n(&lanes[0][0], 2 * kChunk, kNone);
  for_each_chunk(block.begin, block.end, [&](auto size, int64_t begin, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) float z[Size];
    load_softened<Size>(student + begin, valid, reciprocal, z);
    raise_lanes<Size>(z, lanes[0]);
    load_softened<Size>(teacher + begin, valid, reciprocal, z);
    raise_lanes<Size>(z, lanes[1]);
  });
  part.student.max = highest_of(lanes[0]);
  part.teacher.max = highest_of(lanes[1]);
}

template <class T>
math::DivergencePart part_of_block(const T* student, const T* teacher, float reciprocal, const Span& block) {
  math::DivergencePart part;
  find_maxima(student, teacher, reciprocal, block, part);
  const float base = static_cast<float>(part.student.base());
  const float base_w = static_cast<float>(part.teacher.base());
  alignas(64) float lanes[3][kLanes] = {};
  for_each_chunk(block.begin, block.end, [&](auto size, int64_t begin, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) float z[Size];
    alignas(64) float z_w[Size];
    alignas(64) float e[Size];
    alignas(64) float e_w[Size];
    load_softened<Size>(student + begin, valid, reciprocal, z);
    load_softened<Size>(teacher + begin, valid, reciprocal, z_w);
    for (int i = 0; i < Size; ++i) {
      const float shifted = z[i] - base;
      const float shifted_w = z_w[i] - base_w;
      e[i] = math::exp_of_nonpositive(shifted);
      e_w[i] = math::exp_of_nonpositive(shifted_w);
      z[i] = math::cross_term(e_w[i], shifted_w, shifted);
    }
    add_to_lanes<Size>(e, lanes[0]);
    add_to_lanes<Size>(e_w, lanes[1]);
    add_to_lanes<Size>(z, lanes[2]);
  });
  part.student.sum = sum_of_lanes(lanes[0]);
  part.teacher.sum = sum_of_lanes(lanes[1]);
  part.cross = sum_of_lanes(lanes[2]);
  return part;
}

template <class T>
math::DivergencePart part_of_span(const T* student, const T* teacher, float reciprocal, const Span& span) {
  math::DivergencePart part;
  for_each_block(span, [&](const Span& block) {
    const math::DivergencePart next = part_of_block(student, teacher, reciprocal, block);
    part = block.begin == span.begin ? next : math::joined(part, next);
  });
  return part;
}

DistillationStatistics statistics_of(const math::DivergencePart& all) {
  return {{static_cast<float>(all.student.max_or_nan()), static_cast<float>(all.student.log_sum())},
          {static_cast<float>(all.teacher.max_or_nan()), static_cast<float>(all.teacher.log_sum())},
          static_cast<float>(math::divergence(all))};
}

}  // namespace

void distillation_loss(int threads, View student_logits, View teacher_logits, double temperature, View loss,
                       View statistics) {
  const Rows examples = examples_of(kOp, student_logits, teacher_logits, statistics);
  QK_CHECK(loss.numel() == 1, text(kOp, ": loss must have one element"), std::to_string(loss.numel()));
  const float reciprocal = reciprocal_of(temperature);
  auto* kept = statistics.as<DistillationStatistics>();
  const Spans spans = spans_of(examples);
  std::vector<math::DivergencePart> parts(static_cast<size_t>(spans.per_row > 1 ? spans.count : 0));
  for_float_type(student_logits.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_span(threads, spans, kWork, [&](const Span& span) {
      const auto part = part_of_span(student_logits.as<T>(), teacher_logits.as<T>(), reciprocal, span);
      if (spans.per_row == 1) {
        kept[span.row] = statistics_of(part);
      } else {
        parts[static_cast<size_t>(span.index)] = part;
      }
    });
  });
  double total = 0.0;
  for (int64_t example = 0; example < examples.count; ++example) {
    if (spans.per_row > 1) {
      const auto first = parts.begin() + example * spans.per_row;
      kept[example] = statistics_of(std::accumulate(first + 1, first + spans.per_row, *first, math::joined));
    }
    total += static_cast<double>(kept[example].divergence);
  }
  const double mean = total / static_cast<double>(std::max<int64_t>(examples.count, 1));
  *loss.as<float>() = static_cast<float>(temperature * temperature * mean);
}

}  // namespace qk::cpu
