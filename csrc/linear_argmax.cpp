#include "linear_argmax.h"

#include "arguments.h"

namespace supy {
namespace {

const char* op = "linear_argmax";

using Maybe = std::optional<TensorView>;

// The step from row to row of a matrix whose rows are in one piece.
int64_t row_step(const TensorView& x, const char* name, const TensorView& first, int64_t rows, int64_t size) {
  check_dtype(x, op, name, first.dtype());
  check_shape(x, op, name, {rows, size});
  SUPY_CHECK(size < 2 || x.stride(1) == 1, op, name << " must have contiguous rows");
  return x.stride(0);
}

void linear_argmax(const TensorView& x, const TensorView& weight, const Maybe& bias, const Maybe& exclude,
                   const Maybe& floor, const TensorView& values, const TensorView& classes) {
  SUPY_CHECK(x.dim() == 2 && weight.dim() == 2, op, "x has shape " << x.shape() << ", weight " << weight.shape());
  LinearArgmaxParams p{};
  p.type = float_type(x, op);
  p.rows = x.size(0), p.classes = weight.size(0), p.size = x.size(1);
  p.x_step = row_step(x, "x", x, p.rows, p.size), p.weight_step = row_step(weight, "weight", x, p.classes, p.size);
  p.x = x.data<void>(), p.weight = weight.data<void>();
  if (bias) p.bias = dense<float>(*bias, op, "bias", DType::f32, {p.classes});
  if (exclude) p.exclude = dense<int64_t>(*exclude, op, "exclude", DType::i64, {p.rows});
  if (floor) p.floor = dense<float>(*floor, op, "floor", DType::f32, {p.rows});
  p.values = dense<float>(values, op, "values", DType::f32, {p.rows});
  p.best = dense<int64_t>(classes, op, "classes", DType::i64, {p.rows});
  py::gil_scoped_release without_lock;
  linear_argmax_cpu(p);
}

}  // namespace

SUPY_BINDINGS(linear_argmax, module) { module.def("linear_argmax", &linear_argmax); }

}  // namespace supy
