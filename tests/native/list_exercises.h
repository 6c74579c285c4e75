#pragma once

#include "exercises.h"

namespace driver::of_lists {

void center_step(const Setting& setting);
void foreach_soft_quantize(const Setting& setting);
void foreach_soft_quantize_backward(const Setting& setting);
void quped_step(const Setting& setting);

}  // namespace driver::of_lists
