// Multi-label cross-entropy with dense targets or with the indices of the positive classes.
#pragma once
#include <cstdint>

namespace supy {

enum class ScoreType { f32, bf16 };
enum class TargetType { f32, bf16, u8, indices };

// Rows of scores and targets have unit stride inside; row_stride is in elements. ds is [rows, classes], contiguous,
// all others [rows].
struct MultilabelParams {
  const void* scores;
  const void* targets;  // int64 [rows, positives] where target_type is indices, else [rows, classes]
  ScoreType score_type;
  TargetType target_type;
  int64_t score_row_stride;
  int64_t target_row_stride;
  int64_t rows;
  int64_t classes;
  int64_t positives;
  int64_t ignore_index;
  float* negative;  // the two halves of the loss: written by the first pass, read by the second
  float* positive;
  const float* grad_negative;
  const float* grad_positive;
  void* ds;  // of the type of the scores
};

// The place of the first target outside 0 to 1, or index outside 0 to classes - 1, in a flattened array; -1: none.
int64_t multilabel_cross_entropy_cpu(const MultilabelParams& params);
void multilabel_cross_entropy_backward_cpu(const MultilabelParams& params);

}  // namespace supy
