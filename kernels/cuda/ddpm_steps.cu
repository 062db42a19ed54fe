#include "ddpm_steps.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>

#include "cuda.cuh"

namespace supy {
namespace {

#include "philox.inl"

constexpr int THREADS = 256, QUADS = 4;  // a thread takes about so many times four neighbours

// The four values of one block of the stream, read and written at once where VECTOR says that they lie so.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

template <bool VECTOR, typename T>
__device__ __forceinline__ void read4(const void* from, int64_t base, int64_t begin, int64_t size, float out[4]) {
  const T* p = static_cast<const T*>(from) + base + begin;
  if (VECTOR) {
    const Four<T> all = *reinterpret_cast<const Four<T>*>(p);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = static_cast<float>(all.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = begin + i >= 0 && begin + i < size ? static_cast<float>(p[i]) : 0.0f;
  }
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void write4(void* to, int64_t base, int64_t begin, int64_t size, const float in[4]) {
  T* p = static_cast<T*>(to) + base + begin;
  if (VECTOR) {
    Four<T> all;
#pragma unroll
    for (int i = 0; i < 4; ++i) all.value[i] = static_cast<T>(in[i]);
    *reinterpret_cast<Four<T>*>(p) = all;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (begin + i >= 0 && begin + i < size) p[i] = static_cast<T>(in[i]);
  }
}

template <bool VECTOR, typename T>
__global__ void normal_kernel(NormalParams p) {
  const int64_t skipped = p.first % 4, quads = (skipped + p.count + 3) / 4;
  for (int64_t q = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; q < quads;
       q += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    float z[4];
    philox_normal4(p.first / 4 + q, p.seed, z);
    write4<VECTOR, T>(p.out, 0, 4 * q - skipped, p.count, z);
  }
}

// What the threads of a block share of one sample.
struct Sample {
  StepWeights w;
  float limit, scale;
};

// Between two samples the block waits for its slowest thread, before and after the first one looks the sample up.
__device__ __forceinline__ void look_up(Sample& shared, const StepParams& p, const StepWeights& known, bool is_known,
                                        int64_t sample) {
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.w = is_known ? known : step_weights(p.coefficients, sample, p.clipped);
    shared.limit = p.limits == nullptr ? p.clip : p.limits[sample];
    shared.scale = p.limits == nullptr ? 1.0f : p.clip / shared.limit;
  }
  __syncthreads();
}

template <bool VECTOR, typename T>
__global__ void step_kernel(StepParams p, StepWeights known, bool is_known) {
  __shared__ Sample shared;
  for (int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    look_up(shared, p, known, is_known, sample);
    const StepWeights w = shared.w;
    const float limit = shared.limit, x0_weight = w.x0 * shared.scale;
    const int64_t base = sample * p.size, place = p.first + base, skipped = place % 4;
    const int64_t quads = (skipped + p.size + 3) / 4;
    for (int64_t q = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; q < quads;
         q += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      const int64_t begin = 4 * q - skipped;
      float x[4], eps[4] = {}, z[4] = {};
      read4<VECTOR, T>(p.x, base, begin, p.size, x);
      if (p.eps != nullptr) read4<VECTOR, T>(p.eps, base, begin, p.size, eps);
      if (p.noise != nullptr && w.noise != 0) read4<VECTOR, T>(p.noise, base, begin, p.size, z);
      if (p.seeded && (w.noise != 0 || p.made_noise != nullptr)) {
        philox_normal4(place / 4 + q, p.seed, z);
#pragma unroll
        for (int i = 0; i < 4; ++i) z[i] = static_cast<float>(static_cast<T>(z[i]));  // as it is where it is returned
        if (p.made_noise != nullptr) write4<VECTOR, T>(p.made_noise, base, begin, p.size, z);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float sum = x[i] * w.x + eps[i] * w.eps;
        if (p.clipped) {
          float x0 = x[i] * w.x_to_x0 + eps[i] * w.eps_to_x0;
          x0 = x0 > limit ? limit : x0;
          x0 = x0 < -limit ? -limit : x0;
          sum = x[i] * w.x + x0 * x0_weight;
        }
        x[i] = w.noise != 0 ? sum + z[i] * w.noise : sum;
      }
      write4<VECTOR, T>(p.out, base, begin, p.size, x);
    }
  }
}

template <bool VECTOR, typename T>
__global__ void backward_kernel(StepBackwardParams b, StepWeights known, bool is_known) {
  const StepParams& p = b.step;
  __shared__ Sample shared;
  for (int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    look_up(shared, p, known, is_known, sample);
    const StepWeights w = shared.w;
    const float limit = shared.limit, x0_weight = w.x0 * shared.scale;
    const int64_t base = sample * p.size, quads = (p.size + 3) / 4;
    for (int64_t q = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; q < quads;
         q += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      const int64_t begin = 4 * q;
      float grad[4], x[4] = {}, eps[4] = {}, dx[4], deps[4], dnoise[4];
      read4<VECTOR, T>(b.grad, base, begin, p.size, grad);
      if (p.clipped) {
        read4<VECTOR, T>(p.x, base, begin, p.size, x);
        read4<VECTOR, T>(p.eps, base, begin, p.size, eps);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dx[i] = grad[i] * w.x;
        deps[i] = grad[i] * w.eps;
        dnoise[i] = grad[i] * w.noise;
        if (p.clipped) {
          const float x0 = x[i] * w.x_to_x0 + eps[i] * w.eps_to_x0;
          const float through = x0 > limit || x0 < -limit ? 0.0f : grad[i] * x0_weight;
          dx[i] += through * w.x_to_x0;
          deps[i] = through * w.eps_to_x0;
        }
      }
      if (b.dx != nullptr) write4<VECTOR, T>(b.dx, base, begin, p.size, dx);
      if (b.deps != nullptr) write4<VECTOR, T>(b.deps, base, begin, p.size, deps);
      if (b.dnoise != nullptr) write4<VECTOR, T>(b.dnoise, base, begin, p.size, dnoise);
    }
  }
}

template <typename T>
__device__ __forceinline__ int32_t magnitude(const StepParams& p, int64_t i, const StepWeights& w) {
  const float x = static_cast<float>(static_cast<const T*>(p.x)[i]);
  const float eps = static_cast<float>(static_cast<const T*>(p.eps)[i]);
  return bits_as_int(x * w.x_to_x0 + eps * w.eps_to_x0) & 0x7fffffff;
}

// One block a sample: the bits of the wanted |x0| by counting, eight at a time from the highest down. None is stored.
template <typename T>
__global__ void limits_kernel(StepLimitsParams l, StepWeights known, bool is_known) {
  const StepParams& p = l.step;
  __shared__ Sample shared;
  __shared__ unsigned long long counts[256];
  __shared__ int32_t found, above, invalid;
  __shared__ int64_t rank;
  __shared__ bool repeated;
  const double place = l.quantile * static_cast<double>(p.size - 1);
  for (int64_t sample = blockIdx.x; sample < p.samples; sample += gridDim.x) {
    look_up(shared, p, known, is_known, sample);
    const StepWeights w = shared.w;
    const int64_t base = sample * p.size;
    if (threadIdx.x == 0) found = 0, above = 0x7fffffff, invalid = 0, rank = static_cast<int64_t>(place);
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = threadIdx.x; i < 256; i += blockDim.x) counts[i] = 0;
      __syncthreads();
      const int32_t prefix = found;
      for (int64_t i = threadIdx.x; i < p.size; i += blockDim.x) {
        const int32_t bits = magnitude<T>(p, base + i, w);
        if (bits > 0x7f800000) invalid = 1;
        if (shift == 24 || bits >> (shift + 8) == prefix) atomicAdd(&counts[bits >> shift & 255], 1ull);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        int digit = 0;
        int64_t rest = rank;
        while (rest >= static_cast<int64_t>(counts[digit])) rest -= static_cast<int64_t>(counts[digit++]);
        rank = rest;
        found = prefix << 8 | digit;
        repeated = rest + 1 < static_cast<int64_t>(counts[digit]);
      }
      __syncthreads();
    }
    for (int64_t i = threadIdx.x; i < p.size; i += blockDim.x) {
      const int32_t bits = magnitude<T>(p, base + i, w);
      if (bits > found) atomicMin(&above, bits);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const int64_t whole = static_cast<int64_t>(place);
      const double low = bits_as_float(found);
      const double high = repeated || whole + 1 >= p.size ? low : static_cast<double>(bits_as_float(above));
      const double value = place > whole ? low + (high - low) * (place - whole) : low;
      l.limits[sample] = invalid ? nanf("") : value > p.clip ? static_cast<float>(value) : p.clip;
    }
  }
}

bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

int64_t item_size(StepType type) { return type == StepType::f32 ? 4 : 2; }

dim3 grid_of(const StepParams& p) {
  const int64_t quads = (p.size + 6) / 4, samples = p.samples < 65535 ? p.samples : 65535;
  return dim3(grid_for((quads + QUADS - 1) / QUADS, THREADS), static_cast<unsigned int>(samples));
}

}  // namespace

