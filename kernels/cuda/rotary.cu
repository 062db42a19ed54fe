#include "rotary.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda.cuh"

namespace supy {
namespace {

// One thread a pair; neighbouring threads take neighbouring pairs, so loads coalesce in both layouts.
template <typename T>
__global__ void rotary_kernel(RotaryParams p, int64_t pairs) {
  const int64_t half = p.dim / 2;
  const int64_t pair = p.interleaved ? 1 : half, step = p.interleaved ? 2 : 1;
  const float sign = p.inverse ? -1.0f : 1.0f;
  for (int64_t n = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; n < pairs;
       n += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t i = n % half, row = n / half;
    const int64_t i2 = row % p.size[2], i1 = row / p.size[2] % p.size[1], i0 = row / p.size[2] / p.size[1];
    const T* x = static_cast<const T*>(p.x) + i0 * p.x_stride[0] + i1 * p.x_stride[1] + i2 * p.x_stride[2];
    T* out = static_cast<T*>(p.out) + i0 * p.out_stride[0] + i1 * p.out_stride[1] + i2 * p.out_stride[2];
    const int64_t t =
        i0 * p.table_stride[0] + i1 * p.table_stride[1] + i2 * p.table_stride[2] + i * p.table_stride[3];
    const float a = static_cast<float>(x[i * step * p.x_stride[3]]);
    const float b = static_cast<float>(x[(i * step + pair) * p.x_stride[3]]);
    const float cosine = p.cosine[t], sine = sign * p.sine[t];
    out[i * step * p.out_stride[3]] = static_cast<T>(a * cosine - b * sine);
    out[(i * step + pair) * p.out_stride[3]] = static_cast<T>(b * cosine + a * sine);
  }
}

}  // namespace

void rotary_cuda(const RotaryParams& p, int device, void* stream) {
  DeviceGuard guard(device, "rotary");
  const int64_t pairs = p.size[0] * p.size[1] * p.size[2] * (p.dim / 2);
  constexpr int threads = 256;
  const auto grid = grid_for(pairs, threads);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (p.type) {
    case RotaryType::f32: rotary_kernel<float><<<grid, threads, 0, queue>>>(p, pairs); break;
    case RotaryType::bf16: rotary_kernel<__nv_bfloat16><<<grid, threads, 0, queue>>>(p, pairs); break;
    case RotaryType::f16: rotary_kernel<__half><<<grid, threads, 0, queue>>>(p, pairs); break;
  }
  check_cuda(cudaGetLastError(), "rotary");
}

}  // namespace supy
