#include "ddpm_steps.h"

#include <cmath>
#include <cstring>

#include "cache.h"
#include "parallel.h"
#include "simd.h"

#define SUPY_KERNEL "ddpm_steps.inl"
#include "multitarget.h"

namespace supy {
namespace {

constexpr int64_t GRAIN = 8192;  // values worth a thread of their own

int64_t item_size(StepType type) { return type == StepType::f32 ? 4 : 2; }

}  // namespace

void philox_normal_cpu(const NormalParams& p) {
  const bool stream = p.count * item_size(p.type) > cache_bytes();
  SUPY_SELECT(philox_normal, p, threads_for(p.count, GRAIN), stream);
}

void ddpm_steps_cpu(const StepParams& p) {
  const int64_t total = p.samples * p.size;
  const int tensors = 2 + (p.eps != nullptr) + (p.noise != nullptr) + (p.made_noise != nullptr);
  const bool in_place = p.out == p.x || p.out == p.eps || p.out == p.noise;
  const bool stream = !in_place && tensors * total * item_size(p.type) > cache_bytes();
  SUPY_SELECT(ddpm_steps, p, threads_for(total, GRAIN), stream);
}

void ddpm_steps_backward_cpu(const StepBackwardParams& p) {
  SUPY_SELECT(ddpm_steps_backward, p, threads_for(p.step.samples * p.step.size, GRAIN));
}

void ddpm_steps_limits_cpu(const StepLimitsParams& p) {
  SUPY_SELECT(ddpm_steps_limits, p, threads_for(p.step.samples * p.step.size, GRAIN));
}

}  // namespace supy
