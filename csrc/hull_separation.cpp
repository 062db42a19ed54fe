#include "hull_separation.h"

#include "arguments.h"

namespace supy {
namespace {

const char* op = "hull_separation";

template <typename T>
T* array(const TensorView& x, const char* name, DType dtype, const std::vector<int64_t>& shape) {
  check_dtype(x, op, name, dtype);
  check_shape(x, op, name, shape);
  SUPY_CHECK(x.is_contiguous(), op, name << " must be contiguous");
  return x.data<T>();
}

void check_rows(const int64_t* rows, int64_t count, const char* name, int64_t K) {
  for (int64_t i = 0; i < count; ++i)
    SUPY_CHECK(rows[i] >= 0 && rows[i] < K, op, name << "[" << i << "] is " << rows[i] << ", expected 0 to " << K - 1);
}

void hull_separation(const TensorView& rows, const TensorView& classes, const TensorView& lower,
                     const TensorView& upper, const TensorView& start, const TensorView& kind,
                     const TensorView& directions, const TensorView& support, const TensorView& multipliers) {
  SUPY_CHECK(rows.dim() == 2 && rows.size(1) >= 2 && rows.size(0) >= 2, op,
             "rows has shape " << rows.shape() << ", expected [K, n] with K and n of at least 2");
  SUPY_CHECK(classes.dim() == 1 && start.dim() == 1, op, "classes and start must have one axis");
  const int64_t K = rows.size(0), n = rows.size(1), M = classes.size(0), S = start.size(0);
  HullSeparationParams p{};
  p.rows = array<double>(rows, "rows", DType::f64, {K, n});
  p.classes = array<int64_t>(classes, "classes", DType::i64, {M});
  p.lower = array<double>(lower, "lower", DType::f64, {n - 1});
  p.upper = array<double>(upper, "upper", DType::f64, {n - 1});
  p.start = array<int64_t>(start, "start", DType::i64, {S});
  p.kind = array<int64_t>(kind, "kind", DType::i64, {M});
  p.directions = array<double>(directions, "directions", DType::f64, {M, n});
  p.support = array<int64_t>(support, "support", DType::i64, {M, n + 1});
  p.multipliers = array<double>(multipliers, "multipliers", DType::f64, {M, n + 1});
  check_rows(p.classes, M, "classes", K);
  check_rows(p.start, S, "start", K);
  p.num_rows = K, p.n = n, p.num_classes = M, p.num_start = S;
  py::gil_scoped_release without_lock;
  hull_separation_cpu(p);
}

}  // namespace

SUPY_BINDINGS(hull_separation, module) { module.def("hull_separation", &hull_separation); }

}  // namespace supy
