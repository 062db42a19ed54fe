// Reading and checking what several operators take.
#pragma once
#include <optional>

#include "simd.h"
#include "tensor.h"

namespace supy {

inline FloatType float_type(const TensorView& x, const char* op) {
  if (x.dtype() == DType::f32) return FloatType::f32;
  if (x.dtype() == DType::bf16) return FloatType::bf16;
  throw py::type_error(std::string("supy.") + op + ": no kernel for dtype " + name_of(x.dtype()));
}

inline void check_shape(const TensorView& x, const char* op, const char* name, const std::vector<int64_t>& shape) {
  bool fits = x.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; i < x.dim() && fits; ++i) fits = x.size(i) == shape[i];
  SUPY_CHECK(fits, op, name << " has shape " << x.shape() << ", expected "
                            << to_string(shape.data(), static_cast<int64_t>(shape.size())));
  SUPY_CHECK(!x.is_cuda(), op, name << " must be in CPU memory");
}

// A contiguous tensor of this dtype and shape.
template <typename T>
T* dense(const TensorView& x, const char* op, const char* name, DType dtype, const std::vector<int64_t>& shape) {
  check_shape(x, op, name, shape);
  check_dtype(x, op, name, dtype);
  SUPY_CHECK(x.is_contiguous(), op, name << " must be contiguous");
  return x.data<T>();
}

// An int32 or int64 tensor with one axis.
inline std::vector<int64_t> integers(const TensorView& x, const char* op, const char* name) {
  SUPY_CHECK(x.dim() == 1 && !x.is_cuda(), op, name << " has shape " << x.shape() << ", expected one axis in CPU memory");
  if (x.dtype() != DType::i64) check_dtype(x, op, name, DType::i32);
  std::vector<int64_t> result(x.size(0));
  for (int64_t i = 0; i < x.size(0); ++i)
    result[i] = x.dtype() == DType::i64 ? x.data<int64_t>()[i * x.stride(0)] : x.data<int32_t>()[i * x.stride(0)];
  return result;
}

// [B]; T for each sample where there is no tensor.
inline std::vector<int64_t> read_lengths(const std::optional<TensorView>& lengths, const char* op, int64_t B, int64_t T) {
  if (!lengths) return std::vector<int64_t>(B, T);
  std::vector<int64_t> result = integers(*lengths, op, "lengths");
  SUPY_CHECK(lengths->size(0) == B, op, "lengths has shape " << lengths->shape() << ", expected [" << B << "]");
  for (int64_t b = 0; b < B; ++b)
    SUPY_CHECK(result[b] >= 0 && result[b] <= T, op, "lengths[" << b << "] is " << result[b] << ", expected 0 to T=" << T);
  return result;
}

}  // namespace supy
