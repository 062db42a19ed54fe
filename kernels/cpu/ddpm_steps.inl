#include "vector.inl"
#include "stream.inl"

static inline ivec bits_as_int(vec x) { return (ivec)x; }
static inline vec bits_as_float(ivec bits) { return (vec)bits; }
static inline ivec as_signed(uvec words) { return (ivec)words; }
static inline vec to_float(uvec words) { return __builtin_convertvector(words, vec); }
static inline vec to_float(ivec words) { return __builtin_convertvector(words, vec); }

static inline vec root(vec x) {
#if SUPY_LANES == 16
  return (vec)__builtin_ia32_sqrtps512_mask(x, x, -1, 4);  // 4: the current rounding
#elif SUPY_LANES == 8
  return __builtin_ia32_sqrtps256(x);
#else
  for (int l = 0; l < LANES; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
#endif
}

#include "philox.inl"  // after what it calls for vectors

#include "philox_words.inl"

// `groups` groups of numbers from block `counter` of the stream on.
template <bool STREAM, class T>
static void normal_groups(T* out, int64_t groups, uint64_t counter, uint64_t seed, const Keys& keys) {
  const Order order;
  for (; groups > 0; --groups, counter += LANES, out += GROUP) {
    const uint32_t low = (uint32_t)counter, high = (uint32_t)(counter >> 32);
    if (low > 0xffffffffu - LANES) {  // the second word changes inside the group
      float numbers[GROUP];
      for (int i = 0; i < LANES; ++i) philox_normal4(counter + i, seed, numbers + 4 * i);
      for (int i = 0; i < 4; ++i) storev(out + i * LANES, loadv(numbers + i * LANES));
      continue;
    }
    Words x, y;
    order.words(low, high, keys, x, y);
    vec n[4];
    box_muller<vec, ivec, uvec>(joined(x.a, y.a), joined(x.b, y.b), n[0], n[1]);
    box_muller<vec, ivec, uvec>(joined(x.c, y.c), joined(x.d, y.d), n[2], n[3]);
    in_order(n);
    for (int i = 0; i < 4; ++i) put<STREAM>(out + i * LANES, n[i]);
  }
}

static constexpr int64_t BLOCK = 1024, SPARE = 2 * GROUP;

// Numbers `first` to `first + count` of the stream, count <= BLOCK, somewhere in the buffer of BLOCK + SPARE.
template <class T>
static inline const T* normal_block(T* buffer, int64_t count, uint64_t first, uint64_t seed, const Keys& keys) {
  const int64_t skipped = first % 4;
  normal_groups<false>(buffer, (skipped + count + GROUP - 1) / GROUP, first / 4, seed, keys);
  return buffer + skipped;
}

template <class T>
static inline void copy(T* out, const T* in, int64_t count) {
  __builtin_memcpy(out, in, count * sizeof(T));
}

template <class T>
static void philox_normal_typed(const NormalParams& p, int threads, bool stream) {
  T* out = static_cast<T*>(p.out);
  const Keys keys(p.seed);
  const int64_t blocks = (p.count + BLOCK - 1) / BLOCK;
  const bool direct = p.first % 4 == 0;
  stream = stream && direct && aligned_to_vector(out);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    T buffer[BLOCK + SPARE];
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * BLOCK, count = at_most(BLOCK, p.count - begin);
      if (!direct || count < BLOCK)
        copy(out + begin, normal_block(buffer, count, p.first + begin, p.seed, keys), count);
      else if (stream)
        normal_groups<true>(out + begin, BLOCK / GROUP, (p.first + begin) / 4, p.seed, keys);
      else
        normal_groups<false>(out + begin, BLOCK / GROUP, (p.first + begin) / 4, p.seed, keys);
    }
    if (stream) end_of_stream();
  }
}

static void philox_normal(const NormalParams& p, int threads, bool stream) {
  if (p.type == StepType::f32)
    philox_normal_typed<float>(p, threads, stream);
  else if (p.type == StepType::bf16)
    philox_normal_typed<bf16>(p, threads, stream);
  else
    philox_normal_typed<f16>(p, threads, stream);
}

// How x0 is clipped in one sample: to +-limit, then times `scale`. A NaN stays one.
struct Clip {
  float limit, scale;
  Clip(const StepParams& p, int64_t sample)
      : limit(p.limits == nullptr ? p.clip : p.limits[sample]), scale(p.limits == nullptr ? 1.0f : p.clip / limit) {}
};

enum class Eps { none, linear, clipped };

