// The weights of a diffusion step, from its coefficients in float64: for C++ and CUDA.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SUPY_HOST_DEVICE __host__ __device__
#else
#define SUPY_HOST_DEVICE
#endif

namespace supy {

// Coefficients: (alpha_bar, beta_bar); (alpha, beta, beta_bar, sigma); (alpha_bar, alpha_bar_prev, eta).
enum class StepForm { add_noise, ddpm, ddim };

// out = x * this->x + eps * this->eps + x0 * this->x0 + noise * this->noise, x0 = clip(x * x_to_x0 + eps * eps_to_x0).
struct StepWeights {
  float x, eps, x0, noise, x_to_x0, eps_to_x0;
};

// Each coefficient is a number, or one number a sample in memory that the kernel reads.
struct StepCoefficients {
  StepForm form;
  double scalar[4];
  const void* table[4];  // null: the scalar
  int64_t stride[4];
  bool single[4];  // float32, else float64

  SUPY_HOST_DEVICE double at(int which, int64_t sample) const {
    if (table[which] == nullptr) return scalar[which];
    const int64_t place = sample * stride[which];
    if (single[which]) return static_cast<const float*>(table[which])[place];
    return static_cast<const double*>(table[which])[place];
  }
};

// supy/reference has the formulas with their sources.
SUPY_HOST_DEVICE inline StepWeights step_weights(const StepCoefficients& c, int64_t sample, bool clipped) {
  double x, eps = 0, x0 = 0, noise, alpha_bar = 1, beta_bar = 0;
  if (c.form == StepForm::add_noise) {
    x = c.at(0, sample);
    noise = c.at(1, sample);
  } else if (c.form == StepForm::ddpm) {
    const double alpha = c.at(0, sample), beta = c.at(1, sample);
    beta_bar = c.at(2, sample);
    noise = c.at(3, sample);
    alpha_bar = sqrt((1 - beta_bar) * (1 + beta_bar));
    const double share = beta_bar == 0 ? 1 : beta / beta_bar;
    x = (clipped ? (1 - share) * (1 + share) : 1) / alpha;
    eps = -share * beta / alpha;
    x0 = share * share * alpha_bar / alpha;
  } else {
    alpha_bar = c.at(0, sample);
    const double previous = c.at(1, sample), eta = c.at(2, sample);
    beta_bar = sqrt((1 - alpha_bar) * (1 + alpha_bar));
    const double beta_bar_prev = sqrt((1 - previous) * (1 + previous)), inverse = previous / alpha_bar;
    noise = 0;
    if (eta != 0 && beta_bar_prev != 0)
      noise = beta_bar == 0 ? 0
                            : eta * beta_bar_prev * sqrt((previous - alpha_bar) * (previous + alpha_bar)) /
                                  (previous * beta_bar);
    const double direction = sqrt((beta_bar_prev - noise) * (beta_bar_prev + noise));
    const double share = beta_bar == 0 ? 0 : direction / beta_bar;
    x = clipped ? share : inverse;
    eps = direction - beta_bar * inverse;
    x0 = previous - share * alpha_bar;
  }
  if (!clipped) return {(float)x, (float)eps, 0.0f, (float)noise, 0.0f, 0.0f};
  return {(float)x, 0.0f, (float)x0, (float)noise, (float)(1 / alpha_bar), (float)(-beta_bar / alpha_bar)};
}

}  // namespace supy
