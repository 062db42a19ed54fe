#include "vector.inl"
#include "stream.inl"
#include "philox.inl"
#include "philox_words.inl"

// Loads and stores of a whole vector, and of the `count` numbers that are left at the end of a row.
struct Whole {
  template <class T>
  inline vec load(const T* p) const {
    return loadv(p);
  }
  template <bool STREAM, class T>
  inline void store(T* p, vec v) const {
    put<STREAM>(p, v);
  }
  inline vec only(vec v) const { return v; }
};
struct Part {
  int64_t count;
  template <class T>
  inline vec load(const T* p) const {
    T rest[LANES] = {};
    __builtin_memcpy(rest, p, count * sizeof(T));
    return loadv(rest);
  }
  template <bool STREAM, class T>
  inline void store(T* p, vec v) const {
    T rest[LANES];
    storev(rest, v);
    __builtin_memcpy(p, rest, count * sizeof(T));
  }
  inline vec only(vec v) const {
    for (int l = 0; l < LANES; ++l) v[l] = l < count ? v[l] : 0.0f;
    return v;
  }
};

// body(i, sum, access) over a row; sums run in four places, so that an addition need not wait for the last one.
static constexpr int SUMS = 4;
template <class Body>
static inline __attribute__((always_inline)) void along(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + SUMS * LANES <= width; i += SUMS * LANES) {
#pragma GCC unroll 4
    for (int sum = 0; sum < SUMS; ++sum) body(i + sum * LANES, sum, Whole{});
  }
  for (; i + LANES <= width; i += LANES) body(i, 0, Whole{});
  if (i < width) body(i, 0, Part{width - i});
}
#define SUPY_ALONG(i, sum, access) [&](int64_t i, int sum, auto access) __attribute__((always_inline))

// body(i, access), without sums.
template <class Body>
static inline __attribute__((always_inline)) void over(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) body(i, Whole{});
  if (i < width) body(i, Part{width - i});
}
#define SUPY_OVER(i, access) [&](int64_t i, auto access) __attribute__((always_inline))

struct Sum {
  vec place[SUMS] = {};
  inline float total() const { return sum_of((place[0] + place[1]) + (place[2] + place[3])); }
};

// The factors of `width` elements from number `first` of the stream on; `factors` has room for 2 * GROUP more.
static const float* draw_factors(float* factors, int64_t width, const DeepNormParams& p, uint64_t first) {
  static_assert(sizeof(float) == sizeof(uint32_t), "a word makes a factor");
  const Keys keys(p.seed);
  const Order order;
  const int64_t skipped = first % 4;
  uint64_t counter = first / 4;
  for (int64_t i = 0; i < skipped + width; i += GROUP, counter += LANES) {
    const uint32_t low = (uint32_t)counter, high = (uint32_t)(counter >> 32);
    vec words[4];
    if (low > 0xffffffffu - LANES) {  // the second word changes inside the group
      uint32_t one[GROUP];
      for (int block = 0; block < LANES; ++block) philox(counter + block, p.seed, one + 4 * block);
      __builtin_memcpy(words, one, sizeof words);
    } else {
      Words x, y;
      order.words(low, high, keys, x, y);
      words[0] = (vec)joined(x.a, y.a), words[1] = (vec)joined(x.b, y.b);
      words[2] = (vec)joined(x.c, y.c), words[3] = (vec)joined(x.d, y.d);
      in_order(words);
    }
    for (int v = 0; v < 4; ++v)
      storev(factors + i + v * LANES, (uvec)words[v] >= p.threshold ? splat(p.scale) : vec{});
  }
  return factors + skipped;
}

// A row of x and branch, and what their sum is normalised with.
template <class T, bool DROPOUT>
struct Sources {
  const T *x, *branch;
  const float* factors;
  float alpha;

  Sources(const DeepNormParams& p, int64_t row, float* factors)
      : x(static_cast<const T*>(p.x) + row * p.width),
        branch(static_cast<const T*>(p.branch) + row * p.width),
        factors(DROPOUT ? draw_factors(factors, p.width, p, p.first + row * p.width) : nullptr),
        alpha(p.alpha) {}
  template <class Access>
  inline __attribute__((always_inline)) vec sum(int64_t i, Access access) const {
    const vec b = access.load(branch + i);
    return access.load(x + i) * alpha + (DROPOUT ? b * access.load(factors + i) : b);
  }
};

static inline float inverse_root(float square, float eps) { return 1.0f / __builtin_sqrtf(square + eps); }

// What is left to subtract after a mean in float32, whose rounding a row of equal numbers would show, and the variance.
struct Centre {
  float rest, rstd;
  Centre(float sum, float squares, int64_t width, float eps) {
    rest = sum / width;
    const float variance = squares / width - rest * rest;
    rstd = inverse_root(variance > 0 ? variance : variance != variance ? variance : 0, eps);
  }
};