// A launch for each type and for both ways to read.
#define SUPY_LAUNCH_TYPED(kernel, vector, type, grid, queue, ...)                                                   \
  do {                                                                                                              \
    if (type == StepType::f32)                                                                                      \
      vector ? kernel<true, float><<<grid, THREADS, 0, queue>>>(__VA_ARGS__)                                        \
             : kernel<false, float><<<grid, THREADS, 0, queue>>>(__VA_ARGS__);                                      \
    else if (type == StepType::bf16)                                                                                \
      vector ? kernel<true, __nv_bfloat16><<<grid, THREADS, 0, queue>>>(__VA_ARGS__)                                \
             : kernel<false, __nv_bfloat16><<<grid, THREADS, 0, queue>>>(__VA_ARGS__);                              \
    else                                                                                                            \
      vector ? kernel<true, __half><<<grid, THREADS, 0, queue>>>(__VA_ARGS__)                                       \
             : kernel<false, __half><<<grid, THREADS, 0, queue>>>(__VA_ARGS__);                                     \
  } while (0)

void philox_normal_cuda(const NormalParams& p, int device, void* stream) {
  DeviceGuard guard(device, "philox_normal");
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t quads = (p.count + 6) / 4;
  const bool vector = p.first % 4 == 0 && p.count % 4 == 0 && aligned(p.out, 4 * item_size(p.type));
  SUPY_LAUNCH_TYPED(normal_kernel, vector, p.type, grid_for(quads, THREADS), queue, p);
  check_cuda(cudaGetLastError(), "philox_normal");
}