// `count` values of one sample.
template <Eps EPS, bool NOISE, bool STREAM, class T>
static inline void step_row(const T* x, const T* eps, const T* noise, T* out, int64_t count, const StepWeights& w,
                            Clip clip) {
  const auto value = [&](vec x, vec eps, vec noise) __attribute__((always_inline)) {
    vec sum = x * w.x;
    if (EPS == Eps::linear) sum += eps * w.eps;
    if (EPS == Eps::clipped) {
      vec x0 = x * w.x_to_x0 + eps * w.eps_to_x0;
      x0 = x0 > clip.limit ? splat(clip.limit) : x0;
      x0 = x0 < -clip.limit ? splat(-clip.limit) : x0;
      sum += x0 * (w.x0 * clip.scale);
    }
    if (NOISE) sum += noise * w.noise;
    return sum;
  };
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    put<STREAM>(out + i, value(loadv(x + i), EPS == Eps::none ? vec{} : loadv(eps + i),
                               NOISE ? loadv(noise + i) : vec{}));
  if (i < count) {  // by way of full vectors
    T rest[3][LANES] = {};
    copy(rest[0], x + i, count - i);
    if (EPS != Eps::none) copy(rest[1], eps + i, count - i);
    if (NOISE) copy(rest[2], noise + i, count - i);
    storev(rest[0], value(loadv(rest[0]), loadv(rest[1]), loadv(rest[2])));
    copy(out + i, rest[0], count - i);
  }
}

template <Eps EPS, class T>
static inline void step_row(const T* x, const T* eps, const T* noise, T* out, int64_t count, const StepWeights& w,
                            Clip clip, bool stream) {
  if (noise == nullptr)
    stream ? step_row<EPS, false, true>(x, eps, noise, out, count, w, clip)
           : step_row<EPS, false, false>(x, eps, noise, out, count, w, clip);
  else
    stream ? step_row<EPS, true, true>(x, eps, noise, out, count, w, clip)
           : step_row<EPS, true, false>(x, eps, noise, out, count, w, clip);
}

template <class T>
static inline T* at(const void* p, int64_t i) {
  return p == nullptr ? nullptr : static_cast<T*>(const_cast<void*>(p)) + i;
}

template <class T>
static void ddpm_steps_typed(const StepParams& p, int threads, bool stream) {
  const Keys keys(p.seed);
  const int64_t total = p.samples * p.size, blocks = (total + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    T buffer[BLOCK + SPARE];
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t end = at_most((b + 1) * BLOCK, total);
      const T* made = nullptr;  // the noise of this block, once a sample in it has a use for it
      for (int64_t begin = b * BLOCK, next; begin < end; begin = next) {
        const int64_t sample = begin / p.size;
        next = at_most(end, (sample + 1) * p.size);
        const StepWeights& w = p.weights[p.shared_weights ? 0 : sample];
        const T* noise = w.noise == 0 ? nullptr : at<T>(p.noise, begin);
        if (p.seeded && (w.noise != 0 || p.made_noise != nullptr)) {
          if (made == nullptr) made = normal_block(buffer, end - b * BLOCK, p.first + b * BLOCK, p.seed, keys);
          noise = made + (begin - b * BLOCK);
          if (p.made_noise != nullptr) copy(at<T>(p.made_noise, begin), noise, next - begin);
          if (w.noise == 0) noise = nullptr;
        }
        const T *x = at<T>(p.x, begin), *eps = at<T>(p.eps, begin);
        T* out = at<T>(p.out, begin);
        const bool past_caches = stream && aligned_to_vector(out);
        const Clip clip(p, sample);
        if (eps == nullptr)
          step_row<Eps::none>(x, eps, noise, out, next - begin, w, clip, past_caches);
        else if (p.clipped)
          step_row<Eps::clipped>(x, eps, noise, out, next - begin, w, clip, past_caches);
        else
          step_row<Eps::linear>(x, eps, noise, out, next - begin, w, clip, past_caches);
      }
    }
    if (stream) end_of_stream();
  }
}

static void ddpm_steps(const StepParams& p, int threads, bool stream) {
  if (p.type == StepType::f32)
    ddpm_steps_typed<float>(p, threads, stream);
  else if (p.type == StepType::bf16)
    ddpm_steps_typed<bf16>(p, threads, stream);
  else
    ddpm_steps_typed<f16>(p, threads, stream);
}

// Gradients of LANES values or fewer.
template <class T>
static inline void backward_row(const StepBackwardParams& p, int64_t begin, int64_t count, const StepWeights& w,
                                Clip clip) {
  for (int64_t i = begin; i < begin + count; i += LANES) {
    const int64_t some = at_most(LANES, begin + count - i);
    T rest[3][LANES] = {};
    copy(rest[0], at<T>(p.grad, i), some);
    const vec grad = loadv(rest[0]);
    vec dx = grad * w.x, deps = grad * w.eps;
    if (p.step.clipped) {
      copy(rest[1], at<T>(p.step.x, i), some);
      copy(rest[2], at<T>(p.step.eps, i), some);
      const vec x0 = loadv(rest[1]) * w.x_to_x0 + loadv(rest[2]) * w.eps_to_x0;
      vec through = grad * (w.x0 * clip.scale);
      through = x0 > clip.limit ? vec{} : through;
      through = x0 < -clip.limit ? vec{} : through;
      dx += through * w.x_to_x0;
      deps = through * w.eps_to_x0;
    }
    const vec parts[3] = {dx, deps, grad * w.noise};
    void* const outs[3] = {p.dx, p.deps, p.dnoise};
    for (int k = 0; k < 3; ++k) {
      if (outs[k] == nullptr) continue;
      storev(rest[0], parts[k]);
      copy(at<T>(outs[k], i), rest[0], some);
    }
  }
}