template <class T, bool RMS, bool DROPOUT, bool STREAM>
static void forward_rows(const DeepNormParams& p, const float* weight, const float* bias, int64_t begin, int64_t end,
                         float* work) {
  const int64_t width = p.width;
  float *z = work, *factors = work + padded_row(width);
  for (int64_t row = begin; row < end; ++row) {
    const Sources<T, DROPOUT> in(p, row, factors);
    Sum sum, squares;
    along(width, SUPY_ALONG(i, s, access) {
      const vec v = in.sum(i, access);
      storev(z + i, v);
      if (RMS)
        squares.place[s] += v * v;
      else
        sum.place[s] += v;
    });
    float mean = 0, rstd;
    if (RMS) {
      rstd = inverse_root(squares.total() / width, p.eps);
    } else {
      mean = sum.total() / width;
      sum = Sum{};
      along(width, SUPY_ALONG(i, s, access) {
        const vec d = access.only(loadv(z + i) - mean);
        sum.place[s] += d;
        squares.place[s] += d * d;
      });
      const Centre centre(sum.total(), squares.total(), width, p.eps);
      mean += centre.rest;
      rstd = centre.rstd;
    }
    if (p.rstd != nullptr) p.rstd[row] = rstd;
    if (p.mean != nullptr) p.mean[row] = mean;
    T* out = static_cast<T*>(p.out) + row * width;
    over(width, SUPY_OVER(i, access) {
      // The next row, of which reading would else begin when this one is done.
      __builtin_prefetch(in.x + width + i, 0, 2);
      __builtin_prefetch(in.branch + width + i, 0, 2);
      const vec normalised = (loadv(z + i) - mean) * rstd;
      access.template store<STREAM>(out + i, normalised * access.load(weight + i) + access.load(bias + i));
    });
  }
  if (STREAM) end_of_stream();
}

static void clear(float* partial, int64_t count) {
  for (int64_t i = 0; partial != nullptr && i < count; i += LANES) storev(partial + i, vec{});
}

// dbias and dweight are the sums of these rows, `partial` and `partial` + padded_row(width).
template <class T, bool RMS, bool DROPOUT, bool STREAM>
static void backward_rows(const DeepNormBackwardParams& b, const float* weight, int64_t begin, int64_t end,
                          float* work, float* partial) {
  const DeepNormParams& p = b.norm;
  const int64_t width = p.width, padded = padded_row(width);
  float *z = work, *factors = work + padded;
  float *dbias = partial, *dweight = partial + padded;
  const bool sums = partial != nullptr;
  clear(partial, 2 * padded);
  for (int64_t row = begin; row < end; ++row) {
    const Sources<T, DROPOUT> in(p, row, factors);
    const T* grad = static_cast<const T*>(b.grad) + row * width;
    Sum sum, squares, slopes, products;
    float mean = 0, rstd, slope = 0, product;
    const bool known = !RMS && p.mean != nullptr;
    if (known) {
      mean = p.mean[row];
      rstd = p.rstd[row];
      along(width, SUPY_ALONG(i, s, access) {
        const vec v = in.sum(i, access), g = access.load(grad + i) * access.load(weight + i);
        storev(z + i, v);
        slopes.place[s] += g;
        products.place[s] += g * access.only(v - mean);
      });
    } else {
      along(width, SUPY_ALONG(i, s, access) {
        const vec v = in.sum(i, access);
        storev(z + i, v);
        if (RMS) {
          squares.place[s] += v * v;
          products.place[s] += v * access.load(grad + i) * access.load(weight + i);
        } else {
          sum.place[s] += v;
        }
      });
    }
    if (known) {
      slope = slopes.total() / width;
      product = products.total() * rstd / width;
    } else if (RMS) {
      rstd = inverse_root(squares.total() / width, p.eps);
      product = products.total() * rstd / width;
    } else {
      mean = sum.total() / width;
      sum = Sum{};
      along(width, SUPY_ALONG(i, s, access) {
        const vec d = access.only(loadv(z + i) - mean), g = access.load(grad + i) * access.load(weight + i);
        sum.place[s] += d;
        squares.place[s] += d * d;
        slopes.place[s] += g;
        products.place[s] += g * d;
      });
      const Centre centre(sum.total(), squares.total(), width, p.eps);
      mean += centre.rest;
      rstd = centre.rstd;
      slope = slopes.total() / width;
      product = (products.total() / width - centre.rest * slope) * rstd;
    }
    const float factor = !RMS && width == 1 ? 0 : rstd;  // what rounding leaves of a difference that is 0 would be seen
    T* dx = b.dx == nullptr ? nullptr : static_cast<T*>(b.dx) + row * width;
    T* dbranch = b.dbranch == nullptr ? nullptr : static_cast<T*>(b.dbranch) + row * width;
    over(width, SUPY_OVER(i, access) {
      __builtin_prefetch(in.x + width + i, 0, 2);
      __builtin_prefetch(in.branch + width + i, 0, 2);
      __builtin_prefetch(grad + width + i, 0, 2);
      const vec normalised = (loadv(z + i) - mean) * rstd, g = access.load(grad + i);
      const vec dz = (g * access.load(weight + i) - slope - normalised * product) * factor;
      if (dx != nullptr) access.template store<STREAM>(dx + i, dz * in.alpha);
      if (dbranch != nullptr)
        access.template store<STREAM>(dbranch + i, DROPOUT ? dz * access.load(in.factors + i) : dz);
      if (sums) {
        storev(dbias + i, loadv(dbias + i) + g);
        storev(dweight + i, loadv(dweight + i) + g * normalised);
      }
    });
  }
  if (STREAM) end_of_stream();
}

