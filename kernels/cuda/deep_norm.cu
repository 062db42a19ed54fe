#include "deep_norm.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>

#include "cuda.cuh"

namespace supy {
namespace {

#include "philox.inl"

// A row belongs to G threads, a warp or a block, each of which keeps N times 16 bytes of it in registers.
template <class T>
struct alignas(16) Pack {
  static constexpr int SIZE = 16 / sizeof(T);
  T value[SIZE];
};

template <class T>
__device__ __forceinline__ void read_pack(const T* from, float* out) {
  const Pack<T> all = *reinterpret_cast<const Pack<T>*>(from);
#pragma unroll
  for (int i = 0; i < Pack<T>::SIZE; ++i) out[i] = static_cast<float>(all.value[i]);
}
template <class T>
__device__ __forceinline__ void write_pack(T* to, const float* in) {
  Pack<T> all;
#pragma unroll
  for (int i = 0; i < Pack<T>::SIZE; ++i) all.value[i] = static_cast<T>(in[i]);
  *reinterpret_cast<Pack<T>*>(to) = all;
}

__device__ __forceinline__ float element(const void* data, NormType type, int64_t i) {
  switch (type) {
    case NormType::f32: return static_cast<const float*>(data)[i];
    case NormType::bf16: return static_cast<float>(static_cast<const __nv_bfloat16*>(data)[i]);
    default: return static_cast<float>(static_cast<const __half*>(data)[i]);
  }
}
__device__ __forceinline__ float element(const NormVector& v, int64_t i, float otherwise) {
  return v.data == nullptr ? otherwise : element(v.data, v.type, i);
}

// Weight or bias of as many columns as a pack of T has; of type T or float32.
template <class T>
__device__ __forceinline__ void read_columns(const NormVector& v, int64_t column, float otherwise, float* out) {
  constexpr int SIZE = Pack<T>::SIZE;
  if (v.data == nullptr) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) out[i] = otherwise;
  } else if (v.type == NormType::f32) {
#pragma unroll
    for (int i = 0; i < SIZE; i += 4) read_pack(static_cast<const float*>(v.data) + column + i, out + i);
  } else {
    read_pack(static_cast<const T*>(v.data) + column, out);
  }
}

// What kernels read of alpha and the dropout, which may be in GPU memory.
struct Mixture {
  float alpha, scale;
  int64_t seed;
  uint64_t first;
  uint32_t threshold;
  bool dropout;

  __device__ explicit Mixture(const DeepNormParams& p)
      : alpha(p.device_alpha == nullptr ? p.alpha : *p.device_alpha),
        scale(p.scale),
        seed(p.device_seed == nullptr ? p.seed : *p.device_seed),
        first(p.first),
        threshold(p.threshold),
        dropout(p.dropout) {}

  // The factors of COUNT elements, a multiple of four, from element `place` on.
  template <int COUNT>
  __device__ __forceinline__ void factors(int64_t place, float* out) const {
    const uint64_t number = first + place;
    const int skipped = number % 4;
    uint32_t words[8];
    philox(number / 4, seed, words + 4);
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
#pragma unroll
      for (int k = 0; k < 4; ++k) words[k] = words[4 + k];
      if (i + 4 < COUNT || skipped != 0) philox(number / 4 + i / 4 + 1, seed, words + 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t early = skipped == 0 ? words[k] : words[k + 1];
        const uint32_t late = skipped == 2 ? words[k + 2] : words[k + 3];
        const uint32_t word = skipped < 2 ? early : late;
        out[i + k] = word >= threshold ? scale : 0.0f;
      }
    }
  }
  __device__ __forceinline__ float factor(int64_t place) const {
    if (!dropout) return 1.0f;
    const uint64_t number = first + place;
    uint32_t w[4];
    philox(number / 4, seed, w);
    const int which = number % 4;
    const uint32_t word = which == 0 ? w[0] : which == 1 ? w[1] : which == 2 ? w[2] : w[3];
    return word >= threshold ? scale : 0.0f;
  }
};

// The sums of COUNT numbers over G threads, in an order that is always the same, known to all of them.
template <int G>
struct Group {
  float (*shared)[4][G / 32];  // two buffers in turn, so that one wait is enough
  int turn = 0;

