// Matrix products on packed operands. A panel holds a matrix in the order in which a product reads it, made once and used
// many times; whatever has to happen to the numbers on the way (an activation, a mask, a conversion) happens in packing.
//
// A panel is a list of slivers: blocks of a few rows of the left matrix, or columns of the right one, over the whole depth
// (the dimension that is summed over). Its unit is the 32-bit word: one float32, or two bfloat16 that are neighbours in depth.
#include "vector.inl"

enum class Side { left, right };

// What packing reads: `LANES` numbers of row i from column j on; zeros beyond the last row and column.
template <class T>
struct Rows {
  const T* data;
  int64_t step, rows, columns;

  vec operator()(int64_t i, int64_t j) const {
    return i < rows && j < columns ? load_some(data + i * step + j, columns - j) : vec{};
  }
};

// --- engines: a word, the multiply-add of words, and the size of the block of results that is kept in registers ------------

struct Float32 {
  static constexpr int WORD = 1, LEFT = LANES == 16 ? 8 : 4, RIGHT = 3 * LANES, CHUNK = 384;
  static constexpr bool TILES = false;

  static void begin() {}
  static void end() {}
  // Words of one row, from word w on; the same word of several rows, from row i on.
  template <class Source>
  static vec along(const Source& in, int64_t i, int64_t w) { return in(i, w); }
  template <class Source>
  static vec across(const Source& in, int64_t w, int64_t i) { return in(w, i); }
  static vec add(vec sum, vec a, vec b) { return sum + a * b; }
  static vec rounded(vec x) { return x; }  // to what a panel holds
  template <class T>
  static void store(T* p, vec x) { storev(p, x); }
};

#if SUPY_LANES == 16
// By inline assembly: the rest of this file is compiled for processors that lack these instructions.
static inline vec two_as_bf16(vec first, vec second) {
  vec result;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(result) : "v"(first), "v"(second));
  return result;
}

struct Bfloat16 {
  static constexpr int WORD = 2;

  static vec rounded(vec x) {
    typedef uint16_t shorts __attribute__((vector_size(64)));
    const shorts both = (shorts)two_as_bf16(vec{}, x);  // x in the upper half, moved to the upper half of each word
    shorts order;
    for (int l = 0; l < 32; ++l) order[l] = l % 2 ? 16 + l / 2 : 0;
    return (vec)__builtin_shuffle(both, order);
  }
  static void store(bf16* p, vec x) {  // a denormal number becomes 0, as in the products
    halves upper;
    asm("vcvtneps2bf16 %1, %0" : "=v"(upper) : "v"(x));
    __builtin_memcpy(p, &upper, sizeof upper);
  }

  template <class Source>
  static vec along(const Source& in, int64_t i, int64_t w) { return two_as_bf16(in(i, 2 * w), in(i, 2 * w + LANES)); }
  template <class Source>
  static vec across(const Source& in, int64_t w, int64_t i) {
    typedef uint16_t shorts __attribute__((vector_size(64)));
    shorts order;
    for (int l = 0; l < 32; ++l) order[l] = l / 2 + l % 2 * 16;
    return (vec)__builtin_shuffle((shorts)two_as_bf16(in(2 * w, i), in(2 * w + 1, i)), order);
  }
};

struct Bfloat16Pairs : Bfloat16 {  // avx512_bf16
  static constexpr int LEFT = 8, RIGHT = 48, CHUNK = 384;
  static constexpr bool TILES = false;

  static void begin() {}
  static void end() {}
  static vec add(vec sum, vec a, vec b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};

// amx_bf16: sums of 16 x 16 in tile registers, 2 x 2 of them. Left tiles are [16 rows][16 words], right tiles turned.
struct Bfloat16Tiles : Bfloat16 {
  static constexpr int LEFT = 32, RIGHT = 32, CHUNK = 256;
  static constexpr bool TILES = true;