static constexpr int64_t ROWS = GROUP_ROWS;

// The same of R rows of float32, from the output: (out - bias) / weight is what was normalised.
template <int R, bool DROPOUT, bool STREAM>
static void backward_from_out(const DeepNormBackwardParams& b, const float* weight, const float* bias,
                              const float* inverse, int64_t row, float* work, float* partial) {
  const DeepNormParams& p = b.norm;
  const int64_t width = p.width, padded = padded_row(width);
  const float *grad[R], *out[R], *factors[R];
  float *dx[R], *dbranch[R], rstd[R], slope[R], product[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const int64_t at = (row + r) * width;
    grad[r] = static_cast<const float*>(b.grad) + at;
    out[r] = static_cast<const float*>(p.out) + at;
    dx[r] = b.dx == nullptr ? nullptr : static_cast<float*>(b.dx) + at;
    dbranch[r] = b.dbranch == nullptr ? nullptr : static_cast<float*>(b.dbranch) + at;
    factors[r] = DROPOUT ? draw_factors(work + r * (padded + 2 * GROUP), width, p, p.first + at) : nullptr;
    Sum slopes, products;
    along(width, SUPY_ALONG(i, s, access) {
      const vec g = access.load(grad[r] + i);
      slopes.place[s] += g * access.load(weight + i);
      products.place[s] += g * (access.load(out[r] + i) - access.load(bias + i));
    });
    rstd[r] = !p.rms && width == 1 ? 0 : p.rstd[row + r];
    slope[r] = p.rms ? 0 : slopes.total() / width;
    product[r] = products.total() / width;
  }
  float *dbias = partial, *dweight = partial + padded;
  over(width, SUPY_OVER(i, access) {
    const vec w = access.load(weight + i), c = access.load(bias + i), v = access.load(inverse + i);
    vec gradients{}, products{};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(grad[r] + R * width + i, 0, 2);
      __builtin_prefetch(out[r] + R * width + i, 0, 2);
      const vec g = access.load(grad[r] + i), scaled = access.load(out[r] + i) - c;
      const vec dz = (g * w - slope[r] - scaled * (v * product[r])) * rstd[r];
      if (dx[r] != nullptr) access.template store<STREAM>(dx[r] + i, dz * p.alpha);
      if (dbranch[r] != nullptr)
        access.template store<STREAM>(dbranch[r] + i, DROPOUT ? dz * access.load(factors[r] + i) : dz);
      gradients += g;
      products += g * scaled;
    }
    if (partial != nullptr) {
      storev(dbias + i, loadv(dbias + i) + gradients);
      storev(dweight + i, loadv(dweight + i) + products * v);
    }
  });
}

template <bool DROPOUT, bool STREAM>
static void backward_rows_from_out(const DeepNormBackwardParams& b, const float* weight, const float* bias,
                                   const float* inverse, int64_t begin, int64_t end, float* work, float* partial) {
  clear(partial, 2 * padded_row(b.norm.width));
  int64_t row = begin;
  for (; row + ROWS <= end; row += ROWS)
    backward_from_out<ROWS, DROPOUT, STREAM>(b, weight, bias, inverse, row, work, partial);
  for (; row < end; ++row) backward_from_out<1, DROPOUT, STREAM>(b, weight, bias, inverse, row, work, partial);
  if (STREAM) end_of_stream();
}

template <class T>
static void forward_typed(const DeepNormParams& p, const float* weight, const float* bias, int64_t begin, int64_t end,
                          float* work, bool stream) {
  const bool aligned = aligned_to_vector(static_cast<const T*>(p.out)) && p.width % LANES == 0;
#define SUPY_ROWS(RMS, DROPOUT)                                                          \
  (stream && aligned ? forward_rows<T, RMS, DROPOUT, true>(p, weight, bias, begin, end, work) \
                     : forward_rows<T, RMS, DROPOUT, false>(p, weight, bias, begin, end, work))
  if (p.rms)
    p.dropout ? SUPY_ROWS(true, true) : SUPY_ROWS(true, false);
  else
    p.dropout ? SUPY_ROWS(false, true) : SUPY_ROWS(false, false);
#undef SUPY_ROWS
}

