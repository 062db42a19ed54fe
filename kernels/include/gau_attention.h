// Attention of the gated attention unit, and the whole unit; supy/reference/gau_attention.py has the formulas.
#pragma once
#include <cstdint>

#include "simd.h"

namespace supy {

// [B, T, n] or [T, n], the last axis contiguous; steps in elements. Without data: absent.
struct TokenMatrix {
  void* data;
  int64_t batch_step, token_step;
};

// Row t of sample b sees the keys first <= key < last; S = factor * q k^T, and relu2 multiplies by `share`, 1 / l.
struct VisibleKeys {
  const int64_t* lengths;         // [B], tokens that are no padding
  const int64_t *first, *last;    // [B, T]
  const float *factor, *share;    // [B, T]
};

struct GauAttentionParams {
  int64_t batch, tokens, key_size, value_size;
  FloatType type;
  bool softmax;  // else relu2
  VisibleKeys visible;
  TokenMatrix q, k, v, u;      // read only; u may be absent
  TokenMatrix out, attended;   // attended may be absent
  float* stats;                // [B, T], may be null
};

struct GauAttentionGradient {
  TokenMatrix grad, attended;  // read only
  const float* stats;
  TokenMatrix dq, dk, dv, du;
};

void gau_attention_cpu(const GauAttentionParams& p);
void gau_attention_backward_cpu(const GauAttentionParams& p, const GauAttentionGradient& g);

// The unit around it: h = x w_in^T = (u, v, z) before swish, q and k = rotated (z * gamma + beta), y = out w_out^T.
// Of `attention`, the tensors q, k, v, u and out are not used.
struct GatedAttentionUnitParams {
  GauAttentionParams attention;
  int64_t dim;
  TokenMatrix x, h;                  // h may be absent
  const void *w_in, *w_out;          // [2 E + S, dim], [dim, E]
  const float *gamma, *beta;         // [2, S]
  const float *cosine, *sine;        // [T, S / 2]
  TokenMatrix y;
};

struct GatedAttentionUnitGradient {
  TokenMatrix grad;  // of y
  TokenMatrix dx;
  void *dw_in, *dw_out;
  float *dgamma, *dbeta;
};

void gated_attention_unit_cpu(const GatedAttentionUnitParams& p);
void gated_attention_unit_backward_cpu(const GatedAttentionUnitParams& p, const GatedAttentionUnitGradient& g);

}  // namespace supy
