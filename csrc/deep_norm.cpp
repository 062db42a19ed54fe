#include "deep_norm.h"

#include <cmath>

#include "launch.h"

namespace supy {
namespace {

using OptionalTensor = std::optional<TensorView>;
constexpr const char* OP = "deep_norm";

NormType type_of(const TensorView& x) {
  switch (x.dtype()) {
    case DType::f32: return NormType::f32;
    case DType::bf16: return NormType::bf16;
    case DType::f16: return NormType::f16;
    default: throw py::type_error(std::string("supy.deep_norm: no kernel for dtype ") + name_of(x.dtype()));
  }
}

void* check_like(const OptionalTensor& tensor, const char* name, const TensorView& x) {
  if (!tensor) return nullptr;
  SUPY_CHECK(tensor->same_shape(x) && tensor->is_contiguous(), OP, name << " must be contiguous and of the shape of x");
  check_dtype(*tensor, OP, name, x.dtype());
  check_same_device(*tensor, OP, name, x);
  return tensor->data<void>();
}

NormVector read_vector(const OptionalTensor& tensor, const char* name, const TensorView& x) {
  if (!tensor) return {nullptr, NormType::f32};
  const bool fits = tensor->dim() == 1 && tensor->size(0) == x.size(x.dim() - 1) && tensor->is_contiguous();
  SUPY_CHECK(fits, OP, name << " has shape " << tensor->shape() << ", expected a contiguous one [D] (from x)");
  check_same_device(*tensor, OP, name, x);
  if (tensor->dtype() != DType::f32) check_dtype(*tensor, OP, name, x.dtype());
  return {tensor->data<void>(), type_of(*tensor)};
}

// A number, or a float32 or int64 tensor in GPU memory with one.
template <class T>
struct Number {
  T value = 0;
  const T* pointer = nullptr;

