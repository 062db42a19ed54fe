// Mixed-chunk attention, and the layer around it: what its CPU kernels are given.
#pragma once
#include "gau_attention.h"

namespace supy {

struct MixedChunkParams {
  int64_t batch, tokens, key_size, value_size, chunk;  // B, T, S, E, c
  int64_t segment;                                     // tokens that are worked on together, a multiple of c
  const int64_t* lengths;                              // [B]
  bool causal;
  FloatType type;  // of all tensors below, but for what is float32
  // What the linear part of each chunk is multiplied by, float32 [B, chunks]; steps may be 0.
  const float* weights;
  int64_t weight_batch_step, weight_chunk_step;
  TokenMatrix heads[4], v, u;  // q and k of the quadratic part, then of the linear one; u may be absent
  TokenMatrix out;
  // Of the gradients, which are computed where there is a grad.
  TokenMatrix grad, dheads[4], dv, du;

  // The layer, where dim is not 0: h = x w_in^T = (u, v, z) before swish, heads = rotated (z * scale + offset),
  // out = (gated attention) w_out^T. Heads, v, u and their gradients are not used.
  int64_t dim;
  TokenMatrix x, dx;
  TokenMatrix h;  // of the first `kept` tokens, a multiple of `segment` or all; all where gradients are not causal
  int64_t kept;
  const void *w_in, *w_out;     // [2 E + S, dim], [dim, E]
  const float *scale, *offset;  // [4, S]
  const float *cosine, *sine;   // [T, S / 2]
  float* sums;                  // causal: sums of k_lin^T v before each segment, [segments, B, S, E]; may be null
  float *dw_in, *dw_out;        // float32, rows and columns padded to multiples of 32
  float *dscale, *doffset;      // [4, S]
};

void mixed_chunk_attention_cpu(const MixedChunkParams& p);

}  // namespace supy
