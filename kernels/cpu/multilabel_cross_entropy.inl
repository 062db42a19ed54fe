// log(1 + sum (1 - t) e^s) + log(1 + sum t e^-s) and its gradient, a block of classes at a time.
//
// Terms are summed in units of e^shift. The shift begins at 0, the exponent of the 1, and follows the largest exponent
// only where that is above it by SLACK. Where all of a block's targets are 0 or 1, each element has one exponential, of
// its own side, otherwise two.
#include "vector.inl"

// Classes that stay in the first cache between two looks at them, and few enough for a lane to sum them in float32.
static constexpr int64_t BLOCK = 64 * LANES;
static constexpr float SLACK = 32;  // e^32 times any number of classes is far from overflow
static constexpr float LARGEST = 3.40282347e38f;

// A target below 2^-64 counts as t e^44 at the score s + 44, so that next to a large -s neither the sum of the
// others, at e^-87, nor t e^-s overflows or vanishes.
static constexpr float TINY = 0x1p-64f, UNTINY = 1.28516001e19f, UNTINY_LOG = 44.0f;

static inline vec select(ivec mask, vec a, vec b) { return mask ? a : b; }

// A first look at a block, which also brings it into the cache: a loop so short that many loads are under way at once.
struct Look {
  bool hard;            // every target is 0 or 1
  float largest, least;  // score; -inf does not count
};

template <typename S, typename T>
static inline Look look_at(const S* scores, const T* targets, int64_t n) {
  vec top = splat(-INF), bottom = splat(-INF);
  ivec odd{};
  for (int64_t i = 0; i < n; i += LANES) {
    const vec s = loadv(scores + i), t = loadv(targets + i);
    odd |= (t != 0.0f) & (t != 1.0f);
    top = maxv(s, top);
    bottom = maxv(select(s == -INF, s, -s), bottom);
  }
  return {!bits_of(odd), max_of(top), -max_of(bottom)};
}

// The exponent of an element of hard targets: s - negative or -s - positive; -inf where s is.
static inline vec hard_exponent(vec s, ivec positive, float negative_shift, float positive_shift) {
  const vec x = select(s == -INF, s, select(positive, -s, s));
  return x - select(positive, splat(positive_shift), splat(negative_shift));
}

// The two exponents of an element of any targets, before the shift, and the weights of their exponentials.
struct Terms {
  vec up, up_weight, down, down_weight;
};

static inline Terms soft_terms(vec s, vec t) {
  t = select(s == -INF, vec{}, t);
  const ivec tiny = t < TINY;
  Terms x;
  x.up_weight = 1.0f - t;
  x.down_weight = select(tiny, t * UNTINY, t);
  x.up = select(x.up_weight > 0.0f, s, splat(-INF));
  x.down = select(x.down_weight > 0.0f, select(tiny, -s - UNTINY_LOG, -s), splat(-INF));
  return x;
}

static inline void raise_shift(Sum& sum, float shift) {
  shift = shift > LARGEST ? LARGEST : shift;
  if (!(shift > sum.shift)) return;
  sum.sum *= __builtin_exp((double)sum.shift - shift);
  sum.shift = shift;
}

// Whether a target is outside 0 to 1.
template <typename S, typename T>
static inline bool add_block(Sums& sums, const S* scores, const T* targets, int64_t n) {
  const Look look = look_at(scores, targets, n);
  if (look.largest > sums.negative.shift + SLACK || -look.least > sums.positive.shift + SLACK) {
    vec up = splat(-INF), down = splat(-INF);
    for (int64_t i = 0; i < n; i += LANES) {
      const Terms x = soft_terms(loadv(scores + i), loadv(targets + i));
      up = maxv(x.up, up);
      down = maxv(x.down, down);
    }
    if (max_of(up) > sums.negative.shift + SLACK) raise_shift(sums.negative, max_of(up));
    if (max_of(down) > sums.positive.shift + SLACK) raise_shift(sums.positive, max_of(down));
  }
  const float negative_shift = sums.negative.shift, positive_shift = sums.positive.shift;
  vec up{}, down{};
  ivec outside{};
  if (look.hard) {
    for (int64_t i = 0; i < n; i += LANES) {
      const ivec positive = loadv(targets + i) == 1.0f;
      const vec e = expv(hard_exponent(loadv(scores + i), positive, negative_shift, positive_shift));
      up += select(positive, vec{}, e);
      down += select(positive, e, vec{});
    }
  } else {
    for (int64_t i = 0; i < n; i += LANES) {
      const vec t = loadv(targets + i);
      const Terms x = soft_terms(loadv(scores + i), t);
      outside |= (t < 0.0f) | (t > 1.0f);
      up += x.up_weight * expv(x.up - negative_shift);
      down += x.down_weight * expv(x.down - positive_shift);
    }
  }
  sums.negative.sum += sum_of(up);
  sums.positive.sum += sum_of(down);
  return bits_of(outside);
}

