#include "counted.h"

#include <algorithm>

#include "check.h"
#include "kernels.h"
#include "tensor.h"

namespace driver {
namespace {

namespace cpu = qk::cpu;

// One row of float32 weights around m centers; what a training step meets.
struct Row {
  Random random{7};
  Tensor x = normal(Dtype::float32, {kCountedElements}, 1.0f, false, random);
  Tensor grad = normal(Dtype::float32, {kCountedElements}, 1.0f, false, random);
  Tensor sharpness = uniform({1}, 10.0f, 10.0f, random);
  Tensor strength = uniform({1}, 0.01f, 0.01f, random);
  Tensor centers;

  explicit Row(int levels) : centers(normal(Dtype::float32, {levels}, 1.0f, false, random)) {
    std::sort(centers.view().as<float>(), centers.view().as<float>() + levels);
  }
};

void soft_quantize_backward_4(int repeats) {
  const Row row(4);
  const Tensor grad_x(Dtype::float32, {kCountedElements}), grad_centers(Dtype::float32, {4});
  for (int i = 0; i < repeats; ++i) {
    cpu::soft_quantize_backward(1, row.grad, row.x, row.centers, row.sharpness, grad_x, grad_centers);
  }
}

// SGD with momentum, nothing chained, no codes.
void quped_step_4(int repeats) {
  const Row row(4);
  const Tensor momentum(Dtype::float32, {kCountedElements}), counts(Dtype::int64, {3, 4}),
      distance(Dtype::float32, {1});
  std::fill_n(momentum.view().as<float>(), kCountedElements, 0.0f);
  const std::vector<qk::TensorView> none;
  for (int i = 0; i < repeats; ++i) {
    cpu::quped_step(1, {row.x}, {row.grad}, none, {momentum}, none, {row.centers}, none, {row.strength}, "none", "sgd",
                    "l1", 1e-3, 0.0, 0.9, 0.0, 1e-8, false, 2, false, false, 0, none, {counts}, none, distance, none);
  }
}

void assign_16(int repeats) {
  const Row row(16);
  const Tensor codes(Dtype::uint8, {kCountedElements});
  for (int i = 0; i < repeats; ++i) {
    cpu::assign(1, row.x, row.centers, codes);
  }
}

}  // namespace

const std::vector<CountedCase>& counted_cases() {
  static const std::vector<CountedCase> all = {{"soft_quantize_backward-m4", soft_quantize_backward_4},
                                               {"quped_step-sgd-m4", quped_step_4},
                                               {"assign-m16", assign_16}};
  return all;
}

void run_counted(const std::string& name, int repeats) {
  for (const CountedCase& counted : counted_cases()) {
    if (name == counted.name) {
      counted.run(repeats);
      return;
    }
  }
  qk::fail("count: the case must be one that `driver cases` lists", name);
}

}  // namespace driver