  static void begin() {
    struct {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  static void end() { asm volatile("tilerelease"); }
};
#endif

// --- packing ---------------------------------------------------------------------------------------------------------------

// Words of the depth of a panel over k numbers; padded with zeros to whole vectors.
template <class Engine>
static inline int64_t depth_of(int64_t k) { return round_up((k + Engine::WORD - 1) / Engine::WORD, LANES); }

template <class Engine, Side side>
static constexpr int64_t width() { return side == Side::left ? Engine::LEFT : Engine::RIGHT; }

template <class Engine, Side side>
static inline int64_t padded(int64_t rows) {
  return round_up(rows, width<Engine, side>() > LANES ? width<Engine, side>() : LANES);
}

template <class Engine, Side side>
static inline int64_t panel_floats(int64_t rows, int64_t k) { return padded<Engine, side>(rows) * depth_of<Engine>(k); }

// The word of a panel's row; rows are a multiple of the sliver's width and, with tiles, words of 16.
template <class Engine, Side side>
static inline float* at(float* panel, int64_t depth, int64_t row, int64_t word) {
  return panel + row * depth + word * width<Engine, side>();
}

// Stores LANES x LANES words: `block` is [word][row], but for the left side with tiles [row][word].
template <class Engine, Side side>
static inline void put(float* panel, int64_t depth, int64_t row, int64_t word, const vec* block) {
  constexpr int64_t WIDTH = width<Engine, side>();
  if (Engine::TILES) {
    float* to = panel + row / 32 * 32 * depth + word * 32 + row % 32 * 16;
    for (int l = 0; l < LANES; ++l) storev(to + l * LANES, block[l]);
  } else if (WIDTH >= LANES) {
    float* to = panel + row / WIDTH * WIDTH * depth + word * WIDTH + row % WIDTH;
    for (int l = 0; l < LANES; ++l) storev(to + l * WIDTH, block[l]);
  } else {
    for (int64_t part = 0; part < LANES; part += WIDTH) {
      float* to = panel + (row + part) * depth + word * WIDTH;
      for (int l = 0; l < LANES; ++l) __builtin_memcpy(to + l * WIDTH, (const float*)(block + l) + part, 4 * WIDTH);
    }
  }
}

// Rows [first, first + count) of a panel of this depth, of which `words` are written, from the rows of `in`, whose columns
// are the depth. `first`, `count` and `words` are multiples of LANES; `panel` may point to a later word of the depth.
template <class Engine, Side side, class Source>
static inline void pack_rows(const Source& in, int64_t first, int64_t count, int64_t words, int64_t depth, float* panel) {
  for (int64_t i = first; i < first + count; i += LANES)
    for (int64_t w = 0; w < words; w += LANES) {
      vec block[LANES];
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) block[l] = Engine::along(in, i + l, w);
      if (!(Engine::TILES && side == Side::left)) transpose(block);
      put<Engine, side>(panel, depth, i, w, block);
    }
}

// The same from the columns of `in`, whose rows are the depth.
template <class Engine, Side side, class Source>
static inline void pack_columns(const Source& in, int64_t first, int64_t count, int64_t words, int64_t depth, float* panel) {
  for (int64_t w = 0; w < words; w += LANES)
    for (int64_t i = first; i < first + count; i += LANES) {
      vec block[LANES];
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) block[l] = Engine::across(in, w + l, i);
      if (Engine::TILES && side == Side::left) transpose(block);
      put<Engine, side>(panel, depth, i, w, block);
    }
}

// --- the product -----------------------------------------------------------------------------------------------------------

// What a block brings into the caches for those after it: a share of the next sliver of b, and the next block of c. Passed by
// reference: a copy is read in other pieces than it was just written in, and so waits for all stores of the block before.
struct Ahead {
  const float* b;
  int64_t b_share;  // floats of b for each word of this block
  const float* c;
};

template <class Engine, int VECTORS>
static inline void multiply_block(int64_t words, const float* a, const float* b, float* c, int64_t c_step, bool add,
                                  const Ahead& ahead) {
  constexpr int HEIGHT = Engine::LEFT;
  vec sum[HEIGHT][VECTORS];  // registers, which is why every loop over it is unrolled
#pragma GCC unroll 24
  for (int i = 0; i < HEIGHT * VECTORS; ++i)
    sum[i / VECTORS][i % VECTORS] = add ? loadv(c + i / VECTORS * c_step + i % VECTORS * LANES) : vec{};
#pragma GCC unroll 24
  for (int i = 0; i < HEIGHT * VECTORS; ++i) __builtin_prefetch(ahead.c + i / VECTORS * c_step + i % VECTORS * LANES, 1);
  for (int64_t w = 0; w < words; ++w, a += HEIGHT, b += Engine::RIGHT) {
    vec right[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) right[v] = loadv(b + v * LANES);
    __builtin_prefetch(ahead.b + w * ahead.b_share, 0, 2);  // into the second-level cache
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) __builtin_prefetch(b + 8 * Engine::RIGHT + v * LANES);  // and on into the first
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; ++r) {
      const vec left = splat(a[r]);
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = Engine::add(sum[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < HEIGHT * VECTORS; ++i)
    storev(c + i / VECTORS * c_step + i % VECTORS * LANES, sum[i / VECTORS][i % VECTORS]);
}

#if SUPY_LANES == 16
static inline void multiply_tiles(int64_t words, const float* a, const float* b, float* c, int64_t c_step, bool add,
                                  const Ahead& ahead) {
  const int64_t step = 4 * c_step, line = 64;
  float* below = c + 16 * c_step;
  if (add)
    asm volatile(
        "tileloadd (%0,%2,1), %%tmm0\n\ttileloadd 64(%0,%2,1), %%tmm1\n\t"
        "tileloadd (%1,%2,1), %%tmm2\n\ttileloadd 64(%1,%2,1), %%tmm3" ::"r"(c), "r"(below), "r"(step) : "memory");
  else
    asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::);
  for (int64_t w = 0; w < words; w += 16, a += 512, b += 512) {
    for (int64_t l = 0; l < 16 * ahead.b_share; l += 16) __builtin_prefetch(ahead.b + w * ahead.b_share + l, 0, 2);
    asm volatile(
        "tileloadd (%1,%2,1), %%tmm6\n\ttileloadd (%0,%2,1), %%tmm4\n\ttileloadd 1024(%1,%2,1), %%tmm7\n\t"
        "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttileloadd 1024(%0,%2,1), %%tmm5\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
        "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::"r"(a), "r"(b), "r"(line) : "memory");
  }
  for (int64_t r = 0; r < 32; ++r) {
    __builtin_prefetch(ahead.c + r * c_step, 1);
    __builtin_prefetch(ahead.c + r * c_step + 16, 1);
  }
  asm volatile(
      "tilestored %%tmm0, (%0,%2,1)\n\ttilestored %%tmm1, 64(%0,%2,1)\n\t"
      "tilestored %%tmm2, (%1,%2,1)\n\ttilestored %%tmm3, 64(%1,%2,1)" ::"r"(c), "r"(below), "r"(step) : "memory");
}
#endif

// c[m, n] = a b over `words` of the depth, or += with `add`; a and b point to the first of these words. c has rows for
// whole slivers of a, and columns for whole vectors (with tiles, slivers) of b. Each element is one chain of sums in the
// order of the depth, so its bits depend on nothing else.
template <class Engine>
static void multiply(int64_t m, int64_t n, int64_t words, const float* a, int64_t a_depth, const float* b, int64_t b_depth,
                     float* c, int64_t c_step, bool add) {
  const int64_t blocks = (m + Engine::LEFT - 1) / Engine::LEFT, share = (Engine::RIGHT + blocks - 1) / blocks;
  for (int64_t w = 0; w < words; w += Engine::CHUNK, add = true) {
    const int64_t now = at_most(Engine::CHUNK, words - w);
    for (int64_t j = 0; j < n; j += Engine::RIGHT) {
      const float* right = b + j * b_depth + w * Engine::RIGHT;
      const bool last = j + Engine::RIGHT >= n;
      for (int64_t i = 0; i < m; i += Engine::LEFT) {
        const float* left = a + i * a_depth + w * Engine::LEFT;
        float* out = c + i * c_step + j;
        Ahead ahead{right + Engine::RIGHT * b_depth, share, out + Engine::LEFT * c_step};
        ahead.b += i / Engine::LEFT * share * now;
        if (last) ahead.b = right, ahead.b_share = 0;
        if (i + Engine::LEFT >= m) ahead.c = last ? out : c + j + Engine::RIGHT;
#if SUPY_LANES == 16
        if constexpr (Engine::TILES) {
          multiply_tiles(now, left, right, out, c_step, add, ahead);
          continue;
        } else
#endif
            if (n - j > 2 * LANES)
          multiply_block<Engine, 3>(now, left, right, out, c_step, add, ahead);
        else if (n - j > LANES)
          multiply_block<Engine, 2>(now, left, right, out, c_step, add, ahead);
        else
          multiply_block<Engine, 1>(now, left, right, out, c_step, add, ahead);
      }
    }
  }
}
