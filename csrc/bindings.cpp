// The CPU kernels as a Python module; one line per kernel with the dtypes it takes (module.h).

#include "cpu/instruction_sets.h"
#include "cpu/lut_regimes.h"
#include "kernels.h"
#include "module.h"

PYBIND11_MODULE(QK_MODULE, module, py::mod_gil_not_used()) {
  namespace cpu = qk::cpu;
  const Dtypes any = {qk::Dtype::float32, qk::Dtype::bfloat16, qk::Dtype::float16};
  const Dtypes f32 = {qk::Dtype::float32};
  const Dtypes u8 = {qk::Dtype::uint8};
  const Dtypes i64 = {qk::Dtype::int64};

  module.doc() = "qupedkern's CPU kernels for one instruction set; called by qupedkern.backends.cpp.";
  module.attr("KERNELS") = py::dict();
  module.def("supported_instruction_sets", &cpu::supported_instruction_sets,
             "Those this processor and system run, widest last.");

  module.def("read_tensors", &read_tensors,
             "Let kernels take tensors of this type as they are; False where they cannot.");
  module.def("set_batch_invariant", &cpu::set_batch_invariant,
             "Pin lut_linear to the one regime that sums alike for every batch.");

  kernel(module, "assign", &cpu::assign, {{"x", any}, {"centers", f32}, {"codes", u8}});
  kernel(module, "center_step", &cpu::center_step,
         {{"centers", f32}, {"center_grad", f32}, {"counts", i64}, {"sums", f32}, {"strength", f32}, {"rate", f32}});
  kernel(module, "dequantize", &cpu::dequantize, {{"codes", u8}, {"centers", f32}, {"out", f32}});
  kernel(module, "dequantize_backward", &cpu::dequantize_backward,
         {{"grad", any}, {"codes", u8}, {"centers", f32}, {"grad_centers", f32}});
  kernel(module, "dequantize_packed", &cpu::dequantize_packed, {{"packed", u8}, {"centers", any}, {"out", any}});
  kernel(module, "dequantize_packed_backward", &cpu::dequantize_packed_backward,
         {{"grad", any}, {"packed", u8}, {"centers", f32}, {"grad_centers", f32}});
  kernel(module, "distillation_loss", &cpu::distillation_loss,
         {{"student_logits", any}, {"teacher_logits", any}, {"loss", f32}, {"statistics", f32}});
  kernel(module, "distillation_loss_backward", &cpu::distillation_loss_backward,
         {{"grad", f32},
          {"student_logits", any},
          {"teacher_logits", any},
          {"statistics", f32},
          {"grad_student", any},
          {"grad_teacher", any}});
  kernel(module, "distance", &cpu::distance, {{"x", any}, {"centers", f32}, {"out", f32}});
  kernel(module, "distance_backward", &cpu::distance_backward,
         {{"grad", f32}, {"x", any}, {"centers", f32}, {"grad_x", any}, {"grad_centers", f32}});
  kernel(module, "foreach_soft_quantize", &cpu::foreach_soft_quantize,
         {{"x", any}, {"centers", f32}, {"sharpness", f32}, {"out", any}});
  kernel(module, "foreach_soft_quantize_backward", &cpu::foreach_soft_quantize_backward,
         {{"grad", any}, {"x", any}, {"centers", f32}, {"sharpness", f32}, {"grad_x", any}, {"grad_centers", f32}});
  kernel(module, "hard_quantize", &cpu::hard_quantize, {{"x", any}, {"centers", f32}, {"out", any}});
  kernel(module, "hard_quantize_backward", &cpu::hard_quantize_backward,
         {{"grad", any}, {"x", any}, {"centers", f32}, {"grad_x", any}, {"grad_centers", f32}});
  kernel(module, "init_centers", &cpu::init_centers, {{"x", any}, {"weights", any}, {"centers", f32}});
  kernel(module, "lut_linear", &cpu::lut_linear,
         {{"x", any}, {"packed", u8}, {"centers", any}, {"bias", any}, {"out", any}});
  kernel(module, "pack_codes", &cpu::pack_codes, {{"codes", u8}, {"packed", u8}});
  kernel(module, "packed_embedding", &cpu::packed_embedding,
         {{"indices", i64}, {"packed", u8}, {"centers", any}, {"out", any}});
  kernel(module, "packed_embedding_backward", &cpu::packed_embedding_backward,
         {{"grad", any}, {"indices", i64}, {"packed", u8}, {"centers", f32}, {"grad_centers", f32}});
  kernel(module, "prox_centers", &cpu::prox_centers,
         {{"centers", f32}, {"x", any}, {"strength", f32}, {"at", f32}, {"out", f32}});
  kernel(module, "prox_weights", &cpu::prox_weights, {{"x", any}, {"centers", f32}, {"strength", f32}, {"out", any}});
  kernel(module, "quped_step", &cpu::quped_step,
         {{"x", f32},
          {"grad", f32},
          {"quantized_grad", f32},
          {"first", f32},
          {"second", f32},
          {"centers", f32},
          {"sharpness", f32},
          {"strength", f32},
          {"center_grad", f32},
          {"counts", i64},
          {"sums", f32},
          {"distance", f32},
          {"codes", u8}});
  kernel(module, "soft_quantize", &cpu::soft_quantize,
         {{"x", any}, {"centers", f32}, {"sharpness", f32}, {"out", any}});
  kernel(module, "soft_quantize_backward", &cpu::soft_quantize_backward,
         {{"grad", any}, {"x", any}, {"centers", f32}, {"sharpness", f32}, {"grad_x", any}, {"grad_centers", f32}});
  kernel(module, "unpack_codes", &cpu::unpack_codes, {{"packed", u8}, {"codes", u8}});
}
