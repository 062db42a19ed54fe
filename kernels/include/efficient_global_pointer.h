// Efficient GlobalPointer: what its CPU kernels are given.
#pragma once
#include "spans.h"

namespace supy {

// s[b, h, i, j] = scale q[b, i] . k[b, j] + x[b, i, h] + y[b, j, h]
struct EfficientGlobalPointerParams : SpanScores {
  TokenRows q, k;  // [B, T, D]
  TokenRows x, y;  // [B, T, H]
};

struct EfficientGlobalPointerLoss {
  const Span* spans;  // the distinct positives, by (batch, start, end, head)
  int64_t count;
  bool gradients;
  // [B, T, D] and [B, T, H], contiguous; written where `gradients`.
  float *dq, *dk, *dx, *dy;
};

void efficient_global_pointer_scores_cpu(const EfficientGlobalPointerParams& params, void* scores);
double efficient_global_pointer_loss_cpu(const EfficientGlobalPointerParams& params,
                                         const EfficientGlobalPointerLoss& loss);
SpanList efficient_global_pointer_spans_cpu(const EfficientGlobalPointerParams& params, float threshold);

}  // namespace supy
