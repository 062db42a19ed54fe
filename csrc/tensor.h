// How Python tensors reach the kernels: TensorView, a pybind11 caster over DLPack's C exchange API.
//
// A binding takes `const TensorView&` (or std::optional<TensorView>) and gets pointer, shape, strides, dtype and device
// of a torch.Tensor for 0.1 us, without torch headers. The view borrows the tensor, so it must not outlive the call.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "dlpack.h"

namespace supy {

namespace py = pybind11;

enum class DType { f16, bf16, f32, f64, u8, i32, i64, boolean };

inline const char* name_of(DType dtype) {
  constexpr const char* names[] = {"float16", "bfloat16", "float32", "float64", "uint8", "int32", "int64", "bool"};
  return names[static_cast<int>(dtype)];
}

// Raises ValueError "supy.<op>: ..." unless the condition holds; the message is a stream expression.
#define SUPY_CHECK(condition, op, message)             \
  do {                                                 \
    if (!(condition)) {                                \
      std::ostringstream supy_text;                    \
      supy_text << "supy." << (op) << ": " << message; \
      throw py::value_error(supy_text.str());          \
    }                                                  \
  } while (0)

// "[2, 63, 4]"
inline std::string to_string(const int64_t* sizes, int64_t count) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < count; ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

// torch's exchange table and tensor type, found on first use so that this module loads without torch.
struct Torch {
  const dlpack::ExchangeAPI* api;
  PyTypeObject* tensor_type;

  static const Torch& get() {
    static const Torch torch = load();
    return torch;
  }

 private:
  static Torch load() {
    py::object type = py::module_::import("torch").attr("Tensor");
    if (!py::hasattr(type, "__dlpack_c_exchange_api__"))
      throw py::import_error("supy._C needs torch >= 2.10: torch.Tensor has no __dlpack_c_exchange_api__");
    py::object capsule = type.attr("__dlpack_c_exchange_api__");
    auto* api = static_cast<const dlpack::ExchangeAPI*>(
        PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr())));
    if (api == nullptr) throw py::error_already_set();
    if (api->version.major != 1)
      throw py::import_error("supy._C reads DLPack 1.x, this torch exports " + std::to_string(api->version.major) + ".x");
    capsule.inc_ref();  // the table lives as long as the process
    return {api, reinterpret_cast<PyTypeObject*>(type.release().ptr())};
  }
};

class TensorView {
 public:
  TensorView() = default;

  // Throws TypeError for what is not a tensor or has a dtype or device that no kernel reads, and ValueError for a tensor
  // without storage (fake, meta): its pointer is null and a kernel would crash on it.
  explicit TensorView(PyObject* object) {
    const Torch& torch = Torch::get();
    if (!PyObject_TypeCheck(object, torch.tensor_type))
      throw py::type_error(std::string("expected a torch.Tensor, got ") + Py_TYPE(object)->tp_name);
    if (torch.api->view_from_object(object, &view_) != 0) {
      std::string reason = PyErr_Occurred() ? py::error_already_set().what() : "no reason given";
      reason = reason.substr(0, reason.find('\n'));  // torch appends a C++ backtrace
      throw py::value_error("this tensor has no memory that a kernel can read: " + reason);
    }
    dtype_ = read_dtype(view_.dtype);
    if (view_.device.type != dlpack::kCPU && view_.device.type != dlpack::kCUDA)
      throw py::type_error("expected a tensor on CPU or CUDA, got DLPack device type " +
                           std::to_string(view_.device.type));
    if (view_.data == nullptr && numel() != 0)
      throw py::value_error("this tensor has no storage (a fake or meta tensor); kernels need real memory");
  }

