// supy._C: collects the bindings of every operator, and says how it was built.
#include "simd.h"
#include "tensor.h"

#ifndef SUPY_CUDA_VERSION
#define SUPY_CUDA_VERSION ""
#define SUPY_CUDA_ARCHITECTURES ""
#endif

#ifdef _OPENMP
constexpr bool has_openmp = true;
#else
constexpr bool has_openmp = false;
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of supy; the public functions are in supy.ops.";
  for (auto bind : supy::bindings()) bind(module);

  module.def("build_info", [] {
    pybind11::dict info;
    info["version"] = SUPY_VERSION;
    info["compiler"] = SUPY_COMPILER;
    info["openmp"] = has_openmp;
    info["cuda"] = SUPY_CUDA_VERSION;
    info["cuda_architectures"] = SUPY_CUDA_ARCHITECTURES;
    info["instruction_set"] = supy::name_of(supy::instruction_set());
    info["bf16_products"] = supy::matrix_unit() != supy::MatrixUnit::none;
    return info;
  });
  // What one call costs: two tensors in, nothing done (benchmarks/table.py).
  module.def("touch", [](const supy::TensorView& a, const supy::TensorView& b) { return a.numel() + b.numel(); });
}
