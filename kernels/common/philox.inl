// Philox4x32-10 (Salmon et al., SC 2011) and the transform of Box and Muller: for one number, as CUDA has it, and for
// the vectors of vector.inl. Included inside a namespace: one copy for each instruction set (multitarget.h).
#ifdef __CUDACC__
#define SUPY_SHARED __host__ __device__ __forceinline__
#else
#define SUPY_SHARED inline
#endif

constexpr uint32_t PHILOX_FACTOR0 = 0xD2511F53, PHILOX_FACTOR1 = 0xCD9E8D57;
constexpr uint32_t PHILOX_STEP0 = 0x9E3779B9, PHILOX_STEP1 = 0xBB67AE85;

// Four words out of block `counter` of the stream `seed`; the upper half of the counter is 0.
static SUPY_SHARED void philox(uint64_t counter, uint64_t seed, uint32_t words[4]) {
  uint32_t a = (uint32_t)counter, b = (uint32_t)(counter >> 32), c = 0, d = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = (uint64_t)PHILOX_FACTOR0 * a, second = (uint64_t)PHILOX_FACTOR1 * c;
    a = (uint32_t)(second >> 32) ^ b ^ k0;
    b = (uint32_t)second;
    c = (uint32_t)(first >> 32) ^ d ^ k1;
    d = (uint32_t)first;
    k0 += PHILOX_STEP0;
    k1 += PHILOX_STEP1;
  }
  words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}

// Words as what the transform computes with; vector.inl's vectors have their own overloads.
static SUPY_SHARED int32_t bits_as_int(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static SUPY_SHARED float bits_as_float(int32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static SUPY_SHARED int32_t as_signed(uint32_t word) { return (int32_t)word; }
static SUPY_SHARED float to_float(uint32_t word) { return (float)word; }
static SUPY_SHARED float to_float(int32_t word) { return (float)word; }
static SUPY_SHARED float root(float x) { return sqrtf(x); }

// Two independent normal numbers, sqrt(-2 log u) times cosine and sine of 2 pi w1 / 2^32, u = w0 / 2^32 + 1 / 2^33.
// Logarithm, sine and cosine are good to about 1 ulp, also near their zeros.
template <class F, class I, class U>
static SUPY_SHARED void box_muller(U w0, U w1, F& cosine_part, F& sine_part) {
  const F u = to_float(w0) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
  // u = 2^n (1 + f) with |f| at the least; log(1 + f) = f - f^2 / 2 + f^3 p.
  const I shifted = bits_as_int(u) - 0x3f3504f3;
  const F n = to_float(shifted >> 23), f = bits_as_float((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  F p = f * 0.08700436f - 0.14267486f;
  p = p * f + 0.14914767f;
  p = p * f - 0.16577585f;
  p = p * f + 0.19963063f;
  p = p * f - 0.25001338f;
  p = p * f + 0.3333391f;
  const F square = f * f;
  const F logarithm = n * 0.69314718f + (f + square * (p * f - 0.5f));
  const F radius = root(logarithm * -2.0f);
  // The angle is a multiple of a right angle, in the upper two bits, plus at most half of one.
  const U turned = w1 + 0x20000000u;
  const F angle = to_float(as_signed(w1 << 2)) * (1.57079633f * 2.3283064365386963e-10f);
  const F r = angle * angle;
  F s = r * -1.9515282e-4f + 8.3321603e-3f;
  s = s * r - 1.6666655e-1f;
  const F sine = angle * r * s + angle;
  F c = r * 2.4433157e-5f - 1.3887316e-3f;
  c = c * r + 4.1666646e-2f;
  const F cosine = r * r * c + (1.0f - 0.5f * r);
  const auto odd = as_signed(turned << 1) < 0;
  const F first = odd ? sine : cosine, second = odd ? cosine : sine;
  const I sign_first = as_signed((turned + 0x40000000u) & 0x80000000u), sign_second = as_signed(turned & 0x80000000u);
  cosine_part = radius * bits_as_float(bits_as_int(first) ^ sign_first);
  sine_part = radius * bits_as_float(bits_as_int(second) ^ sign_second);
}

// The four numbers of one block.
static SUPY_SHARED void philox_normal4(uint64_t counter, uint64_t seed, float out[4]) {
  uint32_t words[4];
  philox(counter, seed, words);
  box_muller<float, int32_t, uint32_t>(words[0], words[1], out[0], out[1]);
  box_muller<float, int32_t, uint32_t>(words[2], words[3], out[2], out[3]);
}
