#include "rotary.h"

#include "launch.h"

namespace supy {
namespace {

RotaryType type_of(const TensorView& x) {
  switch (x.dtype()) {
    case DType::f32: return RotaryType::f32;
    case DType::bf16: return RotaryType::bf16;
    case DType::f16: return RotaryType::f16;
    default: throw py::type_error(std::string("supy.rotary: no kernel for dtype ") + name_of(x.dtype()));
  }
}

// Stride of axis i of 4 of a tensor with at most 4 axes: axes align at the right, as in broadcasting.
int64_t stride_of(const TensorView& tensor, int i) {
  const int64_t axis = i - (4 - tensor.dim());
  return axis < 0 || (tensor.size(axis) == 1 && i < 3) ? 0 : tensor.stride(axis);
}

void check_table(const TensorView& table, const char* name, const TensorView& x) {
  check_dtype(table, "rotary", name, DType::f32);
  check_same_device(table, "rotary", name, x);
  const int64_t lead = x.dim() - table.dim();
  bool fits = table.dim() >= 1 && lead >= 0 && 2 * table.size(table.dim() - 1) == x.size(x.dim() - 1);
  for (int64_t i = 0; i < table.dim() - 1 && fits; ++i)
    fits = table.size(i) == x.size(lead + i) || table.size(i) == 1;
  SUPY_CHECK(fits, "rotary", name << " has shape " << table.shape() << ", x has " << x.shape());
}

void rotary(const TensorView& x, const TensorView& cosine, const TensorView& sine, const TensorView& out,
            bool interleaved, bool inverse) {
  SUPY_CHECK(x.dim() >= 1 && x.dim() <= 4 && x.size(x.dim() - 1) % 2 == 0, "rotary",
             "x has shape " << x.shape() << ", expected 1 to 4 axes, the last one even");
  check_table(cosine, "cosine", x);
  check_table(sine, "sine", x);
  SUPY_CHECK(out.same_shape(x) && out.dtype() == x.dtype(), "rotary", "out must be like x");
  check_same_device(out, "rotary", "out", x);

  RotaryParams p{};
  p.x = x.data<void>();
  p.cosine = cosine.data<float>();
  p.sine = sine.data<float>();
  p.out = out.data<void>();
  p.type = type_of(x);
  p.dim = x.size(x.dim() - 1);
  p.interleaved = interleaved;
  p.inverse = inverse;
  for (int i = 0; i < 4; ++i) {
    const int64_t axis = i - (4 - x.dim());
    if (i < 3) p.size[i] = axis < 0 ? 1 : x.size(axis);
    p.x_stride[i] = stride_of(x, i);
    p.out_stride[i] = stride_of(out, i);
    p.table_stride[i] = stride_of(cosine, i);
    SUPY_CHECK(stride_of(sine, i) == p.table_stride[i], "rotary", "cosine and sine must have the same strides");
  }
  if (x.numel() == 0) return;
  SUPY_CHECK(x.is_cuda() || p.type != RotaryType::f16, "rotary", "no CPU kernel for float16");
  SUPY_LAUNCH(rotary, p, x);
}

}  // namespace

SUPY_BINDINGS(rotary, module) { module.def("rotary", &rotary); }

}  // namespace supy