  int64_t dim() const { return view_.ndim; }
  int64_t size(int64_t i) const { return view_.shape[i]; }
  int64_t stride(int64_t i) const { return view_.strides[i]; }
  DType dtype() const { return dtype_; }
  bool is_cuda() const { return view_.device.type == dlpack::kCUDA; }
  int device_index() const { return view_.device.id; }

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t i = 0; i < dim(); ++i) count *= size(i);
    return count;
  }

  bool same_shape(const TensorView& other) const {
    return dim() == other.dim() && std::equal(view_.shape, view_.shape + dim(), other.view_.shape);
  }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim() - 1; i >= 0; expected *= size(i--))
      if (size(i) != 1 && stride(i) != expected && numel() != 0) return false;
    return true;
  }

  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(view_.data) + view_.byte_offset);
  }

  std::string shape() const { return to_string(view_.shape, dim()); }

  // The stream that PyTorch would launch on for this tensor's device; null on CPU.
  void* stream() const {
    void* stream = nullptr;
    if (is_cuda() && Torch::get().api->current_stream(view_.device.type, view_.device.id, &stream) != 0)
      throw py::error_already_set();
    return stream;
  }

 private:
  static DType read_dtype(dlpack::DataType type) {
    if (type.lanes == 1) {
      switch (type.code << 8 | type.bits) {
        case dlpack::kFloat << 8 | 16: return DType::f16;
        case dlpack::kBfloat << 8 | 16: return DType::bf16;
        case dlpack::kFloat << 8 | 32: return DType::f32;
        case dlpack::kFloat << 8 | 64: return DType::f64;
        case dlpack::kUInt << 8 | 8: return DType::u8;
        case dlpack::kInt << 8 | 32: return DType::i32;
        case dlpack::kInt << 8 | 64: return DType::i64;
        case dlpack::kBool << 8 | 8: return DType::boolean;
      }
    }
    throw py::type_error("unsupported dtype (DLPack code " + std::to_string(type.code) + ", " +
                         std::to_string(type.bits) + " bits)");
  }

  dlpack::Tensor view_{};
  DType dtype_ = DType::f32;
};

inline void check_dtype(const TensorView& tensor, const char* op, const char* name, DType dtype) {
  if (tensor.dtype() != dtype)
    throw py::type_error(std::string("supy.") + op + ": " + name + " has dtype " + name_of(tensor.dtype()) +
                         ", expected " + name_of(dtype));
}

inline void check_same_device(const TensorView& tensor, const char* op, const char* name, const TensorView& other) {
  SUPY_CHECK(tensor.is_cuda() == other.is_cuda() && tensor.device_index() == other.device_index(), op,
             name << " is on another device than the first tensor");
}

// A one-dimensional CPU tensor of int64 or float32 that owns `data`, which came from malloc and is released by free.
template <typename T>
py::object tensor_from_malloc(T* data, int64_t size) {
  static_assert(std::is_same_v<T, int64_t> || std::is_same_v<T, float>);
  constexpr uint8_t code = std::is_same_v<T, float> ? dlpack::kFloat : dlpack::kInt;
  struct Owned {
    dlpack::ManagedTensor managed;
    int64_t shape, stride;
  };
  auto* owned = new Owned{};
  owned->shape = size;
  owned->stride = 1;
  owned->managed.version = Torch::get().api->version;
  owned->managed.context = owned;
  owned->managed.deleter = [](dlpack::ManagedTensor* self) {
    std::free(self->tensor.data);
    delete static_cast<Owned*>(self->context);
  };
  owned->managed.tensor = {data, {dlpack::kCPU, 0}, 1, {code, 8 * sizeof(T), 1}, &owned->shape, &owned->stride, 0};
  void* object = nullptr;
  if (Torch::get().api->managed_to_object(&owned->managed, &object) != 0) {
    owned->managed.deleter(&owned->managed);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

// Each csrc/<op>.cpp registers itself, so that adding an operator edits no list.
using Bind = void (*)(py::module_&);

inline std::vector<Bind>& bindings() {
  static std::vector<Bind> all;
  return all;
}

#define SUPY_BINDINGS(op, module)                                                          \
  static void bind_##op(py::module_&);                                                     \
  static const bool bound_##op = (supy::bindings().push_back(bind_##op), true);            \
  static void bind_##op(py::module_& module)

}  // namespace supy

namespace pybind11::detail {

template <>
struct type_caster<supy::TensorView> {
  PYBIND11_TYPE_CASTER(supy::TensorView, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    value = supy::TensorView(source.ptr());
    return true;
  }
};

}  // namespace pybind11::detail
