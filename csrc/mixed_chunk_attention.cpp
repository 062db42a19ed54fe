#include "mixed_chunk_attention.h"

#include "scratch.h"
#include "token_matrix.h"

namespace supy {
namespace {

using Optional = std::optional<TensorView>;

float* sums(const Optional& x, const char* op, const char* name, const MixedChunkParams& p) {
  if (!x) return nullptr;
  return dense<float>(*x, op, name, DType::f32, {p.batch, p.key_size, p.value_size});
}

// In `memory`, float32 and large enough for this, or in memory of its own.
void compute(const MixedChunkParams& p, const Optional& memory, const char* op) {
  const int64_t floats = mixed_chunk_attention_floats(p);
  float* given = nullptr;
  if (memory) {
    given = dense<float>(*memory, op, "memory", DType::f32, {memory->numel()});
    SUPY_CHECK(memory->numel() >= floats, op, "memory has " << memory->numel() << " numbers, expected " << floats);
  }
  py::gil_scoped_release without_lock;
  if (given != nullptr) return mixed_chunk_attention_cpu(p, given);
  const Scratch own(floats);
  mixed_chunk_attention_cpu(p, own.get());
}

// inputs: q_quad, k_quad, q_lin, k_lin, v, and u if there is one.
MixedChunkParams read(const std::vector<TensorView>& inputs, const std::vector<int64_t>& lengths,
                      const TensorView& weights, int64_t chunk, bool causal, const char* op) {
  const TensorView &q = inputs[0], &v = inputs[4];
  SUPY_CHECK(q.dim() == 3 && v.dim() == 3 && chunk >= 1, op,
             "q_quad has shape " << q.shape() << ", expected [B, T, S], and v " << v.shape() << ", [B, T, E]");
  MixedChunkParams p{};
  p.batch = q.size(0), p.tokens = q.size(1), p.key_size = q.size(2), p.value_size = v.size(2), p.chunk = chunk;
  const std::vector<int64_t> keys{p.batch, p.tokens, p.key_size}, values{p.batch, p.tokens, p.value_size};
  p.lengths = lengths.data();
  p.causal = causal;
  p.type = float_type(q, op);
  p.unit = matrix_unit();
  check_dtype(weights, op, "weights", DType::f32);
  check_shape(weights, op, "weights", {p.batch, p.tokens / chunk + (p.tokens % chunk != 0)});
  p.weights = weights.data<float>();
  p.weight_batch_step = weights.stride(0), p.weight_chunk_step = weights.stride(1);
  p.q_quad = token_matrix(q, op, "q_quad", q, keys);
  p.k_quad = token_matrix(inputs[1], op, "k_quad", q, keys);
  p.q_lin = token_matrix(inputs[2], op, "q_lin", q, keys);
  p.k_lin = token_matrix(inputs[3], op, "k_lin", q, keys);
  p.v = token_matrix(v, op, "v", q, values);
  if (inputs.size() > 5) p.u = token_matrix(inputs[5], op, "u", q, values);
  return p;
}

void forward(const std::vector<TensorView>& inputs, const Optional& lengths, const TensorView& weights, int64_t chunk,
             bool causal, const TensorView& out, const Optional& before, const Optional& after,
             const Optional& memory) {
  const char* op = "mixed_chunk_attention";
  SUPY_CHECK(inputs.size() == 5 || inputs.size() == 6, op, "expected 5 or 6 inputs, got " << inputs.size());
  const auto n = read_lengths(lengths, op, inputs[0].size(0), inputs[0].size(1));
  MixedChunkParams p = read(inputs, n, weights, chunk, causal, op);
  p.out = token_matrix(out, op, "out", inputs[0], {p.batch, p.tokens, p.value_size});
  p.before = sums(before, op, "before", p);
  p.after = sums(after, op, "after", p);
  compute(p, memory, op);
}

// outputs: dq_quad, dk_quad, dq_lin, dk_lin, dv, and du if there is u, and then perhaps the result itself.
void backward(const TensorView& grad, const std::vector<TensorView>& inputs, const Optional& lengths,
              const TensorView& weights, int64_t chunk, bool causal, const std::vector<TensorView>& outputs,
              const Optional& before, const Optional& dafter, const Optional& dbefore, const Optional& memory) {
  const char* op = "mixed_chunk_attention_backward";
  SUPY_CHECK(inputs.size() == 5 || inputs.size() == 6, op, "expected 5 or 6 inputs, got " << inputs.size());
  SUPY_CHECK(outputs.size() == inputs.size() || (outputs.size() == 7 && inputs.size() == 6), op,
             "expected as many outputs as inputs, or 7 for 6, got " << outputs.size());
  const auto n = read_lengths(lengths, op, inputs[0].size(0), inputs[0].size(1));
  MixedChunkParams p = read(inputs, n, weights, chunk, causal, op);
  const std::vector<int64_t> values{p.batch, p.tokens, p.value_size};
  p.grad = token_matrix(grad, op, "grad", inputs[0], values);
  TokenMatrix* to[] = {&p.dq_quad, &p.dk_quad, &p.dq_lin, &p.dk_lin, &p.dv, &p.du, &p.out};
  const char* names[] = {"dq_quad", "dk_quad", "dq_lin", "dk_lin", "dv", "du", "out"};
  for (size_t i = 0; i < outputs.size(); ++i)
    *to[i] = token_matrix(outputs[i], op, names[i], inputs[0],
                          {p.batch, p.tokens, i < 4 ? p.key_size : p.value_size});
  p.before = sums(before, op, "before", p);
  p.dafter = sums(dafter, op, "dafter", p);
  p.dbefore = sums(dbefore, op, "dbefore", p);
  // Gradients are known by their grad.
  if (p.batch == 0 || p.tokens == 0 || p.grad.data == nullptr) return;
  compute(p, memory, op);
}

// Of a call with tensors of these sizes.
int64_t floats(int64_t batch, int64_t tokens, int64_t key_size, int64_t value_size, int64_t chunk, bool causal,
               bool gradients, bool is_bf16) {
  MixedChunkParams p{};
  p.batch = batch, p.tokens = tokens, p.key_size = key_size, p.value_size = value_size, p.chunk = chunk;
  SUPY_CHECK(batch >= 0 && tokens >= 0 && key_size >= 0 && value_size >= 0 && chunk >= 1, "mixed_chunk_attention",
             "negative sizes");
  p.causal = causal;
  p.type = is_bf16 ? FloatType::bf16 : FloatType::f32;
  p.unit = matrix_unit();
  if (gradients) p.grad.data = &p;
  return mixed_chunk_attention_floats(p);
}

}  // namespace

SUPY_BINDINGS(mixed_chunk_attention, module) {
  module.def("mixed_chunk_attention", &forward);
  module.def("mixed_chunk_attention_backward", &backward);
  module.def("mixed_chunk_attention_floats", &floats);
}

}  // namespace supy
