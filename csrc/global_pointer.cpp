#include "global_pointer.h"

#include <tuple>

#include "span_arguments.h"

namespace supy {
namespace {

GlobalPointerParams read(const TensorView& q, const TensorView& k, const std::vector<int64_t>& lengths, bool tril,
                         double scale, const char* op) {
  SUPY_CHECK(q.dim() == 4, op, "q has shape " << q.shape() << ", expected [B, T, H, D]");
  GlobalPointerParams p{};
  p.batch = q.size(0), p.tokens = q.size(1), p.heads = q.size(2), p.size = q.size(3);
  p.q = token_rows(q, op, "q", q, {p.batch, p.tokens, p.heads, p.size});
  p.k = token_rows(k, op, "k", q, {p.batch, p.tokens, p.heads, p.size});
  p.lengths = lengths.data();
  p.tril = tril;
  p.scale = static_cast<float>(scale);
  p.type = float_type(q, op);
  return p;
}

void scores(const TensorView& q, const TensorView& k, const std::optional<TensorView>& lengths, bool tril, double scale,
            const TensorView& out) {
  const char* op = "global_pointer_scores";
  SUPY_CHECK(q.dim() == 4, op, "q has shape " << q.shape() << ", expected [B, T, H, D]");
  const auto n = read_lengths(lengths, op, q.size(0), q.size(1));
  const auto p = read(q, k, n, tril, scale, op);
  check_scores(out, op, p, q);
  py::gil_scoped_release without_lock;
  global_pointer_scores_cpu(p, out.data<void>());
}

double loss(const TensorView& q, const TensorView& k, const TensorView& spans, const std::optional<TensorView>& lengths,
            bool tril, double scale, const std::vector<TensorView>& gradients) {
  const char* op = "global_pointer_loss";
  const auto n = read_lengths(lengths, op, q.size(0), q.size(1));
  const auto p = read(q, k, n, tril, scale, op);
  const auto positives = read_spans(spans, op, p, [](const Span& a, const Span& b) {
    return std::tie(a.batch, a.head, a.start, a.end) < std::tie(b.batch, b.head, b.start, b.end);
  });
  GlobalPointerLoss l{};
  l.spans = positives.data();
  l.count = static_cast<int64_t>(positives.size());
  l.gradients = !gradients.empty();
  if (l.gradients) {
    SUPY_CHECK(gradients.size() == 2, op, "expected 2 gradients, got " << gradients.size());
    l.dq = gradient_of(gradients[0], op, "dq", q);
    l.dk = gradient_of(gradients[1], op, "dk", k);
  }
  py::gil_scoped_release without_lock;
  return global_pointer_loss_cpu(p, l);
}

py::tuple spans(const TensorView& q, const TensorView& k, const std::optional<TensorView>& lengths, bool tril,
                double scale, double threshold) {
  const char* op = "global_pointer_spans";
  const auto n = read_lengths(lengths, op, q.size(0), q.size(1));
  const auto p = read(q, k, n, tril, scale, op);
  SpanList list;
  {
    py::gil_scoped_release without_lock;
    list = global_pointer_spans_cpu(p, static_cast<float>(threshold));
  }
  return to_python(list);
}

}  // namespace

SUPY_BINDINGS(global_pointer, module) {
  module.def("global_pointer_scores", &scores);
  module.def("global_pointer_loss", &loss);
  module.def("global_pointer_spans", &spans);
}

}  // namespace supy
