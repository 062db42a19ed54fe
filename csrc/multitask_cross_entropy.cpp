#include "multitask_cross_entropy.h"

#include "tensor.h"

namespace supy {
namespace {

const char* op = "multitask_cross_entropy";

float* class_values(const TensorView& x, const char* name, const TensorView& scores) {
  check_dtype(x, op, name, DType::f32);
  SUPY_CHECK(!x.is_cuda() && x.dim() == 2 && x.size(0) == scores.size(0) && x.size(1) == scores.size(2) &&
                 x.is_contiguous(), op, name << " has shape " << x.shape() << ", scores has " << scores.shape());
  return x.data<float>();
}

MultitaskParams params_of(const TensorView& scores, const TensorView& targets, const TensorView& losses, bool hard) {
  SUPY_CHECK(!scores.is_cuda() && scores.dim() == 3 && scores.numel() > 0, op,
             "scores has shape " << scores.shape() << ", expected [B, n, m] on the CPU, not empty");
  SUPY_CHECK(!targets.is_cuda() && targets.same_shape(scores), op,
             "targets has shape " << targets.shape() << ", scores has " << scores.shape());
  if (scores.dtype() != DType::f32) check_dtype(scores, op, "scores", DType::bf16);
  MultitaskParams p{};
  p.scores = scores.data<void>();
  p.targets = targets.data<void>();
  p.score_type = scores.dtype() == DType::bf16 ? TaskScoreType::bf16 : TaskScoreType::f32;
  switch (targets.dtype()) {
    case DType::f32: p.target_type = TaskTargetType::f32; break;
    case DType::bf16: p.target_type = TaskTargetType::bf16; break;
    case DType::u8:
    case DType::boolean: p.target_type = TaskTargetType::u8; break;
    default: throw py::type_error(std::string("supy.multitask_cross_entropy: no kernel for targets of dtype ") +
                                  name_of(targets.dtype()));
  }
  p.batch = scores.size(0);
  p.tasks = scores.size(1);
  p.classes = scores.size(2);
  for (int i = 0; i < 3; ++i) {
    p.score_stride[i] = scores.stride(i);
    p.target_stride[i] = targets.stride(i);
  }
  p.hard = hard;
  p.losses = class_values(losses, "losses", scores);
  return p;
}

bool multitask_cross_entropy(const TensorView& scores, const TensorView& targets, const TensorView& losses, bool hard) {
  const MultitaskParams p = params_of(scores, targets, losses, hard);
  py::gil_scoped_release without_lock;
  return multitask_cross_entropy_cpu(p);
}

void multitask_cross_entropy_backward(const TensorView& scores, const TensorView& targets, const TensorView& losses,
                                      const TensorView& grad, const TensorView& ds, bool hard) {
  MultitaskParams p = params_of(scores, targets, losses, hard);
  p.grad = class_values(grad, "grad", scores);
  check_dtype(ds, op, "ds", scores.dtype());
  SUPY_CHECK(ds.same_shape(scores) && ds.is_contiguous() && !ds.is_cuda(), op, "ds must be like scores, contiguous");
  p.ds = ds.data<void>();
  py::gil_scoped_release without_lock;
  multitask_cross_entropy_backward_cpu(p);
}

}  // namespace

SUPY_BINDINGS(multitask_cross_entropy, module) {
  module.def("multitask_cross_entropy", &multitask_cross_entropy);
  module.def("multitask_cross_entropy_backward", &multitask_cross_entropy_backward);
}

}  // namespace supy
