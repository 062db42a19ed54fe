// float32 from and to the storage type, rounding to nearest even; one copy for each instruction set (multitarget.h).
static inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// The upper half of the word is the bfloat16.
static inline uint32_t round_to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const uint32_t nan = bits | 0x400000;  // keeps a NaN a NaN where rounding would carry into infinity
  return value != value ? nan : rounded;
}

static inline float load(const float* p) { return *p; }
static inline float load(const bf16* p) { return float_of(static_cast<uint32_t>(p->bits) << 16); }
static inline float load(const uint8_t* p) { return *p; }
static inline void store(float* p, float value) { *p = value; }
static inline void store(bf16* p, float value) { p->bits = static_cast<uint16_t>(round_to_bf16(value) >> 16); }

// Two neighbours at once: for bfloat16 one word, which spares the compiler the shuffles.
struct Pair {
  float a, b;
};

static inline Pair load_pair(const float* p) { return {p[0], p[1]}; }
static inline void store_pair(float* p, Pair pair) { p[0] = pair.a, p[1] = pair.b; }

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
static inline Pair load_pair(const bf16* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return {float_of(word << 16), float_of(word & 0xffff0000)};
}

static inline void store_pair(bf16* p, Pair pair) {
  const uint32_t word = round_to_bf16(pair.a) >> 16 | (round_to_bf16(pair.b) & 0xffff0000);
  __builtin_memcpy(p, &word, 4);
}
#else
static inline Pair load_pair(const bf16* p) { return {load(p), load(p + 1)}; }
static inline void store_pair(bf16* p, Pair pair) { store(p, pair.a), store(p + 1, pair.b); }
#endif
