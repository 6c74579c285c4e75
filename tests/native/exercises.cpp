#include "exercises.h"

#include <optional>
#include <stdexcept>

#include "arguments.h"
#include "kernels.h"
#include "list_exercises.h"
#include "packed_exercises.h"

namespace driver {

namespace cpu = qk::cpu;

std::string Setting::name() const {
  return qk::text(groups, " x ", length, ", m = ", levels, ", ", qk::name_of(dtype), hostile ? ", hostile" : "");
}

void same_for_all_threads(const Setting& setting, const std::vector<Tensor>& written, const Call& call) {
  std::vector<Tensor> first;
  for (int threads : {1, 2, 5}) {
    std::vector<Tensor> outputs;
    for (const Tensor& tensor : written) {
      outputs.push_back(tensor.copy());
    }
    call(threads, outputs);
    if (threads == 1) {
      first = outputs;
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!outputs[i].same_bytes(first[i])) {
        throw std::runtime_error(
            qk::text("output ", i, " differs between 1 and ", threads, " threads on ", setting.name()));
      }
    }
  }
}

void refused(const Setting& setting, const std::vector<Tensor>& written, const Call& call) {
  for (int threads : {1, 5}) {
    std::vector<Tensor> outputs;
    for (const Tensor& tensor : written) {
      outputs.push_back(tensor.copy());
    }
    try {
      call(threads, outputs);
    } catch (const std::invalid_argument&) {
      continue;
    }
    throw std::runtime_error(qk::text("wrong arguments were taken on ", setting.name()));
  }
}

