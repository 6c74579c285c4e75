// Kernels of lists of tensors.

#include "list_exercises.h"

#include "arguments.h"
#include "kernels.h"

namespace driver::of_lists {

namespace cpu = qk::cpu;

namespace {

// A list of three: the setting's own, an empty one and one of another shape and type.
struct Lists {
  std::vector<Arguments> arguments;
  std::vector<qk::TensorView> x, grad, centers, sharpness;

  explicit Lists(const Setting& s) {
    arguments.emplace_back(s);
    arguments.emplace_back(Setting{1, 0, 2, Dtype::float32, false, s.seed + 1});
    arguments.emplace_back(Setting{2, 77, 5, Dtype::bfloat16, s.hostile, s.seed + 2});
    for (const Arguments& a : arguments) {
      x.push_back(a.x);
      grad.push_back(a.grad);
      centers.push_back(a.centers);
      sharpness.push_back(a.sharpness);
    }
  }
};

}  // namespace

void foreach_soft_quantize(const Setting& s) {
  const Lists l(s);
  Outputs written;
  for (const Arguments& a : l.arguments) {
    written.push_back(like(a.x));
  }
  same_for_all_threads(s, written, [&](int threads, Outputs& out) {
    cpu::foreach_soft_quantize(threads, l.x, l.centers, l.sharpness, views(out, 0, 3));
  });
}

void foreach_soft_quantize_backward(const Setting& s) {
  const Lists l(s);
  Outputs written;
  for (const Arguments& a : l.arguments) {
    written.push_back(like(a.x));
  }
  for (const Arguments& a : l.arguments) {
    written.push_back(like(a.centers));
  }
  same_for_all_threads(s, written, [&](int threads, Outputs& out) {
    cpu::foreach_soft_quantize_backward(threads, l.grad, l.x, l.centers, l.sharpness, views(out, 0, 3),
                                        views(out, 3, 3));
  });
}

namespace {

// quped_step on a list of two: the setting's own tensor and a small one. Rows of `out`: x, first, second, center_grad,
// counts, sums, distance, codes.
struct Steps {
  std::vector<Arguments> arguments;
  std::vector<qk::TensorView> grad, through, centers, sharpness, strength;
  Outputs written;
  int bits;

  Steps(const Setting& s, bool packed) {
    Setting wide = s;
    wide.dtype = Dtype::float32;
    arguments.emplace_back(wide);
    arguments.emplace_back(Setting{2, 77, 5, Dtype::float32, s.hostile, s.seed + 1});
    bits = packed ? std::max(bits_of(s), 3) : 0;
    for (const Arguments& a : arguments) {
      grad.push_back(a.grad);
      through.push_back(a.grad);
      centers.push_back(a.centers);
      sharpness.push_back(a.sharpness);
      strength.push_back(a.strength);
    }
    each([](Arguments& a) { return a.x; });
    each([](Arguments& a) { return normal(Dtype::float32, a.x.view().sizes, 0.1f, false, a.random); });
    each([](Arguments& a) { return uniform(a.x.view().sizes, 0.0f, 0.1f, a.random); });
    each([](Arguments& a) { return like(a.centers); });
    each([](Arguments& a) {
      const Sizes& sizes = a.centers.view().sizes;
      return Tensor(Dtype::int64, {sizes[0], 3, sizes[1]});
    });
    each([](Arguments& a) { return like(a.centers); });
    written.emplace_back(Dtype::float32, Sizes{2});
    each([&](Arguments& a) {
      const Sizes flat = {cpu::packed_bytes(a.x.view().numel(), bits)};
      return Tensor(Dtype::uint8, packed ? flat : a.x.view().sizes);
    });
  }

  template <class Make>
  void each(Make&& make) {
    for (Arguments& a : arguments) {
      written.push_back(make(a));
    }
  }

  void run(int threads, Outputs& out, const std::string& chain, const std::string& optimizer, const std::string& norm,
           bool clamp) const {
    const std::vector<qk::TensorView> none;
    const bool adaptive = optimizer != "sgd";
    cpu::quped_step(threads, views(out, 0, 2), grad, chain == "none" ? none : through, views(out, 2, 2),
                    adaptive ? views(out, 4, 2) : none, centers, chain == "soft" ? sharpness : none, strength, chain,
                    optimizer, norm, 0.05, 0.01, 0.9, adaptive ? 0.999 : 0.0, 1e-8, !adaptive, 3, clamp, true, bits,
                    chain == "none" ? none : views(out, 6, 2), views(out, 8, 2),
                    norm == "l2" ? views(out, 10, 2) : none, out[12], views(out, 13, 2));
  }
};

}  // namespace

void quped_step(const Setting& s) {
  const struct {
    const char *chain, *optimizer, *norm;
    bool packed, clamp;
  } ways[] = {{"none", "sgd", "l1", false, false},
              {"soft", "sgd", "l1", true, false},
              {"hard", "adam", "l2", true, false},
              {"straight_through", "adamw", "l2", false, true}};
  for (const auto& way : ways) {
    const Steps steps(s, way.packed);
    same_for_all_threads(s, steps.written, [&](int threads, Outputs& out) {
      steps.run(threads, out, way.chain, way.optimizer, way.norm, way.clamp);
    });
  }
}

void center_step(const Setting& s) {
  const Steps steps(s, false);
  Outputs out;
  for (const Tensor& tensor : steps.written) {
    out.push_back(tensor.copy());
  }
  steps.run(1, out, "hard", "sgd", "l2", false);
  const std::vector<qk::TensorView> gradients = views(out, 6, 2), counts = views(out, 8, 2), sums = views(out, 10, 2);
  Tensor rate(Dtype::float32, {2});
  rate.set(0, 0.1f);
  rate.set(1, 0.0f);
  for (const char* norm : {"l1", "l2"}) {
    for (const char* method : {"counted", "authors", "none"}) {
      same_for_all_threads(s, {steps.arguments[0].centers, steps.arguments[1].centers},
                           [&](int threads, Outputs& centers) {
                             cpu::center_step(threads, views(centers, 0, 2), gradients, counts, sums, steps.strength,
                                              rate, norm, method, 10.0);
                           });
    }
  }
}

}  // namespace driver::of_lists