  template <int COUNT>
  __device__ __forceinline__ void sum(float* values) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
#pragma unroll
      for (int i = 0; i < COUNT; ++i) values[i] += __shfl_xor_sync(0xffffffff, values[i], step);
    if (G == 32) return;
    float(*buffer)[G / 32] = shared[turn];
    turn ^= 1;
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int i = 0; i < COUNT; ++i) buffer[i][threadIdx.x / 32] = values[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      values[i] = buffer[i][0];
#pragma unroll
      for (int w = 1; w < G / 32; ++w) values[i] += buffer[i][w];
    }
  }
};
#define SUPY_GROUP(G)                        \
  __shared__ float between[2][4][(G) / 32]; \
  Group<G> group{between}

constexpr int WARPS = 4;  // rows of a block whose rows belong to warps
template <int G>
constexpr int THREADS = G == 32 ? 32 * WARPS : G;

// Deviation from the mean and 1 / sqrt(variance + eps), as the CPU kernel has it; z becomes z - mean.
struct Spread {
  float rest, rstd;
  __device__ __forceinline__ Spread(float sum, float squares, float width, float eps) : rest(sum / width) {
    const float variance = squares / width - rest * rest;
    rstd = 1.0f / sqrtf((variance > 0 ? variance : variance != variance ? variance : 0) + eps);
  }
};

template <class T, int G, int N>
__device__ __forceinline__ void read_row(const DeepNormParams& p, const Mixture& mix, int64_t row, int lane, float* z) {
  constexpr int SIZE = Pack<T>::SIZE;
  const int64_t base = row * p.width;
  float branch[N * SIZE];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t column = static_cast<int64_t>(lane + n * G) * SIZE;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) z[n * SIZE + i] = branch[n * SIZE + i] = 0;
    if (column < p.width) {
      read_pack(static_cast<const T*>(p.x) + base + column, z + n * SIZE);
      read_pack(static_cast<const T*>(p.branch) + base + column, branch + n * SIZE);
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float factors[SIZE];
    if (mix.dropout) mix.factors<SIZE>(base + static_cast<int64_t>(lane + n * G) * SIZE, factors);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const float b = branch[n * SIZE + i];
      z[n * SIZE + i] = z[n * SIZE + i] * mix.alpha + (mix.dropout ? b * factors[i] : b);
    }
  }
}

// z - mean where this thread has columns, 0 elsewhere.
template <class T, int G, int N>
__device__ __forceinline__ void centre(const DeepNormParams& p, Group<G>& group, int lane, float* z) {
  constexpr int SIZE = Pack<T>::SIZE;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N * SIZE; ++i) sum += z[i];
  group.template sum<1>(&sum);
  const float mean = sum / p.width;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const bool inside = static_cast<int64_t>(lane + n * G) * SIZE < p.width;
      z[n * SIZE + i] = inside ? z[n * SIZE + i] - mean : 0;
    }
}

template <class T, int G, int N>
__global__ __launch_bounds__(THREADS<G>) void forward_kernel(DeepNormParams p) {
  constexpr int SIZE = Pack<T>::SIZE;
  SUPY_GROUP(G);
  const int lane = threadIdx.x % G;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (THREADS<G> / G) + threadIdx.x / G;
  if (row >= p.rows) return;
  const Mixture mix(p);
  float z[N * SIZE];
  read_row<T, G, N>(p, mix, row, lane, z);
  if (!p.rms) centre<T, G, N>(p, group, lane, z);
  float sums[2] = {};
#pragma unroll
  for (int i = 0; i < N * SIZE; ++i) {
    sums[0] += z[i];
    sums[1] += z[i] * z[i];
  }
  group.template sum<2>(sums);
  const Spread spread(p.rms ? 0 : sums[0], sums[1], p.width, p.eps);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t column = static_cast<int64_t>(lane + n * G) * SIZE;
    if (column >= p.width) continue;
    float weight[SIZE], bias[SIZE], out[SIZE];
    read_columns<T>(p.weight, column, 1, weight);
    read_columns<T>(p.bias, column, 0, bias);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) out[i] = (z[n * SIZE + i] - spread.rest) * spread.rstd * weight[i] + bias[i];
    write_pack(static_cast<T*>(p.out) + row * p.width + column, out);
  }
}

