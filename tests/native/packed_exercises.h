#pragma once

#include "exercises.h"

namespace driver::of_packed {

void dequantize_packed(const Setting& setting);
void dequantize_packed_backward(const Setting& setting);
void packed_embedding(const Setting& setting);
void packed_embedding_backward(const Setting& setting);

}  // namespace driver::of_packed