namespace {

void assign(const Setting& s) {
  const Arguments a(s);
  same_for_all_threads(s, {like(a.x, Dtype::uint8)},
                       [&](int threads, Outputs& out) { cpu::assign(threads, a.x, a.centers, out[0]); });
}

void dequantize(const Setting& s) {
  const Arguments a(s);
  const Call call = [&](int threads, Outputs& out) { cpu::dequantize(threads, a.codes, a.centers, out[0]); };
  same_for_all_threads(s, {like(a.x, Dtype::float32)}, call);
  if (a.codes.size() > 0 && s.levels < 256) {
    a.codes.view().as<uint8_t>()[a.codes.size() - 1] = 255;
    refused(s, {like(a.x, Dtype::float32)}, call);
  }
}

void dequantize_backward(const Setting& s) {
  const Arguments a(s);
  const Call call = [&](int threads, Outputs& out) {
    cpu::dequantize_backward(threads, a.grad, a.codes, a.centers, out[0]);
  };
  same_for_all_threads(s, {like(a.centers)}, call);
  if (a.codes.size() > 0 && s.levels < 256) {
    a.codes.view().as<uint8_t>()[a.codes.size() / 2] = 255;
    refused(s, {like(a.centers)}, call);
  }
}

void distance(const Setting& s) {
  const Arguments a(s);
  for (const char* norm : {"l1", "l2"}) {
    same_for_all_threads(s, {Tensor(Dtype::float32, {})},
                         [&](int threads, Outputs& out) { cpu::distance(threads, a.x, a.centers, norm, out[0]); });
  }
}

void distance_backward(const Setting& s) {
  Arguments a(s);
  const Tensor slope = uniform({}, 0.5f, 2.0f, a.random);
  for (const char* norm : {"l1", "l2"}) {
    same_for_all_threads(s, {like(a.x), like(a.centers)}, [&](int threads, Outputs& out) {
      cpu::distance_backward(threads, slope, a.x, a.centers, norm, out[0], out[1]);
    });
  }
}

void distillation_loss(const Setting& s) {
  if (s.length == 0) {
    return;  // there is no softmax of no classes
  }
  const Arguments a(s);
  same_for_all_threads(
      s, {Tensor(Dtype::float32, {}), Tensor(Dtype::float32, {s.groups, 5})},
      [&](int threads, Outputs& out) { cpu::distillation_loss(threads, a.x, a.grad, 2.0, out[0], out[1]); });
}

void distillation_loss_backward(const Setting& s) {
  if (s.length == 0) {
    return;
  }
  Arguments a(s);
  const Tensor loss(Dtype::float32, {}), statistics(Dtype::float32, {s.groups, 5});
  cpu::distillation_loss(1, a.x, a.grad, 2.0, loss, statistics);
  const Tensor slope = uniform({}, 0.5f, 2.0f, a.random);
  same_for_all_threads(s, {like(a.x), like(a.x)}, [&](int threads, Outputs& out) {
    cpu::distillation_loss_backward(threads, slope, a.x, a.grad, 2.0, statistics, out[0], out[1]);
  });
}

void hard_quantize(const Setting& s) {
  const Arguments a(s);
  same_for_all_threads(s, {like(a.x)},
                       [&](int threads, Outputs& out) { cpu::hard_quantize(threads, a.x, a.centers, false, out[0]); });
}

void hard_quantize_backward(const Setting& s) {
  const Arguments a(s);
  for (bool straight_through : {false, true}) {
    same_for_all_threads(s, {like(a.x), like(a.centers)}, [&](int threads, Outputs& out) {
      cpu::hard_quantize_backward(threads, a.grad, a.x, a.centers, straight_through, out[0], out[1]);
    });
  }
}

void init_centers(const Setting& s) {
  if (s.length == 0) {
    return;  // there are no centers of nothing
  }
  Arguments a(s);
  const Tensor x = normal(s.dtype, {s.groups, s.length}, 1.0f, false, a.random);
  const Tensor masses = uniform({s.groups, s.length}, 0.0f, 1.0f, a.random);
  const auto run = [&](int levels, const char* method, const std::optional<qk::TensorView>& weights) {
    same_for_all_threads(s, {Tensor(Dtype::float32, {s.groups, levels})}, [&](int threads, Outputs& out) {
      cpu::init_centers(threads, x, levels, s.groups, method, weights, out[0]);
    });
  };
  run(s.levels, "kmeans", std::nullopt);
  run(s.levels, "quantile", std::nullopt);
  run(s.levels, "linspace", std::nullopt);
  run(2, "signed_mean", std::nullopt);
  if (s.dtype == Dtype::float32) {
    run(s.levels, "kmeans", masses.view());
  }
  if (s.hostile && s.length > 100) {
    refused(s, {Tensor(Dtype::float32, {s.groups, s.levels})}, [&](int threads, Outputs& out) {
      cpu::init_centers(threads, a.x, s.levels, s.groups, "kmeans", std::nullopt, out[0]);
    });
  }
}

void lut_linear(const Setting& s) {
  if (s.groups * s.length > 20000) {
    return;  // every batch reads all of it
  }
  Arguments a(s);
  const int bits = bits_of(s);
  const Tensor packed(Dtype::uint8, {cpu::packed_bytes(a.codes.view().numel(), bits)});
  cpu::pack_codes(1, a.codes, bits, packed);
  const Tensor bias = uniform({s.groups}, -1.0f, 1.0f, a.random), table = uniform({s.levels}, -1.0f, 1.0f, a.random);
  for (int64_t batch : {0, 1, 5, 18}) {
    const Tensor x = normal(s.dtype, {batch, s.length}, 1.0f, s.hostile, a.random);
    for (const Tensor* centers : std::initializer_list<const Tensor*>{&a.centers, &table}) {
      same_for_all_threads(s, {Tensor(s.dtype, {batch, s.groups})}, [&](int threads, Outputs& out) {
        cpu::lut_linear(threads, x, packed, *centers, bias.view(), bits, {s.groups, s.length}, out[0]);
      });
    }
  }
}

void pack_codes(const Setting& s) {
  const Arguments a(s);
  const int bits = bits_of(s);
  const Tensor packed(Dtype::uint8, {cpu::packed_bytes(a.codes.view().numel(), bits)});
  const Call call = [&](int threads, Outputs& out) { cpu::pack_codes(threads, a.codes, bits, out[0]); };
  same_for_all_threads(s, {packed}, call);
  if (a.codes.size() > 0 && bits < 8) {
    a.codes.view().as<uint8_t>()[0] = 255;
    refused(s, {packed}, call);
  }
}

void prox_centers(const Setting& s) {
  Arguments a(s);
  const Tensor moved = normal(Dtype::float32, a.centers.view().sizes, 1.0f, false, a.random);
  const auto run = [&](const char* norm, const char* method, const std::optional<qk::TensorView>& at) {
    same_for_all_threads(s, {like(a.centers)}, [&](int threads, Outputs& out) {
      cpu::prox_centers(threads, at ? moved : a.centers, a.x, a.strength, norm, method, at, out[0]);
    });
  };
  run("l1", "exact", std::nullopt);
  run("l1", "exact", a.centers.view());
  run("l2", "exact", a.centers.view());
  run("l1", "counted", std::nullopt);
  run("l1", "authors", a.centers.view());
}

void prox_weights(const Setting& s) {
  const Arguments a(s);
  for (const char* norm : {"l1", "l2"}) {
    same_for_all_threads(s, {like(a.x)}, [&](int threads, Outputs& out) {
      cpu::prox_weights(threads, a.x, a.centers, a.strength, norm, out[0]);
    });
  }
}

void soft_quantize(const Setting& s) {
  const Arguments a(s);
  same_for_all_threads(s, {like(a.x)}, [&](int threads, Outputs& out) {
    cpu::soft_quantize(threads, a.x, a.centers, a.sharpness, out[0]);
  });
}

void soft_quantize_backward(const Setting& s) {
  const Arguments a(s);
  same_for_all_threads(s, {like(a.x), like(a.centers)}, [&](int threads, Outputs& out) {
    cpu::soft_quantize_backward(threads, a.grad, a.x, a.centers, a.sharpness, out[0], out[1]);
  });
}

void unpack_codes(const Setting& s) {
  const Arguments a(s);
  const int bits = bits_of(s);
  const Tensor packed(Dtype::uint8, {cpu::packed_bytes(a.codes.view().numel(), bits)});
  cpu::pack_codes(1, a.codes, bits, packed);
  same_for_all_threads(s, {like(a.codes)}, [&](int threads, Outputs& out) {
    cpu::unpack_codes(threads, packed, bits, a.codes.view().sizes, out[0]);
    if (!out[0].same_bytes(a.codes)) {
      throw std::runtime_error(qk::text("unpacking does not invert packing on ", s.name()));
    }
  });
}

}  // namespace

