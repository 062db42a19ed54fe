// Rotary position embedding: what a kernel is given. Strides are in elements.
#pragma once
#include <cstdint>

namespace supy {

enum class RotaryType { f32, bf16, f16 };

// x and out are [n0, n1, n2, dim]; cosine and sine are float32 [n0, n1, n2, dim / 2], often with stride 0.
struct RotaryParams {
  const void* x;
  const float* cosine;
  const float* sine;
  void* out;
  RotaryType type;
  int64_t size[3];
  int64_t dim;
  int64_t x_stride[4];
  int64_t table_stride[4];
  int64_t out_stride[4];
  bool interleaved;  // pairs (2i, 2i + 1), else (i, i + dim / 2)
  bool inverse;      // rotate by the negative angle: the gradient
};

void rotary_cpu(const RotaryParams& params);
void rotary_cuda(const RotaryParams& params, int device, void* stream);

}  // namespace supy
