// Mixed-chunk attention: what its CPU kernels are given.
#pragma once
#include "gau_attention.h"

namespace supy {

struct MixedChunkParams {
  int64_t batch, tokens, key_size, value_size, chunk;  // B, T, S, E, c
  const int64_t* lengths;                              // [B]
  bool causal;
  FloatType type;   // of all tensors below, but for what is float32
  MatrixUnit unit;  // for bfloat16
  // What the linear part of each chunk is multiplied by, float32 [B, chunks]; steps may be 0.
  const float* weights;
  int64_t weight_batch_step, weight_chunk_step;
  TokenMatrix q_quad, k_quad, q_lin, k_lin, v, u;
  TokenMatrix out;
  // Of the gradients, which are computed where there is a grad; du and out only where there is u, out only if wanted.
  TokenMatrix grad, dq_quad, dk_quad, dq_lin, dk_lin, dv, du;
  // float32 [B, S, E], contiguous; each may be null. Causal: the sum of k_lin^T v over what comes before these tokens,
  // and with them; for the gradients, that of the loss by the latter, and by the former.
  const float* before;
  float* after;
  const float* dafter;
  float* dbefore;
};

// How many floats of memory the latter works in; it reads sizes only, and whether there is a grad.
int64_t mixed_chunk_attention_floats(const MixedChunkParams& params);
void mixed_chunk_attention_cpu(const MixedChunkParams& params, float* memory);

}  // namespace supy