#define EXERCISE(kernel) {#kernel, kernel}
#define EXERCISE_OF_LISTS(kernel) {#kernel, of_lists::kernel}
#define EXERCISE_OF_PACKED(kernel) {#kernel, of_packed::kernel}

const std::vector<Exercise>& exercises() {
  static const std::vector<Exercise> all = {
      EXERCISE(assign),
      EXERCISE_OF_LISTS(center_step),
      EXERCISE(dequantize),
      EXERCISE(dequantize_backward),
      EXERCISE_OF_PACKED(dequantize_packed),
      EXERCISE_OF_PACKED(dequantize_packed_backward),
      EXERCISE(distance),
      EXERCISE(distance_backward),
      EXERCISE(distillation_loss),
      EXERCISE(distillation_loss_backward),
      EXERCISE_OF_LISTS(foreach_soft_quantize),
      EXERCISE_OF_LISTS(foreach_soft_quantize_backward),
      EXERCISE(hard_quantize),
      EXERCISE(hard_quantize_backward),
      EXERCISE(init_centers),
      EXERCISE(lut_linear),
      EXERCISE(pack_codes),
      EXERCISE_OF_PACKED(packed_embedding),
      EXERCISE_OF_PACKED(packed_embedding_backward),
      EXERCISE(prox_centers),
      EXERCISE(prox_weights),
      EXERCISE_OF_LISTS(quped_step),
      EXERCISE(soft_quantize),
      EXERCISE(soft_quantize_backward),
      EXERCISE(unpack_codes),
  };
  return all;
}

}  // namespace driver