// A group takes rows blockIdx.x, blockIdx.x + gridDim.x, ..., always the same columns of them, and keeps their sums.
template <class T, int G, int N>
__global__ __launch_bounds__(G) void backward_kernel(DeepNormBackwardParams b) {
  constexpr int SIZE = Pack<T>::SIZE;
  const DeepNormParams& p = b.norm;
  SUPY_GROUP(G);
  const int lane = threadIdx.x;
  const Mixture mix(p);
  float dweight[N * SIZE] = {}, dbias[N * SIZE] = {};
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int64_t base = row * p.width;
    float z[N * SIZE], grad[N * SIZE];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t column = static_cast<int64_t>(lane + n * G) * SIZE;
#pragma unroll
      for (int i = 0; i < SIZE; ++i) grad[n * SIZE + i] = 0;
      if (column < p.width) read_pack(static_cast<const T*>(b.grad) + base + column, grad + n * SIZE);
    }
    read_row<T, G, N>(p, mix, row, lane, z);
    if (!p.rms) centre<T, G, N>(p, group, lane, z);
    float sums[4] = {};
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t column = static_cast<int64_t>(lane + n * G) * SIZE;
      if (column >= p.width) continue;
      float weight[SIZE];
      read_columns<T>(p.weight, column, 1, weight);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        const float d = z[n * SIZE + i], slope = grad[n * SIZE + i] * weight[i];
        sums[0] += d;
        sums[1] += d * d;
        sums[2] += slope;
        sums[3] += slope * d;
      }
    }
    group.template sum<4>(sums);
    const float width = p.width;
    const Spread spread(p.rms ? 0 : sums[0], sums[1], width, p.eps);
    const float slope = p.rms ? 0 : sums[2] / width;
    const float product = (sums[3] / width - spread.rest * slope) * spread.rstd;
    const float factor = !p.rms && p.width == 1 ? 0 : spread.rstd;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t column = static_cast<int64_t>(lane + n * G) * SIZE;
      if (column >= p.width) continue;
      float weight[SIZE], dz[SIZE], factors[SIZE];
      read_columns<T>(p.weight, column, 1, weight);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        const float g = grad[n * SIZE + i], normalised = (z[n * SIZE + i] - spread.rest) * spread.rstd;
        dz[i] = (g * weight[i] - slope - normalised * product) * factor;
        dbias[n * SIZE + i] += g;
        dweight[n * SIZE + i] += g * normalised;
      }
      if (mix.dropout) mix.factors<SIZE>(base + column, factors);
      float out[SIZE];
#pragma unroll
      for (int i = 0; i < SIZE; ++i) out[i] = mix.dropout ? dz[i] * factors[i] : dz[i];
      if (b.dbranch != nullptr) write_pack(static_cast<T*>(b.dbranch) + base + column, out);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) out[i] = dz[i] * mix.alpha;
      if (b.dx != nullptr) write_pack(static_cast<T*>(b.dx) + base + column, out);
    }
  }
  if (b.partial == nullptr) return;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t column = static_cast<int64_t>(lane + n * G) * SIZE;
    if (column >= p.width) continue;
    float* bias_sum = b.partial + blockIdx.x * p.width + column;
    float* weight_sum = bias_sum + gridDim.x * p.width;
#pragma unroll
    for (int i = 0; i < SIZE; i += 4) {
      write_pack(bias_sum + i, dbias + n * SIZE + i);
      write_pack(weight_sum + i, dweight + n * SIZE + i);
    }
  }
}

// Any width and alignment: a block a row, which reads the row anew each time.
constexpr int ANY = 256;

template <class T>
struct AnyRow {
  const DeepNormParams& p;
  const Mixture mix;
  int64_t base;
  __device__ __forceinline__ float operator()(int64_t i) const {
    const float b = static_cast<float>(static_cast<const T*>(p.branch)[base + i]);
    return static_cast<float>(static_cast<const T*>(p.x)[base + i]) * mix.alpha + b * mix.factor(base + i);
  }
  __device__ __forceinline__ float mean(Group<ANY>& group) const {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < p.width; i += ANY) sum += (*this)(i);
    group.sum<1>(&sum);
    return p.rms ? 0 : sum / p.width;
  }
};

