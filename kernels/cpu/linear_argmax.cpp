#include "linear_argmax.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "linear_argmax_work.h"
#include "parallel.h"
#include "scratch.h"

#define SUPY_KERNEL "linear_argmax.inl"
#include "multitarget.h"

namespace supy {
namespace {

constexpr int64_t PANEL = 1 << 23;  // floats of packed classes at a time: 32 MB

LinearArgmaxKernels select(FloatType type, MatrixUnit unit) { SUPY_SELECT(linear_argmax_kernels, type, unit); }

int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

}  // namespace

void linear_argmax_cpu(const LinearArgmaxParams& p) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  std::fill_n(p.values, p.rows, -infinity);
  std::fill_n(p.best, p.rows, -1);
  if (p.rows == 0 || p.classes == 0) return;
  const LinearArgmaxKernels kernels = select(p.type, matrix_unit());
  const int64_t size = std::max<int64_t>(p.size, 1), blocks = blocks_of(p.rows, kernels.rows);
  const int64_t step = std::max<int64_t>(PANEL / (kernels.depth(size) * kernels.columns), 1) * kernels.columns;
  const int64_t most = std::min(step, blocks_of(p.classes, kernels.columns) * kernels.columns);
  const int threads = threads_for(p.rows * p.classes * size, 1 << 20);
  const Scratch panel(kernels.right_floats(most, size));
  std::vector<Scratch> lefts, tiles;
  for (int i = 0; i < threads; ++i) {
    lefts.emplace_back(kernels.left_floats(kernels.rows, size));
    tiles.emplace_back(kernels.rows * kernels.columns);
  }
  std::vector<float> bias(p.bias == nullptr ? 0 : most);
  std::vector<double> longest(most / kernels.columns), highest(longest.size());
  std::vector<double> lengths(p.floor == nullptr ? 0 : p.rows);
  if (p.floor != nullptr)
    parallel_for(blocks, threads, [&](int, int64_t i) {
      kernels.lengths(p, i * kernels.rows, std::min((i + 1) * kernels.rows, p.rows), lengths.data());
    });
  for (int64_t first = 0; first < p.classes; first += step) {
    PackedClasses c{first, std::min(step, p.classes - first), panel.get(), nullptr, longest.data(), highest.data()};
    if (p.bias != nullptr) {
      std::fill(std::copy_n(p.bias + first, c.count, bias.begin()), bias.end(), 0.0f);
      c.bias = bias.data();
    }
    parallel_for(blocks_of(c.count, kernels.columns), threads, [&](int, int64_t tile) { kernels.pack(p, c, tile); });
    parallel_for(blocks, threads, [&](int thread, int64_t i) {
      kernels.search(p, c, {lefts[thread].get(), tiles[thread].get()}, lengths.data(), i * kernels.rows);
    });
  }
  if (p.floor == nullptr) return;
  for (int64_t m = 0; m < p.rows; ++m)
    if (p.values[m] < p.floor[m]) p.values[m] = -infinity, p.best[m] = -1;
}

}  // namespace supy
