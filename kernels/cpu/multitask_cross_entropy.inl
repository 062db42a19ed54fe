// The loss of each class over all tasks, and its gradient. A vector holds one class of LANES tasks, so that sums over
// the classes of a task stay within a lane and so do sums over tasks, until the end.
//
// The sum over the other classes k != j of e^s_k is taken in units of e^top, top the largest score: where j is that of
// the largest score, without it from the start; elsewhere as 1 + (rest - e^(s_j - top)), which is at least 1 and so
// cancels nothing.
#include "vector.inl"

static constexpr float SLACK = 32;  // how far an exponent may be above its column's shift: e^32 n does not overflow
static constexpr float LARGEST = 3.40282347e38f;

// A target below 2^-64 counts as t e^44 at an exponent lower by 44, so that its product neither overflows nor vanishes.
static constexpr float TINY = 0x1p-64f, UNTINY = 1.28516001e19f, UNTINY_LOG = 44.0f;

static inline vec select(ivec mask, vec a, vec b) { return mask ? a : b; }

// LANES tasks: score, target and e^(s - top) of each class.
struct Tile {
  vec *s, *t, *e;
  vec top, rest;  // largest score; sum of e^(s - top) over the others
  ivec at;        // class of the largest score
  vec mean;       // of the scores that are not -inf, and how many these are
  vec count;
};

// A term of class j: weight * e^exponent. others: sum over k != j of e^(s_k - top).
struct Term {
  vec weight, exponent, others;
};

template <typename S, typename T>
static inline ivec load_tile(const MultitaskParams& p, Tile& tile, int64_t b, int64_t first, int64_t last) {
  for (int64_t lane = 0; lane < LANES; ++lane) {
    float* s = reinterpret_cast<float*>(tile.s) + lane;
    float* t = reinterpret_cast<float*>(tile.t) + lane;
    if (first + lane < last) {
      const int64_t i = first + lane;
      const S* scores = static_cast<const S*>(p.scores) + b * p.score_stride[0] + i * p.score_stride[1];
      const T* targets = static_cast<const T*>(p.targets) + b * p.target_stride[0] + i * p.target_stride[1];
      for (int64_t j = 0; j < p.classes; ++j) {
        s[j * LANES] = load(scores + j * p.score_stride[2]);
        t[j * LANES] = load(targets + j * p.target_stride[2]);
      }
    } else {
      for (int64_t j = 0; j < p.classes; ++j) s[j * LANES] = -INF, t[j * LANES] = 0.0f;
    }
  }
  ivec outside{};
  for (int64_t j = 0; j < p.classes; ++j) {
    outside |= (tile.t[j] < 0.0f) | (tile.t[j] > 1.0f);
    tile.t[j] = select(tile.s[j] == -INF, vec{}, tile.t[j]);
  }
  return outside;
}

// Sum of f(j) over the classes, 64 at a time: one running sum of thousands of terms would round too often.
template <typename F>
static inline vec sum_classes(int64_t m, const F& f) {
  vec total{};
  for (int64_t start = 0; start < m; start += 64) {
    const int64_t end = start + 64 < m ? start + 64 : m;
    vec part{};
    for (int64_t j = start; j < end; ++j) part += f(j);
    total += part;
  }
  return total;
}

static inline void prepare(const MultitaskParams& p, Tile& tile) {
  if (p.hard) {
    tile.top = splat(-INF);
    tile.at = ivec{};
    for (int64_t j = 0; j < p.classes; ++j) {
      const ivec higher = tile.s[j] > tile.top;
      tile.top = select(higher, tile.s[j], tile.top);
      tile.at = higher ? ivec{} + static_cast<int32_t>(j) : tile.at;
    }
    tile.top = select(tile.top == -INF, vec{}, tile.top);
    tile.rest = sum_classes(p.classes, [&](int64_t j) {
      tile.e[j] = expv(tile.s[j] - tile.top);
      return select(tile.at == static_cast<int32_t>(j), vec{}, tile.e[j]);
    });
  } else {
    tile.count =
        sum_classes(p.classes, [&](int64_t j) { return select(tile.s[j] == -INF, vec{}, splat(1.0f)); });
    tile.count = select(tile.count == 0.0f, splat(1.0f), tile.count);
    tile.mean =
        sum_classes(p.classes, [&](int64_t j) { return select(tile.s[j] == -INF, vec{}, tile.s[j] / tile.count); });
  }
}