template <class T>
__global__ __launch_bounds__(ANY) void forward_any_kernel(DeepNormParams p) {
  SUPY_GROUP(ANY);
  const AnyRow<T> z{p, Mixture(p), blockIdx.x * p.width};
  const float mean = z.mean(group);
  float sums[2] = {};
  for (int64_t i = threadIdx.x; i < p.width; i += ANY) {
    const float d = z(i) - mean;
    sums[0] += d;
    sums[1] += d * d;
  }
  group.sum<2>(sums);
  const Spread spread(p.rms ? 0 : sums[0], sums[1], p.width, p.eps);
  for (int64_t i = threadIdx.x; i < p.width; i += ANY)
    static_cast<T*>(p.out)[z.base + i] = static_cast<T>(
        (z(i) - mean - spread.rest) * spread.rstd * element(p.weight, i, 1) + element(p.bias, i, 0));
}

template <class T>
__global__ __launch_bounds__(ANY) void backward_any_kernel(DeepNormBackwardParams b) {
  const DeepNormParams& p = b.norm;
  SUPY_GROUP(ANY);
  const T* grad = static_cast<const T*>(b.grad);
  float* bias_sum = b.partial == nullptr ? nullptr : b.partial + blockIdx.x * p.width;
  float* weight_sum = b.partial == nullptr ? nullptr : bias_sum + gridDim.x * p.width;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const AnyRow<T> z{p, Mixture(p), row * p.width};
    const float mean = z.mean(group);
    float sums[4] = {};
    for (int64_t i = threadIdx.x; i < p.width; i += ANY) {
      const float d = z(i) - mean, slope = static_cast<float>(grad[z.base + i]) * element(p.weight, i, 1);
      sums[0] += d;
      sums[1] += d * d;
      sums[2] += slope;
      sums[3] += slope * d;
    }
    group.sum<4>(sums);
    const float width = p.width;
    const Spread spread(p.rms ? 0 : sums[0], sums[1], width, p.eps);
    const float slope = p.rms ? 0 : sums[2] / width;
    const float product = (sums[3] / width - spread.rest * slope) * spread.rstd;
    const float factor = !p.rms && p.width == 1 ? 0 : spread.rstd;
    for (int64_t i = threadIdx.x; i < p.width; i += ANY) {
      const float g = static_cast<float>(grad[z.base + i]), normalised = (z(i) - mean - spread.rest) * spread.rstd;
      const float dz = (g * element(p.weight, i, 1) - slope - normalised * product) * factor;
      if (b.dx != nullptr) static_cast<T*>(b.dx)[z.base + i] = static_cast<T>(dz * z.mix.alpha);
      if (b.dbranch != nullptr) static_cast<T*>(b.dbranch)[z.base + i] = static_cast<T>(dz * z.mix.factor(z.base + i));
      if (b.partial == nullptr) continue;
      const bool begins = row == blockIdx.x;
      bias_sum[i] = (begins ? 0 : bias_sum[i]) + g;
      weight_sum[i] = (begins ? 0 : weight_sum[i]) + g * normalised;
    }
  }
}

