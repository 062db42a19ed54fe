// Words of philox.inl, many blocks at once; included after vector.inl and philox.inl.
typedef uint64_t wide __attribute__((vector_size(4 * LANES)));
static constexpr int WIDE = LANES / 2;

// Products of the lower halves.
static inline wide multiply(wide a, uint32_t factor) {
#if SUPY_LANES == 16
  typedef long long signed_wide __attribute__((vector_size(64)));
  return (wide)__builtin_ia32_pmuludq512_mask((ivec)a, (ivec)(wide{} + factor), signed_wide{}, -1);
#elif SUPY_LANES == 8
  return (wide)__builtin_ia32_pmuludq256((ivec)a, (ivec)(wide{} + factor));
#else
  return (a & 0xffffffff) * factor;
#endif
}

struct Keys {
  uint32_t word[10][2];
  explicit Keys(uint64_t seed) {
    for (uint32_t round = 0; round < 10; ++round) {
      word[round][0] = (uint32_t)seed + round * PHILOX_STEP0;
      word[round][1] = (uint32_t)(seed >> 32) + round * PHILOX_STEP1;
    }
  }
};

// Words of WIDE blocks in the lower halves of their lanes; what is in the upper halves does not matter.
struct Words {
  wide a, b, c, d;

  // Rounds 1 and 2 know that the counter's upper half is 0 and that its second word is the same in all lanes.
  static inline Words begin(wide low, uint32_t high, const Keys& keys) {
    const wide first = multiply(low, PHILOX_FACTOR0);
    const uint64_t a = (uint64_t)(high ^ keys.word[0][0]) * PHILOX_FACTOR0;
    const wide second = multiply((first >> 32) ^ (wide{} + keys.word[0][1]), PHILOX_FACTOR1);
    return {(second >> 32) ^ (wide{} + keys.word[1][0]), second,
            first ^ (wide{} + ((uint32_t)(a >> 32) ^ keys.word[1][1])), wide{} + (uint32_t)a};
  }
  inline void round(const uint32_t key[2]) {
    const wide first = multiply(a, PHILOX_FACTOR0), second = multiply(c, PHILOX_FACTOR1);
    a = (second >> 32) ^ b ^ (wide{} + key[0]);
    b = second;
    c = (first >> 32) ^ d ^ (wide{} + key[1]);
    d = first;
  }
};

static inline uvec joined(wide even, wide odd) { return (uvec)((even & 0xffffffff) | odd << 32); }

// The two 4 x 4 transposes of which those in each group of four lanes consist.
template <int FIRST, int SECOND, int THIRD, int FOURTH>
static inline vec shuffle(vec a, vec b) {  // places of a group of a, then, from 4 on, of b
  constexpr int place[4] = {FIRST, SECOND, THIRD, FOURTH};
  ivec from;
  for (int l = 0; l < LANES; ++l) from[l] = l / 4 * 4 + place[l % 4] % 4 + (place[l % 4] >= 4 ? LANES : 0);
  return __builtin_shuffle(a, b, from);
}

// Puts the numbers of LANES blocks in place: vector i of the result has the numbers i * LANES to (i + 1) * LANES.
static inline void in_order(vec n[4]) {
  const vec low01 = shuffle<0, 4, 1, 5>(n[0], n[1]), high01 = shuffle<2, 6, 3, 7>(n[0], n[1]);
  const vec low23 = shuffle<0, 4, 1, 5>(n[2], n[3]), high23 = shuffle<2, 6, 3, 7>(n[2], n[3]);
  n[0] = shuffle<0, 1, 4, 5>(low01, low23);
  n[1] = shuffle<2, 3, 6, 7>(low01, low23);
  n[2] = shuffle<0, 1, 4, 5>(high01, high23);
  n[3] = shuffle<2, 3, 6, 7>(high01, high23);
}

static constexpr int GROUP = 4 * LANES;  // numbers that are made together

// Which block of a group each lane makes: lane l of 4 lanes those that in_order puts in place.
struct Order {
  wide even, odd;
  Order() {
    for (int j = 0; j < WIDE; ++j) {
      even[j] = LANES / 4 * (2 * j % 4) + 2 * j / 4;
      odd[j] = LANES / 4 * ((2 * j + 1) % 4) + (2 * j + 1) / 4;
    }
  }
  // The words of blocks low, low + 1, ..., whose second word is the same.
  inline void words(uint32_t low, uint32_t high, const Keys& keys, Words& x, Words& y) const {
    x = Words::begin(even + low, high, keys);
    y = Words::begin(odd + low, high, keys);
#pragma GCC unroll 8
    for (int round = 2; round < 10; ++round) {
      x.round(keys.word[round]);
      y.round(keys.word[round]);
    }
  }
};
