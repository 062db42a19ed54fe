#include "deep_norm.h"

#include <cmath>
#include <cstring>

#include "cache.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace supy {
namespace {

constexpr int64_t LONGEST = 16;  // numbers of a vector

// Numbers of a row in whole vectors of any instruction set.
int64_t padded_row(int64_t width) { return (width + LONGEST - 1) / LONGEST * LONGEST; }

// Floats to work in for a row: its sum, and what factors draw_factors makes.
int64_t work_of(const DeepNormParams& p) {
  return padded_row(p.width) * (p.dropout ? 2 : 1) + (p.dropout ? 8 * LONGEST : 0);
}

constexpr int64_t GROUP_ROWS = 4;  // that go backward together where the output is enough

}  // namespace
}  // namespace supy

#define SUPY_KERNEL "deep_norm.inl"
#include "multitarget.h"

namespace supy {
namespace {

constexpr int64_t GRAIN = 16384;  // elements worth a thread of their own
constexpr int64_t CHUNKS = 64;    // of rows, at the most, each with sums of its own: threads do not change them

int64_t item_size(NormType type) { return type == NormType::f32 ? 4 : 2; }

// Weight or bias as float32: the tensor itself, or a copy at `copy`.
const float* floats(const NormVector& v, float value, float* copy, int64_t width) {
  if (v.data != nullptr && v.type == NormType::f32) return static_cast<const float*>(v.data);
  [&] { SUPY_SELECT(as_floats, v, value, copy, width); }();
  return copy;
}

}  // namespace

bool deep_norm_invertible(const DeepNormParams& p) {
  if (p.type != NormType::f32) return false;
  const auto *weight = static_cast<const float*>(p.weight.data), *bias = static_cast<const float*>(p.bias.data);
  bool fits = true;
  for (int64_t i = 0; i < p.width; ++i) {
    const float w = weight == nullptr ? 1.0f : std::fabs(weight[i]), c = bias == nullptr ? 0.0f : std::fabs(bias[i]);
    fits &= w >= 1e-12f && w <= 1e12f && c <= 4 * w;
  }
  return fits;
}

void deep_norm_cpu(const DeepNormParams& p) {
  const int64_t total = p.rows * p.width, chunk = std::max<int64_t>(GRAIN / p.width, 1);
  const int threads = threads_for(total, GRAIN);
  const bool stream = 3 * total * item_size(p.type) > cache_bytes();
  const int64_t row = padded_row(p.width);
  Scratch scratch(2 * row + threads * work_of(p));
  const float* weight = floats(p.weight, 1, scratch.get(), p.width);
  const float* bias = floats(p.bias, 0, scratch.get() + row, p.width);
  parallel_for((p.rows + chunk - 1) / chunk, threads, [&](int thread, int64_t c) {
    const int64_t begin = c * chunk, end = std::min(begin + chunk, p.rows);
    float* work = scratch.get() + 2 * row + thread * work_of(p);
    SUPY_SELECT(deep_norm, p, weight, bias, begin, end, work, stream);
  });
}

void deep_norm_backward_cpu(const DeepNormBackwardParams& b) {
  const DeepNormParams& p = b.norm;
  const int64_t total = p.rows * p.width, row = padded_row(p.width);
  const int64_t least = std::max((p.rows + CHUNKS - 1) / CHUNKS, std::max<int64_t>(GRAIN / p.width, 1));
  const int64_t chunk = (least + GROUP_ROWS - 1) / GROUP_ROWS * GROUP_ROWS;
  const int64_t chunks = (p.rows + chunk - 1) / chunk;
  const int threads = threads_for(total, GRAIN);
  const int tensors = 2 + !b.from_out + (b.dx != nullptr) + (b.dbranch != nullptr);
  const bool stream = tensors * total * item_size(p.type) > cache_bytes();
  const bool sums = b.dweight != nullptr || b.dbias != nullptr;
  const int64_t each = b.from_out ? (p.dropout ? GROUP_ROWS * (row + 8 * LONGEST) : 0) : work_of(p);
  Scratch scratch(3 * row + threads * each + (sums ? 2 * row * chunks : 0));
  const float* weight = floats(p.weight, 1, scratch.get(), p.width);
  const float* bias = b.from_out ? floats(p.bias, 0, scratch.get() + row, p.width) : nullptr;
  float* inverse = scratch.get() + 2 * row;
  if (b.from_out) [&] { SUPY_SELECT(invert, weight, inverse, p.width); }();
  float* work = scratch.get() + 3 * row;
  float* partial = sums ? work + threads * each : nullptr;
  parallel_for(chunks, threads, [&](int thread, int64_t c) {
    const int64_t begin = c * chunk, end = std::min(begin + chunk, p.rows);
    float *mine = work + thread * each, *sum = sums ? partial + 2 * row * c : nullptr;
    if (b.from_out) SUPY_SELECT(deep_norm_backward_from_out, b, weight, bias, inverse, begin, end, mine, sum, stream);
    SUPY_SELECT(deep_norm_backward, b, weight, begin, end, mine, sum, stream);
  });
  const auto add = [&](const float* first, void* out, NormType type) {
    if (out != nullptr) SUPY_SELECT(add_partials, first, chunks, 2 * row, out, type, p.width);
  };
  add(partial, b.dbias, b.bias_type);
  add(partial + row, b.dweight, b.weight_type);
}

}  // namespace supy
