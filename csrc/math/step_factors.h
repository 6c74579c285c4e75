// The constants of a step of SGD, Adam or AdamW: computed in double and rounded once, as Python does it for torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "../check.h"
#include "adam.h"
#include "sgd.h"

namespace qk::math {

struct StepFactors {
  bool adaptive, nesterov, first_step, momentum;
  bool from_end = false;  // of adam
  Decay decay = Decay::kNone;
  Sgd<float> sgd{};
  Adam<float> adam{};

  // As the schema of quped_step has them.
  StepFactors(const char* op, const std::string& name, double lr, double weight_decay, double beta1, double beta2,
              double eps, bool nesterov_, int64_t step)
      : adaptive(name != "sgd"), nesterov(nesterov_), first_step(step == 1), momentum(beta1 != 0.0) {
    QK_CHECK(name == "sgd" || name == "adam" || name == "adamw",
             text(op, ": optimizer must be 'sgd' or 'adam' or 'adamw'"), "'" + name + "'");
    QK_CHECK(step >= 1, text(op, ": step must be at least 1"), std::to_string(step));
    if (weight_decay != 0.0) {
      decay = name == "adamw" ? Decay::kDecoupled : Decay::kCoupled;
    }
    from_end = static_cast<float>(1.0 - beta1) >= 0.5f;
    if (adaptive) {
      const auto count = static_cast<double>(step);
      const double share = name == "adamw" ? 1.0 - lr * weight_decay : weight_decay;
      adam = {static_cast<float>(share),
              static_cast<float>(1.0 - beta1) - (from_end ? 1.0f : 0.0f),
              static_cast<float>(beta2),
              static_cast<float>(1.0 - beta2),
              static_cast<float>(std::pow(1.0 - std::pow(beta2, count), 0.5)),
              static_cast<float>(eps),
              static_cast<float>(-lr / (1.0 - std::pow(beta1, count)))};
    } else {
      sgd = {static_cast<float>(-lr), static_cast<float>(weight_decay), static_cast<float>(beta1),
             static_cast<float>(1.0 - beta2)};
    }
  }

  bool has_first() const { return adaptive || momentum; }
  bool has_second() const { return adaptive; }
};

}  // namespace qk::math