// What does not fill a vector, with classes that contribute nothing behind it.
struct Tail {
  float scores[LANES], targets[LANES];
};

template <typename S, typename T>
static inline Tail tail_of(const S* scores, const T* targets, int64_t n) {
  Tail tail;
  for (int64_t i = 0; i < LANES; ++i) {
    tail.scores[i] = i < n ? load(scores + i) : -INF;
    tail.targets[i] = i < n ? load(targets + i) : 0.0f;
  }
  return tail;
}

// Adds n <= CHUNK classes. Returns the first whose target is outside 0 to 1, or -1.
template <typename S, typename T>
static int64_t add_chunk(Sums& sums, const S* scores, const T* targets, int64_t n) {
  const int64_t whole = n / LANES * LANES;
  bool outside = false;
  for (int64_t i = 0; i < whole; i += BLOCK)
    outside |= add_block(sums, scores + i, targets + i, whole - i < BLOCK ? whole - i : BLOCK);
  if (whole < n) {
    const Tail tail = tail_of(scores + whole, targets + whole, n - whole);
    outside |= add_block(sums, tail.scores, tail.targets, LANES);
  }
  for (int64_t i = 0; outside && i < n; ++i) {
    const float t = load(targets + i);
    if (t < 0.0f || t > 1.0f) return i;
  }
  return -1;
}

static inline float log_one_plus(Sum s) {
  if (s.shift == 0.0f) return __builtin_log1p(s.sum);
  return s.shift + __builtin_log(s.sum + __builtin_exp(-(double)s.shift));
}

// Targets of one chunk from the indices of a row.
struct Marks {
  uint8_t at[CHUNK];

  static bool inside(const MultilabelParams& p, int64_t index, int64_t begin, int64_t end) {
    return index >= begin && index < end && index != p.ignore_index;
  }
  void set(const MultilabelParams& p, const int64_t* indices, int64_t begin, int64_t end) {
    __builtin_memset(at, 0, end - begin);
    for (int64_t j = 0; j < p.positives; ++j)
      if (inside(p, indices[j], begin, end)) at[indices[j] - begin] = 1;
  }
};

// Calls body(scores, targets) with the classes of a row from begin to end.
template <typename S, typename T, typename Body>
static inline void with_targets(const MultilabelParams& p, int64_t row, int64_t begin, int64_t end, const Body& body) {
  const S* scores = static_cast<const S*>(p.scores) + row * p.score_row_stride + begin;
  if constexpr (__is_same(T, int64_t)) {
    Marks marks;
    marks.set(p, static_cast<const int64_t*>(p.targets) + row * p.target_row_stride, begin, end);
    body(scores, marks.at);
  } else {
    body(scores, static_cast<const T*>(p.targets) + row * p.target_row_stride + begin);
  }
}

static inline int64_t first_bad_index(const MultilabelParams& p, int64_t row) {
  const int64_t* indices = static_cast<const int64_t*>(p.targets) + row * p.target_row_stride;
  for (int64_t j = 0; j < p.positives; ++j)
    if (indices[j] != p.ignore_index && (indices[j] < 0 || indices[j] >= p.classes)) return row * p.positives + j;
  return -1;
}

template <typename S, typename T>
static int64_t forward(const MultilabelParams& p, int64_t chunks, Sums* sums) {
  const int64_t per_row = chunks > 1 ? chunks : 1, tasks = p.rows * per_row;
  const int64_t grain = p.classes < CHUNK ? CHUNK / (p.classes + 1) + 1 : 1;
  constexpr int64_t none = INT64_MAX;
  int64_t first = none;  // place of the first bad target
#pragma omp parallel for schedule(dynamic, grain) reduction(min : first) if (p.rows * p.classes > CHUNK)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t row = task / per_row, begin = task % per_row * CHUNK;
    const int64_t end = p.classes - begin < CHUNK ? p.classes : begin + CHUNK;
    Sums own{};
    int64_t bad = -1;
    with_targets<S, T>(p, row, begin, end, [&](const S* scores, const auto* targets) {
      bad = add_chunk(own, scores, targets, end - begin);
    });
    if constexpr (__is_same(T, int64_t)) {
      bad = begin == 0 ? first_bad_index(p, row) : -1;
    } else if (bad >= 0) {
      bad += row * p.classes + begin;
    }
    if (bad >= 0 && bad < first) first = bad;
    if (chunks > 1) {
      sums[task] = own;
    } else {
      p.negative[row] = log_one_plus(own.negative);
      p.positive[row] = log_one_plus(own.positive);
    }
  }
  for (int64_t row = 0; chunks > 1 && row < p.rows; ++row) {
    Sums total = sums[row * chunks];
    for (const Sums* part = sums + row * chunks + 1; part < sums + (row + 1) * chunks; ++part) {
      raise_shift(total.negative, part->negative.shift);
      raise_shift(total.positive, part->positive.shift);
      total.negative.sum += part->negative.sum * __builtin_exp((double)part->negative.shift - total.negative.shift);
      total.positive.sum += part->positive.sum * __builtin_exp((double)part->positive.shift - total.positive.shift);
    }
    p.negative[row] = log_one_plus(total.negative);
    p.positive[row] = log_one_plus(total.positive);
  }
  return first == none ? -1 : first;
}