template <class T>
static void backward_typed(const StepBackwardParams& p, int threads) {
  const int64_t size = p.step.size, total = p.step.samples * size, blocks = (total + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = at_most((b + 1) * BLOCK, total);
    for (int64_t begin = b * BLOCK, next; begin < end; begin = next) {
      const int64_t sample = begin / size;
      next = at_most(end, (sample + 1) * size);
      backward_row<T>(p, begin, next - begin, p.step.weights[p.step.shared_weights ? 0 : sample], Clip(p.step, sample));
    }
  }
}

static void ddpm_steps_backward(const StepBackwardParams& p, int threads) {
  if (p.step.type == StepType::f32)
    backward_typed<float>(p, threads);
  else if (p.step.type == StepType::bf16)
    backward_typed<bf16>(p, threads);
  else
    backward_typed<f16>(p, threads);
}

// The bits of |x0|: as integers they are ordered like the numbers, NaN last.
template <class T>
static inline ivec magnitude(const StepParams& p, int64_t i, int64_t some, const StepWeights& w) {
  T x[LANES] = {}, eps[LANES] = {};
  copy(x, at<T>(p.x, i), some);
  copy(eps, at<T>(p.eps, i), some);
  return bits_as_int(loadv(x) * w.x_to_x0 + loadv(eps) * w.eps_to_x0) & 0x7fffffff;
}

// How many of a sample are less than `bound`, and the least of the others.
template <class T>
static int64_t count_below(const StepParams& p, int64_t sample, const StepWeights& w, int32_t bound, int32_t& above) {
  ivec least = ivec{} + 0x7fffffff;
  int64_t total = 0;
  const int64_t begin = sample * p.size, end = begin + p.size;
  for (int64_t i = begin; i < end;) {
    ivec count{};
    const int64_t part = at_most(end, i + (1 << 20));
    for (; i + LANES <= part; i += LANES) {
      const ivec bits = magnitude<T>(p, i, LANES, w), below = bits < bound;
      count -= below;
      const ivec other = bits | below;  // -1 where below
      least = (uvec)other < (uvec)least ? other : least;
    }
    if (i < part) {
      ivec bits = magnitude<T>(p, i, part - i, w);
      for (int64_t l = part - i; l < LANES; ++l) bits[l] = 0x7fffffff;
      const ivec below = bits < bound, other = bits | below;
      count -= below;
      least = (uvec)other < (uvec)least ? other : least;
      i = part;
    }
    for (int l = 0; l < LANES; ++l) total += count[l];
  }
  above = least[0];
  for (int l = 1; l < LANES; ++l) above = least[l] < above ? least[l] : above;
  return total;
}

// The number of rank `rank` by its bits from the highest down, without memory for |x0|: each look counts what is less.
template <class T>
static float limit_of(const StepLimitsParams& p, int64_t sample, const StepWeights& w) {
  const StepParams& s = p.step;
  const double place = p.quantile * static_cast<double>(s.size - 1);
  const int64_t rank = static_cast<int64_t>(place);
  int32_t found = 0, above = 0;
  if (count_below<T>(s, sample, w, 0x7f800001, above) < s.size) return __builtin_nanf("");
  for (int bit = 30; bit >= 0; --bit)
    if (count_below<T>(s, sample, w, found | 1 << bit, above) <= rank) found |= 1 << bit;
  const int64_t not_above = count_below<T>(s, sample, w, found + 1, above);
  const float low = bits_as_float(found);
  const float high = not_above > rank + 1 || rank + 1 >= s.size ? low : bits_as_float(above);
  const double value = place > rank ? low + (static_cast<double>(high) - low) * (place - rank) : low;
  return value > s.clip ? static_cast<float>(value) : s.clip;
}

static void ddpm_steps_limits(const StepLimitsParams& p, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (int64_t sample = 0; sample < p.step.samples; ++sample) {
    const StepWeights& w = p.step.weights[p.step.shared_weights ? 0 : sample];
    if (p.step.type == StepType::f32)
      p.limits[sample] = limit_of<float>(p, sample, w);
    else if (p.step.type == StepType::bf16)
      p.limits[sample] = limit_of<bf16>(p, sample, w);
    else
      p.limits[sample] = limit_of<f16>(p, sample, w);
  }
}
