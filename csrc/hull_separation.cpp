#include "hull_separation.h"

#include "arguments.h"

namespace supy {
namespace {

const char* op = "hull_separation";

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
  p.rows = dense<double>(rows, op, "rows", DType::f64, {K, n});
  p.classes = dense<int64_t>(classes, op, "classes", DType::i64, {M});
  p.lower = dense<double>(lower, op, "lower", DType::f64, {n - 1});
  p.upper = dense<double>(upper, op, "upper", DType::f64, {n - 1});
  p.start = dense<int64_t>(start, op, "start", DType::i64, {S});
  p.kind = dense<int64_t>(kind, op, "kind", DType::i64, {M});
  p.directions = dense<double>(directions, op, "directions", DType::f64, {M, n});
  p.support = dense<int64_t>(support, op, "support", DType::i64, {M, n + 1});
  p.multipliers = dense<double>(multipliers, op, "multipliers", DType::f64, {M, n + 1});
  check_rows(p.classes, M, "classes", K);
  check_rows(p.start, S, "start", K);
  p.num_rows = K, p.n = n, p.num_classes = M, p.num_start = S;
  py::gil_scoped_release without_lock;
  hull_separation_cpu(p);
}

}  // namespace

SUPY_BINDINGS(hull_separation, module) { module.def("hull_separation", &hull_separation); }

}  // namespace supy