// Adds up the partial sums of 32 columns, which 32 threads each take in turn.
__global__ __launch_bounds__(1024) void add_partials_kernel(const float* partial, int64_t count, int64_t width,
                                                            void* dbias, NormType bias_type, void* dweight,
                                                            NormType weight_type) {
  __shared__ float sums[32][33];
  const bool weights = blockIdx.y != 0;
  void* out = weights ? dweight : dbias;
  const NormType type = weights ? weight_type : bias_type;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  if (out == nullptr) return;
  if (weights) partial += count * width;
  float sum = 0;
  if (column < width)
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < count; row += 32) sum += partial[row * width + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  sum = sums[threadIdx.x][threadIdx.y];  // a warp now has one column
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.y;
  if (threadIdx.x != 0 || at >= width) return;
  if (type == NormType::f32)
    static_cast<float*>(out)[at] = sum;
  else if (type == NormType::bf16)
    static_cast<__nv_bfloat16*>(out)[at] = static_cast<__nv_bfloat16>(sum);
  else
    static_cast<__half*>(out)[at] = static_cast<__half>(sum);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool in_packs(const DeepNormParams& p) {
  const int64_t size = p.type == NormType::f32 ? 4 : 8;
  return p.width % size == 0 && p.width <= 8192 && aligned(p.x) && aligned(p.branch) && aligned(p.out) &&
         aligned(p.weight.data) && aligned(p.bias.data);
}

// call<T, threads of a row, packs of a thread>(): 8 numbers a thread, or 16, in as few threads as will do.
template <class T, template <class, int, int> class Call, class Params>
void launch_packs(int64_t width, const Params& params, cudaStream_t queue) {
  constexpr int N = 16 / Pack<T>::SIZE;
  if (width <= 256)
    Call<T, 32, N / 2>::launch(params, queue);
  else if (width <= 512)
    Call<T, 32, N>::launch(params, queue);
  else if (width <= 1024)
    Call<T, 64, N>::launch(params, queue);
  else if (width <= 2048)
    Call<T, 128, N>::launch(params, queue);
  else if (width <= 4096)
    Call<T, 256, N>::launch(params, queue);
  else
    Call<T, 512, N>::launch(params, queue);
}

template <class T, int G, int N>
struct Forward {
  static void launch(const DeepNormParams& p, cudaStream_t queue) {
    const int64_t rows = THREADS<G> / G;
    forward_kernel<T, G, N><<<static_cast<unsigned int>((p.rows + rows - 1) / rows), THREADS<G>, 0, queue>>>(p);
  }
};
template <class T, int G, int N>
struct Backward {
  static void launch(const DeepNormBackwardParams& b, cudaStream_t queue) {
    const auto blocks = static_cast<unsigned int>(deep_norm_partials(b.norm.rows));
    backward_kernel<T, G, N><<<blocks, G, 0, queue>>>(b);
  }
};

template <class T>
void forward_typed(const DeepNormParams& p, cudaStream_t queue) {
  if (in_packs(p))
    launch_packs<T, Forward>(p.width, p, queue);
  else
    forward_any_kernel<T><<<static_cast<unsigned int>(p.rows), ANY, 0, queue>>>(p);
}

template <class T>
void backward_typed(const DeepNormBackwardParams& b, cudaStream_t queue) {
  if (in_packs(b.norm) && aligned(b.grad) && aligned(b.dx) && aligned(b.dbranch))
    launch_packs<T, Backward>(b.norm.width, b, queue);
  else
    backward_any_kernel<T><<<static_cast<unsigned int>(deep_norm_partials(b.norm.rows)), ANY, 0, queue>>>(b);
}

}  // namespace

void deep_norm_cuda(const DeepNormParams& p, int device, void* stream) {
  DeviceGuard guard(device, "deep_norm");
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (p.type) {
    case NormType::f32: forward_typed<float>(p, queue); break;
    case NormType::bf16: forward_typed<__nv_bfloat16>(p, queue); break;
    case NormType::f16: forward_typed<__half>(p, queue); break;
  }
  check_cuda(cudaGetLastError(), "deep_norm");
}

void deep_norm_backward_cuda(const DeepNormBackwardParams& b, int device, void* stream) {
  DeviceGuard guard(device, "deep_norm_backward");
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (b.norm.type) {
    case NormType::f32: backward_typed<float>(b, queue); break;
    case NormType::bf16: backward_typed<__nv_bfloat16>(b, queue); break;
    case NormType::f16: backward_typed<__half>(b, queue); break;
  }
  check_cuda(cudaGetLastError(), "deep_norm_backward");
  if (b.partial == nullptr) return;
  const dim3 grid(static_cast<unsigned int>((b.norm.width + 31) / 32), 2), block(32, 32);
  add_partials_kernel<<<grid, block, 0, queue>>>(b.partial, deep_norm_partials(b.norm.rows), b.norm.width, b.dbias,
                                                 b.bias_type, b.dweight, b.weight_type);
  check_cuda(cudaGetLastError(), "deep_norm_backward");
}

}  // namespace supy
