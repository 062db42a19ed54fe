#include "rotary.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda.cuh"

namespace supy {
namespace {

constexpr int THREADS = 256;

template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T value[N];
};

template <int N>
__device__ __forceinline__ void read_table(const float* from, float out[N]) {
  const Pack<float, N> all = *reinterpret_cast<const Pack<float, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = all.value[i];
}

// A block takes blockDim.y rows at a time, its threads along x the pairs of a row: VECTOR reads 16 bytes of features at once,
// which are neighbours then. Divisions are of rows alone, and in 32 bits where rows can be counted so: they would cost more
// than the memory.
template <typename T, bool VECTOR, bool INTERLEAVED>
__global__ void __launch_bounds__(THREADS) rotary_kernel(RotaryParams p, int64_t rows, int64_t chunks) {
  constexpr int WIDTH = VECTOR ? 16 / sizeof(T) : 1;
  constexpr int PAIRS = VECTOR && INTERLEAVED ? WIDTH / 2 : WIDTH;
  using Features = Pack<T, WIDTH>;
  const int64_t half = p.dim / 2;
  const float sign = p.inverse ? -1.0f : 1.0f;
  const bool small = rows <= UINT32_MAX;
  for (int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y; row < rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const auto divided = [small](int64_t n, int64_t by) {
      return small ? static_cast<int64_t>(static_cast<uint32_t>(n) / static_cast<uint32_t>(by)) : n / by;
    };
    const int64_t above = divided(row, p.size[2]), i2 = row - above * p.size[2];
    const int64_t i0 = divided(above, p.size[1]), i1 = above - i0 * p.size[1];
    const T* x = static_cast<const T*>(p.x) + i0 * p.x_stride[0] + i1 * p.x_stride[1] + i2 * p.x_stride[2];
    T* out = static_cast<T*>(p.out) + i0 * p.out_stride[0] + i1 * p.out_stride[1] + i2 * p.out_stride[2];
    const int64_t table = i0 * p.table_stride[0] + i1 * p.table_stride[1] + i2 * p.table_stride[2];
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
      float a[PAIRS], b[PAIRS], cosine[PAIRS], sine[PAIRS];
      const int64_t first = chunk * WIDTH;
      if (VECTOR) {
        read_table<PAIRS>(p.cosine + table + chunk * PAIRS, cosine);
        read_table<PAIRS>(p.sine + table + chunk * PAIRS, sine);
        const Features front = *reinterpret_cast<const Features*>(x + first);
        const Features back = INTERLEAVED ? front : *reinterpret_cast<const Features*>(x + half + first);
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
          a[i] = static_cast<float>(front.value[INTERLEAVED ? 2 * i : i]);
          b[i] = static_cast<float>(back.value[INTERLEAVED ? 2 * i + 1 : i]);
        }
      } else {
        cosine[0] = p.cosine[table + chunk * p.table_stride[3]];
        sine[0] = p.sine[table + chunk * p.table_stride[3]];
        a[0] = static_cast<float>(x[(INTERLEAVED ? 2 * chunk : chunk) * p.x_stride[3]]);
        b[0] = static_cast<float>(x[(INTERLEAVED ? 2 * chunk + 1 : chunk + half) * p.x_stride[3]]);
      }
#pragma unroll
      for (int i = 0; i < PAIRS; ++i) {
        const float turned = sign * sine[i], old = a[i];
        a[i] = old * cosine[i] - b[i] * turned;
        b[i] = b[i] * cosine[i] + old * turned;
      }
      if (VECTOR) {
        Features front, back;
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
          front.value[INTERLEAVED ? 2 * i : i] = static_cast<T>(a[i]);
          (INTERLEAVED ? front : back).value[INTERLEAVED ? 2 * i + 1 : i] = static_cast<T>(b[i]);
        }
        *reinterpret_cast<Features*>(out + first) = front;
        if (!INTERLEAVED) *reinterpret_cast<Features*>(out + half + first) = back;
      } else {
        out[(INTERLEAVED ? 2 * chunk : chunk) * p.out_stride[3]] = static_cast<T>(a[0]);
        out[(INTERLEAVED ? 2 * chunk + 1 : chunk + half) * p.out_stride[3]] = static_cast<T>(b[0]);
      }
    }
  }
}

// Whether every row begins at a multiple of `unit` elements of `bytes` bytes in all, with its elements side by side.
bool aligned(const void* data, const int64_t stride[4], const int64_t size[3], int64_t unit, int64_t bytes) {
  if (stride[3] != 1 || reinterpret_cast<uintptr_t>(data) % bytes != 0) return false;
  for (int i = 0; i < 3; ++i)
    if (size[i] > 1 && stride[i] % unit != 0) return false;
  return true;
}

template <typename T, bool INTERLEAVED>
void launch(const RotaryParams& p, cudaStream_t queue) {
  constexpr int64_t width = 16 / sizeof(T), pairs = INTERLEAVED ? width / 2 : width, floats = pairs < 4 ? pairs : 4;
  const int64_t half = p.dim / 2, rows = p.size[0] * p.size[1] * p.size[2];
  const bool vector = half % pairs == 0 && aligned(p.x, p.x_stride, p.size, width, 16) &&
                      aligned(p.out, p.out_stride, p.size, width, 16) &&
                      aligned(p.cosine, p.table_stride, p.size, floats, 4 * floats) &&
                      aligned(p.sine, p.table_stride, p.size, floats, 4 * floats);
  const int64_t chunks = vector ? half / pairs : half;
  unsigned int along = 1;
  while (along < chunks && along < THREADS) along *= 2;
  const dim3 block(along, THREADS / along);
  const auto grid = grid_for(rows, static_cast<int>(block.y));
  if (vector) rotary_kernel<T, true, INTERLEAVED><<<grid, block, 0, queue>>>(p, rows, chunks);
  else rotary_kernel<T, false, INTERLEAVED><<<grid, block, 0, queue>>>(p, rows, chunks);
}

template <typename T>
void launch(const RotaryParams& p, cudaStream_t queue) {
  p.interleaved ? launch<T, true>(p, queue) : launch<T, false>(p, queue);
}

}  // namespace

void rotary_cuda(const RotaryParams& p, int device, void* stream) {
  DeviceGuard guard(device, "rotary");
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (p.type) {
    case RotaryType::f32: launch<float>(p, queue); break;
    case RotaryType::bf16: launch<__nv_bfloat16>(p, queue); break;
    case RotaryType::f16: launch<__half>(p, queue); break;
  }
  check_cuda(cudaGetLastError(), "rotary");
}

}  // namespace supy
