// soft_quantize_backward: the sigmoids are computed again, nothing is stored between the passes, and one sweep gives
// both gradients. What bounds it stands in soft_backward_block.h.

#include "../kernels.h"
#include "row_sums.h"
#include "rows.h"
#include "soft_backward_block.h"
#include "span_list.h"

namespace qk::cpu {
namespace {

constexpr int64_t kWorkPerMidpoint = 4;

struct Item {
  Rows rows;
  PerRow steepness;
  const TensorView* grad;
  const TensorView* x;
  const TensorView* grad_x;
  float* grad_centers;

  Item(const char* op, View grad_, View x_, View centers, View sharpness, View grad_x_, View grad_centers_)
      : rows(rows_of(op, x_, centers)),
        steepness(per_row(op, "sharpness", sharpness, rows)),
        grad(&grad_),
        x(&x_),
        grad_x(&grad_x_),
        grad_centers(grad_centers_.as<float>()) {
    check_same_dtype(op, "grad", grad_, x_);
    check_same_dtype(op, "grad_x", grad_x_, x_);
    check_same(op, "grad_centers", grad_centers_, centers);
  }

  int64_t work() const { return kWorkPerMidpoint * rows.levels; }

  void run(const Span& span, double* sums) const {
    const SoftRow row(rows.centers_of(span.row), rows.levels, steepness.of(span.row), Midpoints::kAll);
    for_float_type(x->dtype, [&](auto type) {
      using T = decltype(type);
      const bool streamed = should_stream(grad_x->as<T>() + span.begin, x->numel());
      alignas(64) T ready[kBlock];  // of a block on its way past the caches
      for_each_block(span, [&](const Span& block) {
        T* to = grad_x->as<T>() + block.begin;
        const int64_t n = block.end - block.begin;
        soft_backward_block(row, grad->as<T>() + block.begin, x->as<T>() + block.begin, n, streamed ? ready : to, sums);
        if (streamed) {
          stream_block(ready, n, to);
        }
      });
      if (streamed) {
        end_stream();
      }
    });
  }
};

}  // namespace

void soft_quantize_backward(int threads, View grad, View x, View centers, View sharpness, View grad_x,
                            View grad_centers) {
  const Item item("soft_quantize_backward", grad, x, centers, sharpness, grad_x, grad_centers);
  sum_rows(threads, item.rows, item.work(), item.grad_centers,
           [&](const Span& span, double* sums) { item.run(span, sums); });
}

void foreach_soft_quantize_backward(int threads, Views grad, Views x, Views centers, Views sharpness, Views grad_x,
                                    Views grad_centers) {
  constexpr const char* kOp = "foreach_soft_quantize_backward";
  check_count(kOp, "x", x.size(), grad.size());
  check_count(kOp, "centers", centers.size(), grad.size());
  check_count(kOp, "sharpness", sharpness.size(), grad.size());
  check_count(kOp, "grad_x", grad_x.size(), grad.size());
  check_count(kOp, "grad_centers", grad_centers.size(), grad.size());
  std::vector<Item> items;
  std::vector<RowSums> sums;
  SpanList spans;
  for (size_t i = 0; i < x.size(); ++i) {
    items.emplace_back(kOp, grad[i], x[i], centers[i], sharpness[i], grad_x[i], grad_centers[i]);
    sums.emplace_back(items[i].rows, items[i].grad_centers);
    spans.add(items[i].rows, items[i].work());
  }
  spans.for_each(threads, [&](size_t i, const Span& span) {
    sums[i].add(span, [&](const Span& of, double* to) { items[i].run(of, to); });
  });
  for (RowSums& sum : sums) {
    sum.finish();
  }
}

}  // namespace qk::cpu