static inline Term term_of(const MultitaskParams& p, const Tile& tile, int64_t j) {
  const vec s = tile.s[j], t = tile.t[j];
  const ivec tiny = t < TINY, is_top = tile.at == static_cast<int32_t>(j);
  Term x;
  x.others = splat(1.0f);
  x.exponent = tile.mean - s;
  if (p.hard) {
    x.others = select(is_top, tile.rest, 1.0f + (tile.rest - tile.e[j]));
    x.exponent = select(is_top, vec{}, tile.top - s);
  }
  x.exponent = select(t != 0.0f, select(tiny, x.exponent - UNTINY_LOG, x.exponent), splat(-INF));
  x.weight = select(t != 0.0f, select(tiny, t * UNTINY, t), vec{});
  return x;
}

// Vectors for a task of the loop; the kernel file may not use the standard library's.
struct Work {
  vec* memory;
  explicit Work(int64_t count) : memory(static_cast<vec*>(aligned_alloc(sizeof(vec), count * sizeof(vec)))) {}
  ~Work() { free(memory); }
};

// Sums the tasks from first to last: sum[j] in units of e^shift[j].
template <typename S, typename T>
static bool sum_chunk(const MultitaskParams& p, int64_t b, int64_t first, int64_t last, float* sum, float* shift) {
  const int64_t m = p.classes;
  const Work work(5 * m);
  Tile tile{};
  tile.s = work.memory, tile.t = tile.s + m, tile.e = tile.t + m;
  vec *sums = tile.e + m, *shifts = sums + m;
  for (int64_t j = 0; j < m; ++j) sums[j] = shifts[j] = vec{};
  ivec outside{};
  for (int64_t i = first; i < last; i += LANES) {
    outside |= load_tile<S, T>(p, tile, b, i, last);
    prepare(p, tile);
    for (int64_t j = 0; j < m; ++j) {
      if (!bits_of(tile.t[j] != 0.0f)) continue;
      const Term x = term_of(p, tile, j);
      const ivec above = x.exponent > shifts[j] + SLACK;
      if (bits_of(above)) {
        const vec higher = select(above, select(x.exponent > LARGEST, splat(LARGEST), x.exponent), shifts[j]);
        sums[j] *= expv(shifts[j] - higher);
        shifts[j] = higher;
      }
      sums[j] += x.weight * x.others * expv(x.exponent - shifts[j]);
    }
  }
  for (int64_t j = 0; j < m; ++j) {
    shift[j] = max_of(shifts[j]);
    sum[j] = sum_of(sums[j] * expv(shifts[j] - shift[j]));
  }
  return bits_of(outside);
}

// sums: [batch, chunks, 2, classes]
template <typename S, typename T>
static bool forward(const MultitaskParams& p, int64_t chunk, float* sums) {
  const int64_t m = p.classes, chunks = (p.tasks + chunk - 1) / chunk;
  int outside = 0;
#pragma omp parallel for schedule(dynamic) reduction(| : outside) num_threads(threads_for(p))
  for (int64_t i = 0; i < p.batch * chunks; ++i) {
    const int64_t first = i % chunks * chunk, end = first + chunk;
    outside |= sum_chunk<S, T>(p, i / chunks, first, end < p.tasks ? end : p.tasks, sums + 2 * i * m,
                               sums + (2 * i + 1) * m);
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    const float* own = sums + 2 * b * chunks * m;
    for (int64_t j = 0; j < m; ++j) {
      double shift = 0, sum = 0;
      for (int64_t c = 0; c < chunks; ++c) shift = own[(2 * c + 1) * m + j] > shift ? own[(2 * c + 1) * m + j] : shift;
      for (int64_t c = 0; c < chunks; ++c) sum += own[2 * c * m + j] * __builtin_exp(own[(2 * c + 1) * m + j] - shift);
      p.losses[b * m + j] = shift == 0 ? __builtin_log1p(sum) : shift + __builtin_log(sum + __builtin_exp(-shift));
    }
  }
  return outside;
}

