// The largest logit of each row, tile by tile: a tile of the product is searched while it is in the caches.
#include "panels.inl"

template <class Engine, class T>
struct LinearArgmax {
  static constexpr int64_t ROWS = Engine::TILES ? 192 : 96, COLUMNS = 480;
  static constexpr Side L = Side::left, R = Side::right;

  static int64_t depth(int64_t size) { return depth_of<Engine>(size); }
  static int64_t left_floats(int64_t rows, int64_t size) { return panel_floats<Engine, L>(rows, size); }
  static int64_t right_floats(int64_t rows, int64_t size) { return panel_floats<Engine, R>(rows, size); }
  static int64_t words(int64_t size) { return Engine::TILES ? depth(size) : (size + Engine::WORD - 1) / Engine::WORD; }

  static double length(const void* data, int64_t step, int64_t row, int64_t size) {
    const T* x = static_cast<const T*>(data) + row * step;
    double sum[LANES] = {};  // in double nothing is too small to be squared
    for (int64_t j = 0; j < size; j += LANES) {
      const vec v = load_some(x + j, size - j);
      for (int l = 0; l < LANES; ++l) sum[l] += static_cast<double>(v[l]) * static_cast<double>(v[l]);
    }
    for (int l = 1; l < LANES; ++l) sum[0] += sum[l];
    return sum[0] < 1e300 ? __builtin_sqrt(sum[0]) : static_cast<double>(INF);
  }

  static void lengths(const LinearArgmaxParams& p, int64_t first, int64_t last, double* out) {
    for (int64_t m = first; m < last; ++m) out[m] = length(p.x, p.x_step, m, p.size);
  }

  static void pack(const LinearArgmaxParams& p, const PackedClasses& c, int64_t tile) {
    const int64_t first = tile * COLUMNS, count = at_most(COLUMNS, c.count - first);
    const T* weight = static_cast<const T*>(p.weight) + (c.first + first) * p.weight_step;
    const Rows<T> rows{weight, p.weight_step, count, p.size};
    pack_rows<Engine, R>(rows, 0, padded<Engine, R>(count), depth(p.size), depth(p.size),
                         at<Engine, R>(c.panel, depth(p.size), first, 0));
    if (p.floor == nullptr) return;
    double longest = 0, highest = p.bias == nullptr ? 0 : -static_cast<double>(INF);
    for (int64_t i = 0; i < count; ++i) {
      const double now = length(weight, p.weight_step, i, p.size);
      longest = now > longest ? now : longest;
      if (p.bias == nullptr) continue;
      const double bias = c.bias[first + i];
      highest = bias <= highest ? highest : bias != bias ? static_cast<double>(INF) : bias;
    }
    c.longest[tile] = longest, c.highest[tile] = highest;
  }

  // Whether no logit of the tile can reach the floor of any of these rows: |x . w| <= |x| |w|, and a bound of rounding.
  static bool beneath(const LinearArgmaxParams& p, const PackedClasses& c, const double* lengths, int64_t row,
                      int64_t rows, int64_t tile) {
    if (p.floor == nullptr) return false;
    const double unit = 1.0 / (1 << 21), tiny = 1.2e-38;
    for (int64_t m = row; m < row + rows; ++m) {
      const double most = lengths[m] * c.longest[tile] * (1 + (p.size + 16) * unit) + tiny * p.size;
      const double highest = c.highest[tile], slack = (most + (highest < 0 ? -highest : highest)) * unit;
      if (!(most + highest + slack < p.floor[m])) return false;
    }
    return true;
  }

  // The first of the largest of n logits in a row of a tile, which beats what was found so far or is NaN.
  static void find(const float* row, const float* bias, int64_t n, int64_t first, float* value, int64_t* best) {
    for (int64_t i = 0; i < n; ++i) {
      const float now = bias == nullptr ? row[i] : row[i] + bias[i];
      if (now <= *value) continue;
      *value = now, *best = first + i;
      if (now != now) return;
    }
  }

  static void search_row(float* row, const float* bias, int64_t n, int64_t first, int64_t own, float* value,
                         int64_t* best) {
    if (*value != *value) return;
    fill(row + n, round_up(n, LANES) - n, -INF);
    if (own >= 0 && own < n) {
      for (int64_t i = 0; i < n && bias != nullptr; ++i) row[i] += bias[i];
      row[own] = -INF;
      bias = nullptr;
    }
    vec top = splat(-INF);
    ivec size{};
    for (int64_t i = 0; i < n; i += LANES) {
      vec v = loadv(row + i);
      if (bias != nullptr) v += loadv(bias + i);
      const ivec magnitude = (ivec)v & 0x7fffffff;
      size = magnitude > size ? magnitude : size;
      top = maxv(v, top);
    }
    if (bits_of((top > splat(*value)) | (size > 0x7f800000))) find(row, bias, n, first, value, best);
  }

  static void search(const LinearArgmaxParams& p, const PackedClasses& c, const ArgmaxWork& w, const double* lengths,
                     int64_t row) {
    Engine::begin();
    const int64_t rows = at_most(ROWS, p.rows - row), deep = depth(p.size);
    const Rows<T> x{static_cast<const T*>(p.x) + row * p.x_step, p.x_step, rows, p.size};
    bool packed = false;
    for (int64_t tile = 0; tile * COLUMNS < c.count; ++tile) {
      if (beneath(p, c, lengths, row, rows, tile)) continue;
      if (!packed) pack_rows<Engine, L>(x, 0, padded<Engine, L>(rows), deep, deep, w.left);
      packed = true;
      const int64_t first = tile * COLUMNS, n = at_most(COLUMNS, c.count - first);
      multiply<Engine>(rows, n, words(p.size), w.left, deep, at<Engine, R>(c.panel, deep, first, 0), deep, w.tile,
                       COLUMNS, false);
      const float* bias = c.bias == nullptr ? nullptr : c.bias + first;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t own = p.exclude == nullptr ? -1 : p.exclude[row + r] - c.first - first;
        search_row(w.tile + r * COLUMNS, bias, n, c.first + first, own, p.values + row + r, p.best + row + r);
      }
    }
    Engine::end();
  }

  static LinearArgmaxKernels kernels() {
    return {ROWS, COLUMNS, depth, left_floats, right_floats, pack, lengths, search};
  }
};

static LinearArgmaxKernels linear_argmax_kernels(FloatType type, MatrixUnit unit) {
#if SUPY_LANES == 16
  if (type == FloatType::bf16 && unit == MatrixUnit::tiles) return LinearArgmax<Bfloat16Tiles, bf16>::kernels();
  if (type == FloatType::bf16 && unit == MatrixUnit::pairs) return LinearArgmax<Bfloat16Pairs, bf16>::kernels();
#endif
  (void)unit;
  return type == FloatType::bf16 ? LinearArgmax<Float32, bf16>::kernels() : LinearArgmax<Float32, float>::kernels();
}
