// Vectors of float32 as wide as the instruction set allows, by the compiler's vector types. Included at the top of a
// kernel file, so that there is one copy for each instruction set (multitarget.h).
static constexpr int LANES = SUPY_LANES;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));  // also what a comparison gives: -1 where true

static constexpr float INF = __builtin_inff();

static inline vec loadv(const float* p) {
  vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
static inline void storev(float* p, vec v) { __builtin_memcpy(p, &v, sizeof v); }

typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

static inline vec loadv(const bf16* p) {
  halves v;
  __builtin_memcpy(&v, p, sizeof v);
  return (vec)(__builtin_convertvector(v, uvec) << 16);
}
static inline vec loadv(const uint8_t* p) {
  bytes v;
  __builtin_memcpy(&v, p, sizeof v);
  // By way of uint16_t: g++ 12 takes one byte after the other to int32_t.
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(v, halves), ivec), vec);
}
static inline void storev(bf16* p, vec v) {  // as round_to_bf16
  const uvec word = (uvec)v, rounded = word + 0x7fff + (word >> 16 & 1), nan = word | 0x400000;
  const halves upper = __builtin_convertvector((v != v ? nan : rounded) >> 16, halves);
  __builtin_memcpy(p, &upper, sizeof upper);
}

// float16 is float32 with 5 bits of exponent, of bias 15, and 10 of mantissa; integers do it on any processor.
static inline vec loadv(const f16* p) {
  halves v;
  __builtin_memcpy(&v, p, sizeof v);
  const uvec word = __builtin_convertvector(v, uvec), magnitude = (word & 0x7fff) << 13;
  const uvec finite = (uvec)((vec)magnitude * 0x1p112f);  // also what is below the least normal number
  return (vec)((magnitude >= 0x0f800000 ? magnitude + 0x70000000 : finite) | (word & 0x8000) << 16);
}
static inline void storev(f16* p, vec v) {  // to the nearest, to even
  const uvec word = (uvec)v, magnitude = word & 0x7fffffff;
  const uvec normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  const uvec small = (uvec)((vec)magnitude + 0.5f) - 0x3f000000;  // the sum rounds to multiples of 2^-24
  uvec half = magnitude < 0x38800000 ? small : normal;
  half = magnitude >= 0x477ff000 ? uvec{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? uvec{} + 0x7e00 : half;
  const halves bits = __builtin_convertvector(half | (word >> 16 & 0x8000), halves);
  __builtin_memcpy(p, &bits, sizeof bits);
}

// The first `count` numbers of a row; zeros, or nothing, beyond.
template <class T>
static inline vec load_some(const T* p, int64_t count) {
  if (count >= LANES) return loadv(p);
  vec v{};
  for (int64_t l = 0; l < count; ++l) v[l] = load(p + l);
  return v;
}
template <class T>
static inline void store_some(T* p, vec v, int64_t count) {
  if (count >= LANES) return storev(p, v);
  for (int64_t l = 0; l < count; ++l) store(p + l, v[l]);
}

static inline vec splat(float x) { return x - vec{}; }  // minus: adding 0 would have to turn -0 into 0

// Where one is NaN: b.
static inline vec maxv(vec a, vec b) { return a > b ? a : b; }

static inline float sum_of(vec v) {
  for (int step = LANES / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  return v[0];
}

static inline float max_of(vec v) {
  float top = v[0];
  for (int i = 1; i < LANES; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }


static inline void fill(float* out, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) out[i] = value;
}

// in[i][j] becomes in[j][i].
static inline void transpose(vec rows[LANES]) {
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
    ivec low, high;  // columns with this bit clear come from the first row of a pair
    for (int i = 0; i < LANES; ++i) {
      low[i] = i & step ? LANES + (i ^ step) : i;
      high[i] = i & step ? LANES + i : i ^ step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i & step) continue;
      const vec a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + step] = __builtin_shuffle(a, b, high);
    }
  }
}

// One bit a lane.
static inline uint32_t bits_of(ivec mask) {
#if SUPY_LANES == 16
  return static_cast<uint16_t>(__builtin_ia32_cvtd2mask512(mask));
#elif SUPY_LANES == 8
  return __builtin_ia32_movmskps256((vec)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// e^x to about 1 ulp; 0 below -87.3 (where it is no normal number) and infinity above 88. x = n ln 2 + r, and e^r is a
// polynomial of degree 7 on |r| <= ln 2 / 2.
static inline vec expv(vec x) {
  const vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
  const vec rounded = x * 1.44269504f + shift;
  const vec n = rounded - shift;
  const vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const ivec exponent = ((ivec)rounded + 127) << 23;
  const vec result = p * (vec)exponent;
  return x < -87.3f ? vec{} : x > 88.0f ? splat(INF) : result;
}
