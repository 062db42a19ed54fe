#include "mixed_chunk_attention.h"

#include "token_matrix.h"

namespace supy {
namespace {

using Tensors = std::vector<TensorView>;
using Maybe = std::optional<TensorView>;

// What both operators and their gradients share; x is [B, T, ...].
MixedChunkParams sizes_of(const TensorView& x, int64_t S, int64_t E, const std::vector<int64_t>& lengths,
                          const TensorView& weights, int64_t chunk, int64_t segment, bool causal, const char* op) {
  SUPY_CHECK(chunk >= 1 && segment >= chunk && segment % chunk == 0, op,
             "segment is " << segment << ", chunk " << chunk);
  MixedChunkParams p{};
  p.batch = x.size(0), p.tokens = x.size(1), p.key_size = S, p.value_size = E, p.chunk = chunk, p.segment = segment;
  p.lengths = lengths.data();
  p.causal = causal;
  p.type = float_type(x, op);
  check_dtype(weights, op, "weights", DType::f32);
  check_shape(weights, op, "weights", {p.batch, p.tokens / chunk + (p.tokens % chunk != 0)});
  p.weights = weights.data<float>();
  p.weight_batch_step = weights.stride(0), p.weight_chunk_step = weights.stride(1);
  return p;
}

constexpr const char* HEADS[] = {"q_quad", "k_quad", "q_lin", "k_lin"};

// inputs: q_quad, k_quad, q_lin, k_lin, v, and u if there is one. outputs: the result; or, of its grad, the gradients
// of the inputs.
void attention(const Tensors& inputs, const Maybe& grad, const Maybe& lengths, const TensorView& weights, int64_t chunk,
               int64_t segment, bool causal, const Tensors& outputs) {
  const char* op = grad ? "mixed_chunk_attention_backward" : "mixed_chunk_attention";
  SUPY_CHECK(inputs.size() == 5 || inputs.size() == 6, op, "expected 5 or 6 inputs, got " << inputs.size());
  SUPY_CHECK(outputs.size() == (grad ? inputs.size() : 1), op, "got " << outputs.size() << " outputs");
  const TensorView &q = inputs[0], &v = inputs[4];
  SUPY_CHECK(q.dim() == 3 && v.dim() == 3, op,
             "q_quad has shape " << q.shape() << ", expected [B, T, S], and v " << v.shape() << ", [B, T, E]");
  const auto n = read_lengths(lengths, op, q.size(0), q.size(1));
  MixedChunkParams p = sizes_of(q, q.size(2), v.size(2), n, weights, chunk, segment, causal, op);
  const std::vector<int64_t> keys{p.batch, p.tokens, p.key_size}, values{p.batch, p.tokens, p.value_size};
  for (int i = 0; i < 4; ++i) p.heads[i] = token_matrix(inputs[i], op, HEADS[i], q, keys);
  p.v = token_matrix(v, op, "v", q, values);
  if (inputs.size() > 5) p.u = token_matrix(inputs[5], op, "u", q, values);
  if (grad) {
    p.grad = token_matrix(*grad, op, "grad", q, values);
    for (int i = 0; i < 4; ++i) p.dheads[i] = token_matrix(outputs[i], op, HEADS[i], q, keys);
    p.dv = token_matrix(outputs[4], op, "dv", q, values);
    if (inputs.size() > 5) p.du = token_matrix(outputs[5], op, "du", q, values);
    if (p.grad.data == nullptr) return;  // gradients are known by their grad
  } else {
    p.out = token_matrix(outputs[0], op, "out", q, values);
  }
  py::gil_scoped_release without_lock;
  mixed_chunk_attention_cpu(p);
}

// tensors: x, w_in, w_out, gamma, beta, cosine, sine. outputs: y; or, of its grad, dx, dw_in and dw_out, in float32
// with rows and columns padded to multiples of 32, dgamma and dbeta. sums and h are of size 0 where nothing is kept.
void layer(const Tensors& tensors, const Maybe& grad, const TensorView& sums, const TensorView& h, const Maybe& lengths,
           const TensorView& weights, int64_t chunk, int64_t segment, bool causal, const Tensors& outputs) {
  const char* op = grad ? "mixed_chunk_layer_backward" : "mixed_chunk_layer";
  SUPY_CHECK(tensors.size() == 7 && outputs.size() == (grad ? 5 : 1), op,
             "got " << tensors.size() << " tensors and " << outputs.size() << " outputs");
  const TensorView &x = tensors[0], &w_out = tensors[2], &scale = tensors[3];
  SUPY_CHECK(x.dim() == 3 && w_out.dim() == 2 && scale.dim() == 2, op,
             "x has shape " << x.shape() << ", w_out " << w_out.shape() << ", gamma " << scale.shape());
  const int64_t B = x.size(0), T = x.size(1), d = x.size(2), E = w_out.size(1), S = scale.size(1), N = 2 * E + S;
  const auto n = read_lengths(lengths, op, B, T);
  MixedChunkParams p = sizes_of(x, S, E, n, weights, chunk, segment, causal, op);
  p.dim = d;
  p.x = token_matrix(x, op, "x", x, {B, T, d});
  p.w_in = dense<void>(tensors[1], op, "w_in", x.dtype(), {N, d});
  p.w_out = dense<void>(w_out, op, "w_out", x.dtype(), {d, E});
  p.scale = dense<float>(scale, op, "gamma", DType::f32, {4, S});
  p.offset = dense<float>(tensors[4], op, "beta", DType::f32, {4, S});
  p.cosine = dense<float>(tensors[5], op, "cosine", DType::f32, {T, S / 2});
  p.sine = dense<float>(tensors[6], op, "sine", DType::f32, {T, S / 2});
  const int64_t segments = T / segment + (T % segment != 0);
  if (sums.numel() > 0) p.sums = dense<float>(sums, op, "sums", DType::f32, {segments, B, S, E});
  if (h.numel() > 0) {
    SUPY_CHECK(h.dim() == 3 && h.size(1) <= T, op, "h has shape " << h.shape());
    p.kept = h.size(1);
    SUPY_CHECK(p.kept == T || p.kept % segment == 0, op, "h has " << p.kept << " tokens, and a segment " << segment);
    p.h = token_matrix(h, op, "h", x, {B, p.kept, N});
  }
  const TensorView& first = outputs[0];
  if (grad) {
    SUPY_CHECK(causal ? p.sums != nullptr : p.kept == T, op, "nothing was kept");
    const auto rounded = [](int64_t k) { return (k + 31) / 32 * 32; };
    p.grad = token_matrix(*grad, op, "grad", x, {B, T, d});
    p.dx = token_matrix(first, op, "dx", x, {B, T, d});
    p.dw_in = dense<float>(outputs[1], op, "dw_in", DType::f32, {rounded(N), rounded(d)});
    p.dw_out = dense<float>(outputs[2], op, "dw_out", DType::f32, {rounded(d), rounded(E)});
    p.dscale = dense<float>(outputs[3], op, "dgamma", DType::f32, {4, S});
    p.doffset = dense<float>(outputs[4], op, "dbeta", DType::f32, {4, S});
  } else {
    p.out = token_matrix(first, op, "out", x, {B, T, d});
  }
  py::gil_scoped_release without_lock;
  mixed_chunk_attention_cpu(p);
}

}  // namespace

SUPY_BINDINGS(mixed_chunk_attention, module) {
  module.def("mixed_chunk_attention", &attention);
  module.def("mixed_chunk_layer", &layer);
}

}  // namespace supy
