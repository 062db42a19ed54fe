#include "multilabel_cross_entropy.h"

#include "tensor.h"

namespace supy {
namespace {

const char* op = "multilabel_cross_entropy";

float* row_values(const TensorView& x, const char* name, int64_t rows) {
  check_dtype(x, op, name, DType::f32);
  SUPY_CHECK(!x.is_cuda() && x.dim() == 1 && x.size(0) == rows && x.is_contiguous(), op,
             name << " must be contiguous, on the CPU, and of shape [" << rows << "]");
  return x.data<float>();
}

int64_t row_stride(const TensorView& x, const char* name, int64_t rows) {
  const bool unit = x.dim() == 2 && (x.numel() == 0 || x.size(1) == 1 || x.stride(1) == 1);
  SUPY_CHECK(!x.is_cuda() && unit && x.size(0) == rows, op,
             name << " has shape " << x.shape() << ", expected " << rows << " rows of unit stride on the CPU");
  return x.stride(0);
}

TargetType target_type(const TensorView& targets) {
  switch (targets.dtype()) {
    case DType::f32: return TargetType::f32;
    case DType::bf16: return TargetType::bf16;
    case DType::u8:
    case DType::boolean: return TargetType::u8;
    case DType::i64: return TargetType::indices;
    default: throw py::type_error(std::string("supy.multilabel_cross_entropy: no kernel for targets of dtype ") +
                                  name_of(targets.dtype()));
  }
}

// scores [rows, classes]; targets [rows, classes], or int64 [rows, positives]
MultilabelParams params_of(const TensorView& scores, const TensorView& targets, int64_t ignore_index,
                           const TensorView& negative, const TensorView& positive) {
  SUPY_CHECK(scores.dim() == 2, op, "scores has shape " << scores.shape() << ", expected [rows, K]");
  if (scores.dtype() != DType::f32) check_dtype(scores, op, "scores", DType::bf16);
  MultilabelParams p{};
  p.rows = scores.size(0);
  p.classes = scores.size(1);
  p.scores = scores.data<void>();
  p.targets = targets.data<void>();
  p.score_type = scores.dtype() == DType::bf16 ? ScoreType::bf16 : ScoreType::f32;
  p.target_type = target_type(targets);
  p.score_row_stride = row_stride(scores, "scores", p.rows);
  p.target_row_stride = row_stride(targets, "targets", p.rows);
  p.positives = targets.size(1);
  SUPY_CHECK(p.target_type == TargetType::indices || p.positives == p.classes, op,
             "targets has shape " << targets.shape() << ", scores has " << scores.shape());
  p.ignore_index = ignore_index;
  p.negative = row_values(negative, "negative", p.rows);
  p.positive = row_values(positive, "positive", p.rows);
  return p;
}

int64_t multilabel_cross_entropy(const TensorView& scores, const TensorView& targets, int64_t ignore_index,
                                 const TensorView& negative, const TensorView& positive) {
  const MultilabelParams p = params_of(scores, targets, ignore_index, negative, positive);
  py::gil_scoped_release without_lock;
  return multilabel_cross_entropy_cpu(p);
}

void multilabel_cross_entropy_backward(const TensorView& scores, const TensorView& targets, int64_t ignore_index,
                                       const TensorView& negative, const TensorView& positive,
                                       const TensorView& grad_negative, const TensorView& grad_positive,
                                       const TensorView& ds) {
  MultilabelParams p = params_of(scores, targets, ignore_index, negative, positive);
  p.grad_negative = row_values(grad_negative, "grad_negative", p.rows);
  p.grad_positive = row_values(grad_positive, "grad_positive", p.rows);
  check_dtype(ds, op, "ds", scores.dtype());
  SUPY_CHECK(ds.same_shape(scores) && ds.is_contiguous() && !ds.is_cuda(), op, "ds must be like scores, contiguous");
  p.ds = ds.data<void>();
  py::gil_scoped_release without_lock;
  multilabel_cross_entropy_backward_cpu(p);
}

}  // namespace

SUPY_BINDINGS(multilabel_cross_entropy, module) {
  module.def("multilabel_cross_entropy", &multilabel_cross_entropy);
  module.def("multilabel_cross_entropy_backward", &multilabel_cross_entropy_backward);
}

}  // namespace supy