// What a row's gradient needs: the halves of the loss and their gradients.
struct RowGradient {
  float negative, positive, grad_negative, grad_positive;
  // No NaN and no infinite gradient. Otherwise 0 times one half's is NaN in the classes of the other half too, and hard
  // targets are no shortcut.
  bool plain;
};

static inline RowGradient row_gradient(const MultilabelParams& p, int64_t row) {
  const float negative = p.negative[row], positive = p.positive[row];
  const float up = p.grad_negative[row], down = p.grad_positive[row];
  const bool plain = up - up == 0 && down - down == 0 && negative == negative && positive == positive;
  return {negative, positive, up, down, plain};
}

template <typename S, typename D, typename T>
static inline void gradient_block(const RowGradient& r, const S* scores, const T* targets, D* ds, int64_t n) {
  if (r.plain && look_at(scores, targets, n).hard) {
    for (int64_t i = 0; i < n; i += LANES) {
      const ivec positive = loadv(targets + i) == 1.0f;
      const vec x = hard_exponent(loadv(scores + i), positive, r.negative, r.positive);
      storev(ds + i, expv(x) * select(positive, splat(-r.grad_positive), splat(r.grad_negative)));
    }
  } else {
    for (int64_t i = 0; i < n; i += LANES) {
      const Terms x = soft_terms(loadv(scores + i), loadv(targets + i));
      const vec up = x.up_weight * expv(x.up - r.negative) * r.grad_negative;
      const vec down = x.down_weight * expv(x.down - r.positive) * r.grad_positive;
      storev(ds + i, up - down);
    }
  }
}

template <typename S, typename T>
static void gradient_chunk(const RowGradient& r, const S* scores, const T* targets, S* ds, int64_t n) {
  const int64_t whole = n / LANES * LANES;
  for (int64_t i = 0; i < whole; i += BLOCK)
    gradient_block(r, scores + i, targets + i, ds + i, whole - i < BLOCK ? whole - i : BLOCK);
  if (whole < n) {
    const Tail tail = tail_of(scores + whole, targets + whole, n - whole);
    float last[LANES];
    gradient_block(r, tail.scores, tail.targets, last, LANES);
    for (int64_t i = whole; i < n; ++i) store(ds + i, last[i - whole]);
  }
}

template <typename S, typename T>
static void backward(const MultilabelParams& p) {
  const int64_t chunks = (p.classes + CHUNK - 1) / CHUNK, tasks = p.rows * chunks;
  const int64_t grain = p.classes < CHUNK ? CHUNK / (p.classes + 1) + 1 : 1;
#pragma omp parallel for schedule(dynamic, grain) if (p.rows * p.classes > CHUNK)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t row = task / chunks, begin = task % chunks * CHUNK;
    const int64_t end = p.classes - begin < CHUNK ? p.classes : begin + CHUNK;
    const RowGradient r = row_gradient(p, row);
    with_targets<S, T>(p, row, begin, end, [&](const S* scores, const auto* targets) {
      gradient_chunk(r, scores, targets, static_cast<S*>(p.ds) + row * p.classes + begin, end - begin);
    });
  }
}

#define SUPY_BY_TARGET(function, S, ...)                            \
  switch (p.target_type) {                                          \
    case TargetType::f32: return function<S, float>(__VA_ARGS__);   \
    case TargetType::bf16: return function<S, bf16>(__VA_ARGS__);   \
    case TargetType::u8: return function<S, uint8_t>(__VA_ARGS__);  \
    default: return function<S, int64_t>(__VA_ARGS__);              \
  }
#define SUPY_BY_TYPE(function, ...)                                                       \
  if (p.score_type == ScoreType::bf16) SUPY_BY_TARGET(function, bf16, __VA_ARGS__)        \
  SUPY_BY_TARGET(function, float, __VA_ARGS__)

static int64_t multilabel_cross_entropy(const MultilabelParams& p, int64_t chunks, Sums* sums) {
  SUPY_BY_TYPE(forward, p, chunks, sums)
}

static void multilabel_cross_entropy_backward(const MultilabelParams& p) { SUPY_BY_TYPE(backward, p) }
#undef SUPY_BY_TYPE
#undef SUPY_BY_TARGET
