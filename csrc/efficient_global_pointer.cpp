#include "efficient_global_pointer.h"

#include <tuple>

#include "span_arguments.h"

namespace supy {
namespace {

EfficientGlobalPointerParams read(const TensorView& q, const TensorView& k, const TensorView& x, const TensorView& y,
                                  const std::vector<int64_t>& lengths, bool tril, double scale, const char* op) {
  SUPY_CHECK(q.dim() == 3 && x.dim() == 3, op,
             "q has shape " << q.shape() << ", expected [B, T, D], and start_bias " << x.shape() << ", [B, T, H]");
  const int64_t B = q.size(0), T = q.size(1), H = x.size(2), D = q.size(2);
  EfficientGlobalPointerParams p{};
  p.q = token_rows(q, op, "q", q, {B, T, D});
  p.k = token_rows(k, op, "k", q, {B, T, D});
  p.x = token_rows(x, op, "start_bias", q, {B, T, H});
  p.y = token_rows(y, op, "end_bias", q, {B, T, H});
  p.batch = B, p.tokens = T, p.heads = H, p.size = D;
  p.lengths = lengths.data();
  p.tril = tril;
  p.scale = static_cast<float>(scale);
  p.type = float_type(q, op);
  return p;
}

void scores(const TensorView& q, const TensorView& k, const TensorView& x, const TensorView& y,
            const std::optional<TensorView>& lengths, bool tril, double scale, const TensorView& out) {
  const char* op = "efficient_global_pointer_scores";
  const auto n = read_lengths(lengths, op, q.size(0), q.size(1));
  const auto p = read(q, k, x, y, n, tril, scale, op);
  check_scores(out, op, p, q);
  py::gil_scoped_release without_lock;
  efficient_global_pointer_scores_cpu(p, out.data<void>());
}

double loss(const TensorView& q, const TensorView& k, const TensorView& x, const TensorView& y, const TensorView& spans,
            const std::optional<TensorView>& lengths, bool tril, double scale,
            const std::vector<TensorView>& gradients) {
  const char* op = "efficient_global_pointer_loss";
  const auto n = read_lengths(lengths, op, q.size(0), q.size(1));
  const auto p = read(q, k, x, y, n, tril, scale, op);
  const auto positives = read_spans(spans, op, p, [](const Span& a, const Span& b) {
    return std::tie(a.batch, a.start, a.end, a.head) < std::tie(b.batch, b.start, b.end, b.head);
  });
  EfficientGlobalPointerLoss l{};
  l.spans = positives.data();
  l.count = static_cast<int64_t>(positives.size());
  l.gradients = !gradients.empty();
  if (l.gradients) {
    SUPY_CHECK(gradients.size() == 4, op, "expected 4 gradients, got " << gradients.size());
    l.dq = gradient_of(gradients[0], op, "dq", q);
    l.dk = gradient_of(gradients[1], op, "dk", k);
    l.dx = gradient_of(gradients[2], op, "dstart_bias", x);
    l.dy = gradient_of(gradients[3], op, "dend_bias", y);
  }
  py::gil_scoped_release without_lock;
  return efficient_global_pointer_loss_cpu(p, l);
}

py::tuple spans(const TensorView& q, const TensorView& k, const TensorView& x, const TensorView& y,
                const std::optional<TensorView>& lengths, bool tril, double scale, double threshold) {
  const char* op = "efficient_global_pointer_spans";
  const auto n = read_lengths(lengths, op, q.size(0), q.size(1));
  const auto p = read(q, k, x, y, n, tril, scale, op);
  SpanList list;
  {
    py::gil_scoped_release without_lock;
    list = efficient_global_pointer_spans_cpu(p, static_cast<float>(threshold));
  }
  return to_python(list);
}

}  // namespace

SUPY_BINDINGS(efficient_global_pointer, module) {
  module.def("efficient_global_pointer_scores", &scores);
  module.def("efficient_global_pointer_loss", &loss);
  module.def("efficient_global_pointer_spans", &spans);
}

}  // namespace supy
