// The sum of a residual branch, normalised: what a kernel is given. Every tensor is contiguous.
#pragma once
#include <cstdint>

namespace supy {

enum class NormType { f32, bf16, f16 };

// [width], or no tensor.
struct NormVector {
  const void* data;
  NormType type;
};

// z = alpha x + branch * factor over [rows, width]; out = z normalised * weight + bias.
struct DeepNormParams {
  const void* x;
  const void* branch;
  void* out;
  float* rstd;  // CPU only: [rows], where to keep 1 / sqrt(variance + eps), or null
  float* mean;  // CPU only: [rows], where to keep the mean, beside rstd, or null
  NormType type;  // of these three
  NormVector weight, bias;
  int64_t rows, width;
  float alpha;
  const float* device_alpha;  // CUDA only: where alpha is, or null
  float eps;
  bool rms;
  // The factor is 0 where the word of an element, of stream `seed` from number `first` on, is less than the threshold,
  // and `scale` elsewhere; 1 without dropout.
  bool dropout;
  uint32_t threshold;
  float scale;
  int64_t seed, first;
  const int64_t* device_seed;  // CUDA only: where the seed is, or null
};

// The gradients, each null where not wanted; dweight and dbias have the types of weight and bias, or that of x.
struct DeepNormBackwardParams {
  DeepNormParams norm;
  const void* grad;
  bool from_out;  // CPU only, float32: out and rstd are read instead of x and branch, which are not there
  void *dx, *dbranch, *dweight, *dbias;
  NormType weight_type, bias_type;
  float* partial;  // CUDA only: [2, deep_norm_partials(rows), width], or null where neither is wanted
};

// Whether out, in float32, tells what was normalised nearly as well as x and branch: no weight is so small beside its
// bias that it is lost in their sum.
bool deep_norm_invertible(const DeepNormParams& params);

// How many sums of some of the rows each of dweight and dbias is added up from in GPU memory; no more than that much
// memory, and no fewer than keep a GPU busy.
inline int64_t deep_norm_partials(int64_t rows) {
  const int64_t sixteenth = (rows + 15) / 16;
  return sixteenth < 528 ? sixteenth : 528;
}

void deep_norm_cpu(const DeepNormParams& params);
void deep_norm_cuda(const DeepNormParams& params, int device, void* stream);
void deep_norm_backward_cpu(const DeepNormBackwardParams& params);
void deep_norm_backward_cuda(const DeepNormBackwardParams& params, int device, void* stream);

}  // namespace supy
