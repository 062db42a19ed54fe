// GlobalPointer: what its CPU kernels are given.
#pragma once
#include "spans.h"

namespace supy {

// s[b, h, i, j] = scale q[b, i, h] . k[b, j, h]
struct GlobalPointerParams : SpanScores {
  TokenRows q, k;  // [B, T, H, D]
};

struct GlobalPointerLoss {
  const Span* spans;  // the distinct positives, by (batch, head, start, end)
  int64_t count;
  bool gradients;
  float *dq, *dk;  // [B, T, H, D], contiguous; written where `gradients`
};

void global_pointer_scores_cpu(const GlobalPointerParams& params, void* scores);
double global_pointer_loss_cpu(const GlobalPointerParams& params, const GlobalPointerLoss& loss);
SpanList global_pointer_spans_cpu(const GlobalPointerParams& params, float threshold);

}  // namespace supy