template <typename S, typename T>
static void gradient_chunk(const MultitaskParams& p, int64_t b, int64_t first, int64_t last) {
  const int64_t m = p.classes;
  const float *losses = p.losses + b * m, *grad = p.grad + b * m;
  const Work work(4 * m);
  Tile tile{};
  tile.s = work.memory, tile.t = tile.s + m, tile.e = tile.t + m;
  vec* others = tile.e + m;
  for (int64_t i = first; i < last; i += LANES) {
    load_tile<S, T>(p, tile, b, i, last);
    prepare(p, tile);
    vec* q = tile.t;  // of each class, grad * weight * e^(exponent - loss)
    vec of_top{};
    const vec total = sum_classes(m, [&](int64_t j) {
      const ivec is_top = tile.at == static_cast<int32_t>(j);
      const Term x = term_of(p, tile, j);
      others[j] = x.others;
      q[j] = grad[j] * x.weight * expv(x.exponent - losses[j]);
      const ivec apart = p.hard ? is_top : ivec{};
      of_top = select(apart, q[j], of_top);
      return select(apart, vec{}, q[j]);
    });
    for (int64_t j = 0; j < m; ++j) {
      vec ds = total / tile.count - q[j];
      if (p.hard) {
        const vec rest = select(tile.at == static_cast<int32_t>(j), total, of_top + (total - q[j]));
        ds = tile.e[j] * rest - q[j] * others[j];
      }
      q[j] = select(tile.s[j] == -INF, vec{}, ds);
    }
    for (int64_t lane = 0; lane < LANES && i + lane < last; ++lane) {
      S* out = static_cast<S*>(p.ds) + (b * p.tasks + i + lane) * m;
      for (int64_t j = 0; j < m; ++j) store(out + j, reinterpret_cast<const float*>(q)[j * LANES + lane]);
    }
  }
}

template <typename S, typename T>
static void backward(const MultitaskParams& p, int64_t chunk) {
  const int64_t chunks = (p.tasks + chunk - 1) / chunk;
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(p))
  for (int64_t i = 0; i < p.batch * chunks; ++i) {
    const int64_t first = i % chunks * chunk, end = first + chunk;
    gradient_chunk<S, T>(p, i / chunks, first, end < p.tasks ? end : p.tasks);
  }
}

#define SUPY_BY_TARGET(function, S, ...)                              \
  switch (p.target_type) {                                            \
    case TaskTargetType::f32: return function<S, float>(__VA_ARGS__); \
    case TaskTargetType::bf16: return function<S, bf16>(__VA_ARGS__); \
    default: return function<S, uint8_t>(__VA_ARGS__);                \
  }
#define SUPY_BY_TYPE(function, ...)                                                    \
  if (p.score_type == TaskScoreType::bf16) SUPY_BY_TARGET(function, bf16, __VA_ARGS__) \
  SUPY_BY_TARGET(function, float, __VA_ARGS__)

static bool multitask_cross_entropy(const MultitaskParams& p, int64_t chunk, float* sums) {
  SUPY_BY_TYPE(forward, p, chunk, sums)
}

static void multitask_cross_entropy_backward(const MultitaskParams& p, int64_t chunk) {
  SUPY_BY_TYPE(backward, p, chunk)
}
#undef SUPY_BY_TYPE
#undef SUPY_BY_TARGET
