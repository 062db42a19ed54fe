#include "token_matrix.h"

namespace supy {
namespace {

using Maybe = std::optional<TensorView>;

// What both operators and their gradients share; `size` is that of [B, T, ...], and kernel and the like decide what is seen.
GauAttentionParams shape_of(const TensorView& x, int64_t S, int64_t E, const VisibleRows& rows, const std::string& kernel,
                            const char* op) {
  GauAttentionParams p{};
  p.batch = x.size(0), p.tokens = x.size(1), p.key_size = S, p.value_size = E;
  p.type = float_type(x, op);
  p.softmax = kernel != "relu2";
  p.visible = rows.view();
  return p;
}

GauAttentionParams read(const TensorView& q, const TensorView& k, const TensorView& v, const Maybe& u,
                        const VisibleRows& rows, const std::string& kernel, const char* op) {
  SUPY_CHECK(q.dim() == 3 && v.dim() == 3, op, "q has shape " << q.shape() << ", v " << v.shape());
  const int64_t B = q.size(0), T = q.size(1), S = q.size(2), E = v.size(2);
  GauAttentionParams p = shape_of(q, S, E, rows, kernel, op);
  p.q = token_matrix(q, op, "q", q, {B, T, S});
  p.k = token_matrix(k, op, "k", q, {B, T, S});
  p.v = token_matrix(v, op, "v", q, {B, T, E});
  if (u) p.u = token_matrix(*u, op, "u", q, {B, T, E});
  return p;
}

// `stats` is [B, T], or of size 0 where there is nothing to keep.
float* read_stats(const TensorView& stats, const char* op, int64_t B, int64_t T) {
  return stats.numel() == 0 ? nullptr : dense<float>(stats, op, "stats", DType::f32, {B, T});
}

void attention(const TensorView& q, const TensorView& k, const TensorView& v, const Maybe& u, const Maybe& lengths,
               const Maybe& cu_seqlens, const std::string& kernel, bool causal, double scale,
               std::optional<double> relu2_length, const TensorView& out, const TensorView& attended,
               const TensorView& stats) {
  const char* op = "gau_attention";
  SUPY_CHECK(q.dim() == 3, op, "q has shape " << q.shape());
  const auto rows = visible_rows(op, q.size(0), q.size(1), lengths, cu_seqlens, kernel, causal, scale, relu2_length);
  GauAttentionParams p = read(q, k, v, u, rows, kernel, op);
  const std::vector<int64_t> shape{p.batch, p.tokens, p.value_size};
  p.out = token_matrix(out, op, "out", q, shape);
  if (attended.numel() > 0) p.attended = token_matrix(attended, op, "attended", q, shape);
  p.stats = read_stats(stats, op, p.batch, p.tokens);
  py::gil_scoped_release without_lock;
  gau_attention_cpu(p);
}

void attention_backward(const TensorView& grad, const TensorView& q, const TensorView& k, const TensorView& v,
                        const Maybe& u, const TensorView& attended, const TensorView& stats, const Maybe& lengths,
                        const Maybe& cu_seqlens, const std::string& kernel, bool causal, double scale,
                        std::optional<double> relu2_length, const TensorView& dq, const TensorView& dk,
                        const TensorView& dv, const TensorView& du) {
  const char* op = "gau_attention_backward";
  SUPY_CHECK(q.dim() == 3, op, "q has shape " << q.shape());
  const auto rows = visible_rows(op, q.size(0), q.size(1), lengths, cu_seqlens, kernel, causal, scale, relu2_length);
  const GauAttentionParams p = read(q, k, v, u, rows, kernel, op);
  const std::vector<int64_t> keys{p.batch, p.tokens, p.key_size}, values{p.batch, p.tokens, p.value_size};
  GauAttentionGradient g{};
  g.grad = token_matrix(grad, op, "grad", q, values);
  g.attended = token_matrix(attended, op, "attended", q, values);
  g.stats = read_stats(stats, op, p.batch, p.tokens);
  SUPY_CHECK(!p.softmax || g.stats != nullptr || p.batch * p.tokens == 0, op, "stats is missing");
  g.dq = token_matrix(dq, op, "dq", q, keys);
  g.dk = token_matrix(dk, op, "dk", q, keys);
  g.dv = token_matrix(dv, op, "dv", q, values);
  if (u) g.du = token_matrix(du, op, "du", q, values);
  py::gil_scoped_release without_lock;
  gau_attention_backward_cpu(p, g);
}

// The tensors that the unit and its gradient read.
GatedAttentionUnitParams read_unit(const TensorView& x, const TensorView& w_in, const TensorView& w_out,
                                   const TensorView& gamma, const TensorView& beta, const TensorView& cosine,
                                   const TensorView& sine, const VisibleRows& rows, const std::string& kernel,
                                   const char* op) {
  SUPY_CHECK(x.dim() == 3 && w_out.dim() == 2 && gamma.dim() == 2, op,
             "x has shape " << x.shape() << ", w_out " << w_out.shape() << ", gamma " << gamma.shape());
  const int64_t T = x.size(1), d = x.size(2), E = w_out.size(1), S = gamma.size(1);
  GatedAttentionUnitParams p{};
  p.attention = shape_of(x, S, E, rows, kernel, op);
  p.dim = d;
  p.x = token_matrix(x, op, "x", x, {x.size(0), T, d});
  p.w_in = dense<void>(w_in, op, "w_in", x.dtype(), {2 * E + S, d});
  p.w_out = dense<void>(w_out, op, "w_out", x.dtype(), {d, E});
  p.gamma = dense<float>(gamma, op, "gamma", DType::f32, {2, S});
  p.beta = dense<float>(beta, op, "beta", DType::f32, {2, S});
  p.cosine = dense<float>(cosine, op, "cosine", DType::f32, {T, S / 2});
  p.sine = dense<float>(sine, op, "sine", DType::f32, {T, S / 2});
  return p;
}

void unit(const TensorView& x, const TensorView& w_in, const TensorView& w_out, const TensorView& gamma,
          const TensorView& beta, const TensorView& cosine, const TensorView& sine, const Maybe& lengths,
          const Maybe& cu_seqlens, const std::string& kernel, bool causal, double score_scale,
          std::optional<double> relu2_length, const TensorView& y, const TensorView& h, const TensorView& attended,
          const TensorView& stats) {
  const char* op = "gated_attention_unit";
  SUPY_CHECK(x.dim() == 3, op, "x has shape " << x.shape());
  const int64_t B = x.size(0), T = x.size(1);
  const auto rows = visible_rows(op, B, T, lengths, cu_seqlens, kernel, causal, score_scale, relu2_length);
  GatedAttentionUnitParams p = read_unit(x, w_in, w_out, gamma, beta, cosine, sine, rows, kernel, op);
  const int64_t E = p.attention.value_size;
  p.y = token_matrix(y, op, "y", x, {B, T, p.dim});
  if (h.numel() > 0) p.h = token_matrix(h, op, "h", x, {B, T, 2 * E + p.attention.key_size});
  if (attended.numel() > 0) p.attention.attended = token_matrix(attended, op, "attended", x, {B, T, E});
  p.attention.stats = read_stats(stats, op, B, T);
  py::gil_scoped_release without_lock;
  gated_attention_unit_cpu(p);
}

void unit_backward(const TensorView& grad, const TensorView& x, const TensorView& w_in, const TensorView& w_out,
                   const TensorView& gamma, const TensorView& beta, const TensorView& cosine, const TensorView& sine,
                   const TensorView& h, const TensorView& attended, const TensorView& stats, const Maybe& lengths,
                   const Maybe& cu_seqlens, const std::string& kernel, bool causal, double score_scale,
                   std::optional<double> relu2_length, const TensorView& dx, const TensorView& dw_in,
                   const TensorView& dw_out, const TensorView& dgamma, const TensorView& dbeta) {
  const char* op = "gated_attention_unit_backward";
  SUPY_CHECK(x.dim() == 3, op, "x has shape " << x.shape());
  const int64_t B = x.size(0), T = x.size(1), d = x.size(2);
  const auto rows = visible_rows(op, B, T, lengths, cu_seqlens, kernel, causal, score_scale, relu2_length);
  GatedAttentionUnitParams p = read_unit(x, w_in, w_out, gamma, beta, cosine, sine, rows, kernel, op);
  const int64_t E = p.attention.value_size, S = p.attention.key_size;
  p.h = token_matrix(h, op, "h", x, {B, T, 2 * E + S});
  p.attention.attended = token_matrix(attended, op, "attended", x, {B, T, E});
  p.attention.stats = read_stats(stats, op, B, T);
  SUPY_CHECK(!p.attention.softmax || p.attention.stats != nullptr || B * T == 0, op, "stats is missing");
  GatedAttentionUnitGradient g{};
  g.grad = token_matrix(grad, op, "grad", x, {B, T, d});
  g.dx = token_matrix(dx, op, "dx", x, {B, T, d});
  g.dw_in = dense<void>(dw_in, op, "dw_in", x.dtype(), {2 * E + S, d});
  g.dw_out = dense<void>(dw_out, op, "dw_out", x.dtype(), {d, E});
  g.dgamma = dense<float>(dgamma, op, "dgamma", DType::f32, {2, S});
  g.dbeta = dense<float>(dbeta, op, "dbeta", DType::f32, {2, S});
  py::gil_scoped_release without_lock;
  gated_attention_unit_backward_cpu(p, g);
}

}  // namespace

SUPY_BINDINGS(gau_attention, module) {
  module.def("gau_attention", &attention);
  module.def("gau_attention_backward", &attention_backward);
  module.def("gated_attention_unit", &unit);
  module.def("gated_attention_unit_backward", &unit_backward);
}

}  // namespace supy
