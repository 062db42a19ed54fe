// Cross-entropy of n tasks of m classes, logarithm outside the sum over tasks.
#pragma once
#include <cstdint>

namespace supy {

enum class TaskScoreType { f32, bf16 };
enum class TaskTargetType { f32, bf16, u8 };

// scores, targets and ds are [batch, tasks, classes], strides in elements; losses and grad are [batch, classes].
struct MultitaskParams {
  const void* scores;
  const void* targets;
  TaskScoreType score_type;
  TaskTargetType target_type;
  int64_t batch, tasks, classes;
  int64_t score_stride[3];
  int64_t target_stride[3];
  bool hard;
  float* losses;  // written by the first pass, read by the second
  const float* grad;
  void* ds;  // contiguous, of the type of the scores
};

// Whether a target is outside 0 to 1.
bool multitask_cross_entropy_cpu(const MultitaskParams& params);
void multitask_cross_entropy_backward_cpu(const MultitaskParams& params);

}  // namespace supy