static void deep_norm(const DeepNormParams& p, const float* weight, const float* bias, int64_t begin, int64_t end,
                      float* work, bool stream) {
  switch (p.type) {
    case NormType::f32: return forward_typed<float>(p, weight, bias, begin, end, work, stream);
    case NormType::bf16: return forward_typed<bf16>(p, weight, bias, begin, end, work, stream);
    case NormType::f16: return forward_typed<f16>(p, weight, bias, begin, end, work, stream);
  }
}

template <class T>
static void backward_typed(const DeepNormBackwardParams& b, const float* weight, int64_t begin, int64_t end,
                           float* work, float* partial, bool stream) {
  const DeepNormParams& p = b.norm;
  const bool aligned = aligned_to_vector(static_cast<const T*>(b.dx)) &&
                       aligned_to_vector(static_cast<const T*>(b.dbranch)) && p.width % LANES == 0;
#define SUPY_ROWS(RMS, DROPOUT)                                                                   \
  (stream && aligned ? backward_rows<T, RMS, DROPOUT, true>(b, weight, begin, end, work, partial) \
                     : backward_rows<T, RMS, DROPOUT, false>(b, weight, begin, end, work, partial))
  if (p.rms)
    p.dropout ? SUPY_ROWS(true, true) : SUPY_ROWS(true, false);
  else
    p.dropout ? SUPY_ROWS(false, true) : SUPY_ROWS(false, false);
#undef SUPY_ROWS
}

static void deep_norm_backward(const DeepNormBackwardParams& b, const float* weight, int64_t begin, int64_t end,
                               float* work, float* partial, bool stream) {
  switch (b.norm.type) {
    case NormType::f32: return backward_typed<float>(b, weight, begin, end, work, partial, stream);
    case NormType::bf16: return backward_typed<bf16>(b, weight, begin, end, work, partial, stream);
    case NormType::f16: return backward_typed<f16>(b, weight, begin, end, work, partial, stream);
  }
}

static void deep_norm_backward_from_out(const DeepNormBackwardParams& b, const float* weight, const float* bias,
                                        const float* inverse, int64_t begin, int64_t end, float* work, float* partial,
                                        bool stream) {
  stream = stream && aligned_to_vector(static_cast<const float*>(b.dx)) &&
           aligned_to_vector(static_cast<const float*>(b.dbranch)) && b.norm.width % LANES == 0;
#define SUPY_ROWS(DROPOUT)                                                                                   \
  (stream ? backward_rows_from_out<DROPOUT, true>(b, weight, bias, inverse, begin, end, work, partial)       \
          : backward_rows_from_out<DROPOUT, false>(b, weight, bias, inverse, begin, end, work, partial))
  b.norm.dropout ? SUPY_ROWS(true) : SUPY_ROWS(false);
#undef SUPY_ROWS
}

static void invert(const float* weight, float* inverse, int64_t width) {
  over(width, SUPY_OVER(i, access) {
    access.template store<false>(inverse + i, 1.0f / access.load(weight + i));
  });
}

// A vector of weights as float32, which is what it may be already; `value` everywhere where there is none.
template <class T>
static void widen(const T* in, float* out, int64_t width) {
  over(width, SUPY_OVER(i, access) {
    storev(out + i, access.load(in + i));
  });
}
static void as_floats(const NormVector& v, float value, float* out, int64_t width) {
  if (v.data == nullptr)
    fill(out, width, value);
  else if (v.type == NormType::bf16)
    widen(static_cast<const bf16*>(v.data), out, width);
  else if (v.type == NormType::f16)
    widen(static_cast<const f16*>(v.data), out, width);
}

// The sum of `count` rows of partial sums, `stride` apart, one after the other.
template <class T>
static void add_up(const float* partial, int64_t count, int64_t stride, T* out, int64_t width) {
  over(width, SUPY_OVER(i, access) {
    vec sum = loadv(partial + i);
    for (int64_t c = 1; c < count; ++c) sum += loadv(partial + c * stride + i);
    access.template store<false>(out + i, sum);
  });
}
static void add_partials(const float* partial, int64_t count, int64_t stride, void* out, NormType type, int64_t width) {
  switch (type) {
    case NormType::f32: return add_up(partial, count, stride, static_cast<float*>(out), width);
    case NormType::bf16: return add_up(partial, count, stride, static_cast<bf16*>(out), width);
    case NormType::f16: return add_up(partial, count, stride, static_cast<f16*>(out), width);
  }
}