  Number(const py::object& object, DType dtype, const char* name, const TensorView& x) {
    if (!PyObject_TypeCheck(object.ptr(), Torch::get().tensor_type)) {
      py::detail::make_caster<T> number;
      if (!number.load(object, true))
        throw py::type_error(std::string("supy.deep_norm: ") + name + " is not a number that the kernel takes");
      value = py::detail::cast_op<T>(number);
      return;
    }
    const TensorView tensor(object.ptr());
    check_dtype(tensor, OP, name, dtype);
    SUPY_CHECK(tensor.numel() == 1 && tensor.is_cuda(), OP, name << " must be a number, or one in GPU memory");
    check_same_device(tensor, OP, name, x);
    pointer = tensor.data<T>();
  }
};

// `x` is what tells the shape and the device; the caller says what else is read of it.
DeepNormParams read(const TensorView& x, const py::object& alpha,
                    const OptionalTensor& weight, const OptionalTensor& bias, const py::object& seed, int64_t offset,
                    double dropout, double eps, bool rms) {
  SUPY_CHECK(x.dim() > 0 && x.is_contiguous(), OP, "x must be contiguous, with an axis");
  SUPY_CHECK(eps >= 0, OP, "eps is " << eps << ", expected at least 0");
  SUPY_CHECK(dropout >= 0 && dropout < 1, OP, "dropout is " << dropout << ", expected 0 to less than 1");
  SUPY_CHECK(offset >= 0, OP, "offset is " << offset << ", expected at least 0");
  DeepNormParams p{};
  p.type = type_of(x);
  p.weight = read_vector(weight, "weight", x);
  p.bias = read_vector(bias, "bias", x);
  p.width = x.size(x.dim() - 1);
  p.rows = p.width == 0 ? 0 : x.numel() / p.width;
  const Number<float> scale(alpha, DType::f32, "alpha", x);
  p.alpha = scale.value;
  p.device_alpha = scale.pointer;
  p.eps = static_cast<float>(eps);
  p.rms = rms;
  p.dropout = dropout > 0;
  if (p.dropout) {
    SUPY_CHECK(!seed.is_none(), OP, "dropout needs a seed");
    const Number<int64_t> stream(seed, DType::i64, "seed", x);
    p.seed = stream.value;
    p.device_seed = stream.pointer;
    p.first = offset;
    p.threshold = static_cast<uint32_t>(dropout * 4294967296.0);
    p.scale = static_cast<float>(1 / (1 - dropout));
  }
  return p;
}

float* check_rows(const OptionalTensor& of_rows, const char* name, const TensorView& x, int64_t rows) {
  if (!of_rows) return nullptr;
  check_dtype(*of_rows, OP, name, DType::f32);
  const bool fits = of_rows->is_contiguous() && of_rows->numel() == rows && !of_rows->is_cuda() && !x.is_cuda();
  SUPY_CHECK(fits, OP, name << " has shape " << of_rows->shape() << ", expected " << rows << " numbers in CPU memory");
  return of_rows->data<float>();
}

// With rstd alone: fills it where that and `out` will be enough for the gradients, and says whether it did. With mean as
// well: fills both, which save the gradients, from x and branch, half of their sums.
bool norm(const TensorView& x, const TensorView& branch, const py::object& alpha, const OptionalTensor& weight,
          const OptionalTensor& bias, const py::object& seed, int64_t offset, double dropout, double eps, bool rms,
          const TensorView& out, const OptionalTensor& rstd, const OptionalTensor& mean) {
  DeepNormParams p = read(x, alpha, weight, bias, seed, offset, dropout, eps, rms);
  p.x = x.data<void>();
  p.branch = check_like(branch, "branch", x);
  p.out = check_like(out, "out", x);
  p.rstd = check_rows(rstd, "rstd", x, p.rows);
  p.mean = check_rows(mean, "mean", x, p.rows);
  const bool enough = p.rstd != nullptr && p.mean == nullptr && deep_norm_invertible(p);
  if (!enough && p.mean == nullptr) p.rstd = nullptr;
  if (p.rows > 0) SUPY_LAUNCH(deep_norm, p, x);
  return enough;
}

NormType check_gradient(const OptionalTensor& gradient, const char* name, const TensorView& x, const NormVector& of) {
  if (!gradient) return NormType::f32;
  const NormType type = read_vector(gradient, name, x).type;
  SUPY_CHECK(of.data == nullptr || of.type == type, OP, name << " must have the dtype of what it is the gradient of");
  return type;
}

// x and branch, perhaps rstd and mean, or out and rstd; `partial` is room for sums in GPU memory.
void norm_backward(const TensorView& grad, const OptionalTensor& x, const OptionalTensor& branch,
                   const py::object& alpha, const OptionalTensor& weight, const OptionalTensor& bias,
                   const py::object& seed, int64_t offset, double dropout, double eps, bool rms,
                   const OptionalTensor& dx, const OptionalTensor& dbranch, const OptionalTensor& dweight,
                   const OptionalTensor& dbias, const OptionalTensor& out, const OptionalTensor& rstd,
                   const OptionalTensor& mean, const OptionalTensor& partial) {
  DeepNormBackwardParams b{};
  b.norm = read(grad, alpha, weight, bias, seed, offset, dropout, eps, rms);
  b.grad = grad.data<void>();
  b.norm.x = check_like(x, "x", grad);
  b.norm.branch = check_like(branch, "branch", grad);
  b.norm.out = check_like(out, "out", grad);
  b.norm.rstd = check_rows(rstd, "rstd", grad, b.norm.rows);
  b.norm.mean = check_rows(mean, "mean", grad, b.norm.rows);
  SUPY_CHECK(b.norm.mean == nullptr || b.norm.rstd != nullptr, OP, "expected rstd beside mean");
  b.from_out = b.norm.out != nullptr && b.norm.rstd != nullptr && b.norm.type == NormType::f32;
  SUPY_CHECK(b.from_out || (x && branch), OP, "expected x and branch, or out and rstd in float32");
  b.dx = check_like(dx, "dx", grad);
  b.dbranch = check_like(dbranch, "dbranch", grad);
  b.weight_type = check_gradient(dweight, "dweight", grad, b.norm.weight);
  b.bias_type = check_gradient(dbias, "dbias", grad, b.norm.bias);
  b.dweight = dweight ? dweight->data<void>() : nullptr;
  b.dbias = dbias ? dbias->data<void>() : nullptr;
  if (grad.is_cuda() && (dweight || dbias)) {
    SUPY_CHECK(partial && partial->numel() == 2 * deep_norm_partials(b.norm.rows) * b.norm.width, OP,
               "partial must have 2 * deep_norm_partials(rows) * D numbers");
    check_dtype(*partial, OP, "partial", DType::f32);
    check_same_device(*partial, OP, "partial", grad);
    SUPY_CHECK(partial->is_contiguous(), OP, "partial must be contiguous");
    b.partial = partial->data<float>();
  }
  if (b.norm.rows > 0) SUPY_LAUNCH(deep_norm_backward, b, grad);
}

}  // namespace

SUPY_BINDINGS(deep_norm, module) {
  module.def("deep_norm", &norm);
  module.def("deep_norm_backward", &norm_backward);
  module.def("deep_norm_partials", &deep_norm_partials);
}

}  // namespace supy