void ddpm_steps_cuda(const StepParams& p, int device, void* stream) {
  DeviceGuard guard(device, "ddpm_steps");
  const auto queue = static_cast<cudaStream_t>(stream);
  bool vector = p.size % 4 == 0 && p.first % 4 == 0;
  for (const void* tensor :
       {p.x, p.eps, p.noise, static_cast<const void*>(p.out), static_cast<const void*>(p.made_noise)})
    vector = vector && aligned(tensor, 4 * item_size(p.type));
  const bool known = p.weights != nullptr;
  SUPY_LAUNCH_TYPED(step_kernel, vector, p.type, grid_of(p), queue, p, known ? *p.weights : StepWeights{}, known);
  check_cuda(cudaGetLastError(), "ddpm_steps");
}

void ddpm_steps_backward_cuda(const StepBackwardParams& b, int device, void* stream) {
  DeviceGuard guard(device, "ddpm_steps_backward");
  const StepParams& p = b.step;
  const auto queue = static_cast<cudaStream_t>(stream);
  bool vector = p.size % 4 == 0;
  for (const void* tensor : {b.grad, p.x, p.eps, static_cast<const void*>(b.dx), static_cast<const void*>(b.deps),
                             static_cast<const void*>(b.dnoise)})
    vector = vector && aligned(tensor, 4 * item_size(p.type));
  const bool known = p.weights != nullptr;
  SUPY_LAUNCH_TYPED(backward_kernel, vector, p.type, grid_of(p), queue, b, known ? *p.weights : StepWeights{}, known);
  check_cuda(cudaGetLastError(), "ddpm_steps_backward");
}

void ddpm_steps_limits_cuda(const StepLimitsParams& l, int device, void* stream) {
  DeviceGuard guard(device, "ddpm_steps_limits");
  const StepParams& p = l.step;
  const auto queue = static_cast<cudaStream_t>(stream);
  const bool known = p.weights != nullptr;
  const StepWeights w = known ? *p.weights : StepWeights{};
  const auto grid = static_cast<unsigned int>(p.samples < 65535 ? p.samples : 65535);
  switch (p.type) {
    case StepType::f32: limits_kernel<float><<<grid, 1024, 0, queue>>>(l, w, known); break;
    case StepType::bf16: limits_kernel<__nv_bfloat16><<<grid, 1024, 0, queue>>>(l, w, known); break;
    case StepType::f16: limits_kernel<__half><<<grid, 1024, 0, queue>>>(l, w, known); break;
  }
  check_cuda(cudaGetLastError(), "ddpm_steps_limits");
}

}  // namespace supy
