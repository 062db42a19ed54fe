// The steps of a diffusion, and their noise: what a kernel is given. Every tensor is contiguous.
#pragma once
#include <cstdint>

#include "step_weights.h"

namespace supy {

enum class StepType { f32, bf16, f16 };

// Numbers `first`, `first` + 1, ... of the stream `seed`, into `out`.
struct NormalParams {
  void* out;
  StepType type;
  int64_t count;
  int64_t seed, first;
};

// One weighted sum a value; see StepWeights. Pointers to [samples, size] unless said otherwise.
struct StepParams {
  const void* x;
  const void* eps;    // or null
  const void* noise;  // null: that of the seed, if there is one
  void* out;          // may be x or eps
  void* made_noise;   // where to keep the noise of the seed, or null
  StepType type;
  int64_t samples, size;
  bool seeded;
  int64_t seed, first;
  bool clipped;
  float clip;
  const float* limits;  // [samples], or null: clip
  StepCoefficients coefficients;
  const StepWeights* weights;  // CPU only: [samples], or one for all
  bool shared_weights;
};

struct StepBackwardParams {
  const void* grad;
  StepParams step;     // its x, eps, limits and coefficients
  void *dx, *deps, *dnoise;  // or null where not wanted
};

// limits[sample] = max(quantile of |x0|, clip)
struct StepLimitsParams {
  StepParams step;
  double quantile;
  float* limits;
};

void philox_normal_cpu(const NormalParams& params);
void philox_normal_cuda(const NormalParams& params, int device, void* stream);
void ddpm_steps_cpu(const StepParams& params);
void ddpm_steps_cuda(const StepParams& params, int device, void* stream);
void ddpm_steps_backward_cpu(const StepBackwardParams& params);
void ddpm_steps_backward_cuda(const StepBackwardParams& params, int device, void* stream);
void ddpm_steps_limits_cpu(const StepLimitsParams& params);
void ddpm_steps_limits_cuda(const StepLimitsParams& params, int device, void* stream);

}  // namespace supy
