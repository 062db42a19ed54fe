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

void check_table(const TensorView& table, const char* name, const TensorView& x) {
  check_dtype(table, "rotary", name, DType::f32);
  check_same_device(table, "rotary", name, x);
  bool fits = table.dim() == 4 && 2 * table.size(3) == x.size(3);
  for (int i = 0; i < 3 && fits; ++i) fits = table.size(i) == x.size(i);
  SUPY_CHECK(fits, "rotary", name << " has shape " << table.shape() << ", x has " << x.shape());
}

void rotary(const TensorView& x, const TensorView& cosine, const TensorView& sine, const TensorView& out,
            bool interleaved, bool inverse) {
  SUPY_CHECK(x.dim() == 4 && x.size(3) % 2 == 0, "rotary",
             "x has shape " << x.shape() << ", expected [A, B, T, D] with D even");
  check_table(cosine, "cosine", x);
  check_table(sine, "sine", x);
  SUPY_CHECK(out.shape() == x.shape() && out.dtype() == x.dtype(), "rotary", "out must be like x");
  check_same_device(out, "rotary", "out", x);

  RotaryParams p{};
  p.x = x.data<void>();
  p.cosine = cosine.data<float>();
  p.sine = sine.data<float>();
  p.out = out.data<void>();
  p.type = type_of(x);
  p.dim = x.size(3);
  p.interleaved = interleaved;
  p.inverse = inverse;
  for (int i = 0; i < 4; ++i) {
    if (i < 3) p.size[i] = x.size(i);
    p.x_stride[i] = x.stride(i);
    p.out_stride[i] = out.stride(i);
    p.table_stride[i] = cosine.stride(i);
    SUPY_CHECK(sine.stride(i) == cosine.stride(i), "rotary", "cosine and sine must have the same strides");
  }
  if (x.numel() == 0) return;
  SUPY_CHECK(x.is_cuda() || p.type != RotaryType::f16, "rotary", "no CPU kernel for float16");
  SUPY_LAUNCH(rotary, p, x);
}

}  // namespace

SUPY_BINDINGS(rotary, module) { module.def("rotary", &rotary); }

}  // namespace supy
