#include "ddpm_steps.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <string>

#include "parallel.h"
#include "simd.h"

#define SUPY_KERNEL "ddpm_steps.inl"
#include "multitarget.h"

namespace supy {
namespace {

constexpr int64_t GRAIN = 8192;  // values worth a thread of their own

int64_t item_size(StepType type) { return type == StepType::f32 ? 4 : 2; }

// The last level's size as the system tells it of one processor: sysconf counts the whole machine of a guest.
int64_t cache_bytes() {
  static const int64_t bytes = [] {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    std::string text;
    int64_t found = 32 << 20;
    if (file >> text && text.back() == 'K') found = std::atoll(text.c_str()) * 1024;
    return found;
  }();
  return bytes;
}

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
