// Mixed-chunk attention of one sample. See supy/reference/mixed_chunk_attention.py for the formula.
//
// The sample is taken in segments of a few chunks, and each of them in passes: over chunks (their weights A, packed),
// over blocks of E, one chunk after another (rows of the result, and the sums M and dM), and over chunks again
// (products that sum over E). The threads share out the chunks or the blocks of a pass. No sum is split among them, so
// that their number shows in no bit.
#include "panels.inl"

static constexpr int64_t STRIP = 32;      // rows of a triangle that are taken at once: whole slivers of every engine
static constexpr int64_t BLOCK = 384;     // numbers of E that are taken at once: likewise
static constexpr int64_t SEGMENT = 2048;  // tokens of a segment, in at most MOST chunks
static constexpr int64_t MOST = 8;

static inline vec only_first(vec v, int64_t count) {
  ivec lane;
  for (int l = 0; l < LANES; ++l) lane[l] = l;
  return lane < static_cast<int32_t>(count < 0 ? 0 : count < LANES ? count : LANES) ? v : vec{};
}

// --- one sample -------------------------------------------------------------------------------------------------------

template <class Engine, class T>
struct MixedChunk {
  const MixedChunkParams& p;
  const int64_t b, c, S, E;  // c: at most T tokens
  const int64_t length, segment, segments;
  const int64_t over_tokens, over_keys;  // depth of panels that sum over a chunk's tokens, over S
  const int64_t square, step;            // columns of scores; of M, and of results
  const bool gradients;
  const float factor;

  struct Chunk {
    float *A, *A_turned, *q, *q_turned, *k, *k_turned;  // left panels of the weights, of q_lin and of k_lin
    float *M, *dM;                                      // what the chunk's linear part reads, [S, step]
    float* g;                                           // u * grad, [c, step]
  } chunks[MOST];
  float *M, *dM, *starts;  // starts: M before each segment
  float* own;              // of the threads
  int64_t own_floats, floats;

  struct Own {
    float *left, *right, *keys, *values, *result, *turned, *scores, *grads, *floats;
  };

  MixedChunk(const MixedChunkParams& p, int64_t b, int threads, float* memory)
      : p(p), b(b), c(at_most(p.chunk, p.tokens)), S(p.key_size), E(p.value_size),
        length(memory == nullptr ? 0 : p.lengths[b]),
        segment(SEGMENT / c < 1 ? 1 : at_most(at_most(SEGMENT / c, MOST), (p.tokens + c - 1) / c)),
        segments((p.tokens + segment * c - 1) / (segment * c)), over_tokens(depth_of<Engine>(c)),
        over_keys(depth_of<Engine>(S)), square(padded<Engine, Side::right>(c)), step(padded<Engine, Side::right>(E)),
        gradients(p.grad.data != nullptr),
        factor(1.0f / (static_cast<float>(S > 0 ? S : 1) * static_cast<float>(p.chunk))) {
    Pieces pieces(memory);
    const int64_t sums = padded<Engine, Side::left>(S) * step;
    M = pieces.take(sums);
    dM = gradients ? pieces.take(sums) : nullptr;
    starts = gradients && p.causal ? pieces.take(segments * sums) : nullptr;
    for (int64_t i = 0; i < segment; ++i) {
      Chunk& chunk = chunks[i];
      chunk.A = pieces.take(panel_floats<Engine, Side::left>(c, c));
      chunk.q = pieces.take(panel_floats<Engine, Side::left>(c, S));
      chunk.k_turned = pieces.take(panel_floats<Engine, Side::left>(S, c));
      if (!gradients) continue;
      chunk.M = pieces.take(sums);
      chunk.A_turned = pieces.take(panel_floats<Engine, Side::left>(c, c));
      chunk.k = pieces.take(panel_floats<Engine, Side::left>(c, S));
      chunk.q_turned = pieces.take(panel_floats<Engine, Side::left>(S, c));
      chunk.dM = pieces.take(sums);
      chunk.g = pieces.take(c * step);
    }
    const int64_t shared = pieces.used();
    own = pieces.take(0);
    take_own(pieces);
    own_floats = pieces.used() - shared;
    floats = shared + threads * own_floats;  // a multiple of 16, as each piece is
  }

  // Panels for one thread: of a chunk's rows, its columns or keys, the sums; and results.
  Own take_own(Pieces& pieces) const {
    const int64_t block = at_most(BLOCK, round_up(E, LANES)), wide = S > block ? S : block;
    const int64_t high = padded<Engine, Side::left>(c > S ? c : S), long_ = c > wide ? c : wide;
    Own own;
    own.left = pieces.take(panel_floats<Engine, Side::left>(high, long_));
    own.right = pieces.take(panel_floats<Engine, Side::right>(long_, long_));
    own.keys = pieces.take(panel_floats<Engine, Side::right>(wide, wide));
    own.values = gradients ? pieces.take(panel_floats<Engine, Side::left>(S, block)) : nullptr;
    own.result = pieces.take(high * padded<Engine, Side::right>(long_));
    own.turned = gradients ? pieces.take(padded<Engine, Side::left>(S) * square) : nullptr;
    own.scores = pieces.take(padded<Engine, Side::left>(c) * square);
    own.floats = pieces.take(c * round_up(S, LANES));
    own.grads = gradients ? pieces.take(padded<Engine, Side::left>(c) * square) : nullptr;
    return own;
  }
  Own own_of(int thread) const {
    Pieces pieces(own + thread * own_floats);
    return take_own(pieces);
  }

  int64_t tokens_of(int64_t chunk) const {  // below the sample's length
    const int64_t left = length - chunk * c;
    return left < 0 ? 0 : at_most(left, c);
  }
  float weight(int64_t chunk) const { return p.weights[b * p.weight_batch_step + chunk * p.weight_chunk_step]; }

  // Tokens of a chunk; columns from `column` on.
  Rows<T> rows(const TokenMatrix& x, int64_t chunk, int64_t columns, int64_t column = 0) const {
    if (x.data == nullptr) return {nullptr, 0, 0, 0};
    return {token(x, chunk * c) + column, x.token_step, tokens_of(chunk), columns};
  }
  T* token(const TokenMatrix& x, int64_t t) const {
    return static_cast<T*>(x.data) + b * x.batch_step + t * x.token_step;
  }

  // --- packing: one copy of each for the many places that need it, because the compiler takes long over them

  template <class From>
  __attribute__((noinline)) static void left_rows(const Rows<From>& in, int64_t rows, int64_t depth, float* panel) {
    pack_rows<Engine, Side::left>(in, 0, padded<Engine, Side::left>(rows), depth, depth, panel);
  }
  template <class From>
  __attribute__((noinline)) static void right_rows(const Rows<From>& in, int64_t rows, int64_t depth, float* panel) {
    pack_rows<Engine, Side::right>(in, 0, padded<Engine, Side::right>(rows), depth, depth, panel);
  }
  template <class From>
  __attribute__((noinline)) static void left_columns(const Rows<From>& in, int64_t columns, int64_t depth,
                                                     float* panel) {
    pack_columns<Engine, Side::left>(in, 0, padded<Engine, Side::left>(columns), depth, depth, panel);
  }
  template <class From>
  __attribute__((noinline)) static void right_columns(const Rows<From>& in, int64_t columns, int64_t depth,
                                                      float* panel) {
    pack_columns<Engine, Side::right>(in, 0, padded<Engine, Side::right>(columns), depth, depth, panel);
  }

  // to = factor x, or factor x y where there is a y, of columns a multiple of LANES apart.
  Rows<float> product(const Rows<T>& x, const Rows<T>& y, float factor, float* to, int64_t to_step) const {
    const int64_t whole = x.columns / LANES * LANES;
    for (int64_t i = 0; i < x.rows; ++i) {
      const T *a = x.data + i * x.step, *b = y.data + i * y.step;
      float* row = to + i * to_step;
      if (y.data == nullptr)
        for (int64_t j = 0; j < whole; j += LANES) storev(row + j, factor * loadv(a + j));
      else
        for (int64_t j = 0; j < whole; j += LANES) storev(row + j, factor * (loadv(a + j) * loadv(b + j)));
      for (int64_t j = whole; j < x.columns; ++j)
        row[j] = factor * (y.data == nullptr ? load(a + j) : load(a + j) * load(b + j));
    }
    return {to, to_step, x.rows, x.columns};
  }
  // u * grad.
  Rows<float> gated(int64_t chunk, const Chunk& from, int64_t columns, int64_t column) const {
    return {from.g + column, step, tokens_of(chunk), columns};
  }
  // Columns of M or dM.
  Rows<float> block_of(const float* sums, int64_t e, int64_t columns) const { return {sums + e, step, S, columns}; }

  // --- products of a square of tokens, of which a causal form needs the lower triangle

  // c[i][j] = a_i b_j, with every sum over `words`.
  void square_product(int64_t n, int64_t words, float* a, const float* b, float* to, bool add) const {
    const int64_t high = p.causal ? STRIP : n;
    for (int64_t i = 0; i < n; i += high) {
      const int64_t count = at_most(high, n - i);
      multiply<Engine>(count, p.causal ? i + count : n, words, at<Engine, Side::left>(a, words, i, 0), words, b, words,
                       to + i * square, square, add);
    }
  }
  // c = a b, with a[i][j] = 0 where j > i, or, turned, where j < i.
  void triangle_times(int64_t n, int64_t columns, bool turned, float* a, float* b, float* to, int64_t to_step) const {
    const int64_t high = p.causal ? STRIP : n;
    for (int64_t i = 0; i < n; i += high) {
      const int64_t count = at_most(high, n - i);
      const int64_t first = p.causal && turned ? i / Engine::WORD : 0;
      const int64_t last = depth_of<Engine>(p.causal && !turned ? i + count : n);
      const float* left = at<Engine, Side::left>(a, over_tokens, i, first);
      const float* right = at<Engine, Side::right>(b, over_tokens, 0, first);
      multiply<Engine>(count, columns, last - first, left, over_tokens, right, over_tokens, to + i * to_step, to_step,
                       false);
    }
  }

  // --- passes over chunks

  void scores(int64_t chunk, const Own& own) const {
    const int64_t n = tokens_of(chunk);
    left_rows(rows(p.q_quad, chunk, S), n, over_keys, own.left);
    right_rows(rows(p.k_quad, chunk, S), n, over_keys, own.right);
    square_product(n, over_keys, own.left, own.right, own.scores, false);
  }

  // From s = q k^T: the weights factor relu(s)^2, or, over their gradients, those of s. Zero where no key is seen.
  Rows<float> weigh(int64_t n, float* grads, const Own& own) const {
    float* to = grads == nullptr ? own.scores : grads;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; j += LANES) {
        const int64_t at = i * square + j;
        const vec s = maxv(vec{}, loadv(own.scores + at));
        const vec value = grads == nullptr ? s * s * factor : s * loadv(grads + at) * (2 * factor);
        storev(to + at, only_first(value, (p.causal ? i + 1 : n) - j));
      }
    return {to, square, n, n};
  }

  // Panels that the linear parts read. With `all`, also the weights and what gradients need.
  void pack_chunk(int64_t chunk, const Chunk& to, const Own& own, bool all) const {
    const int64_t n = tokens_of(chunk);
    const Rows<T> q = rows(p.q_lin, chunk, S), k = rows(p.k_lin, chunk, S);
    left_columns(k, S, over_tokens, to.k_turned);
    const Rows<float> weighted = product(q, {}, weight(chunk), own.floats, round_up(S, LANES));
    if (gradients) left_columns(weighted, S, over_tokens, to.q_turned);
    if (gradients && (all || !p.causal)) product(rows(p.grad, chunk, E), rows(p.u, chunk, E), 1, to.g, step);
    if (!all) return;
    left_rows(weighted, n, over_keys, to.q);
    scores(chunk, own);
    const Rows<float> A = weigh(n, nullptr, own);
    left_rows(A, n, over_tokens, to.A);
    if (!gradients) return;
    left_rows(k, n, over_keys, to.k);
    left_columns(A, n, over_tokens, to.A_turned);
  }

  // --- passes over blocks of E, from column e on

  // M += k_lin^T v, or dM += weight q_lin^T (u grad), with the latter in own.right.
  void add_to(float* sums, const float* turned, int64_t n, int64_t e, int64_t columns, const Own& own) const {
    multiply<Engine>(S, columns, depth_of<Engine>(n), turned, over_tokens, own.right, over_tokens, sums + e, step,
                     true);
  }

  // own.result = A x + y M, with x in own.right.
  void attend(float* A, bool turned, const float* y, const float* sums, int64_t n, int64_t e, int64_t columns,
              const Own& own) const {
    const int64_t wide = padded<Engine, Side::right>(columns);
    right_columns(block_of(sums, e, columns), columns, over_keys, own.keys);
    triangle_times(n, columns, turned, A, own.right, own.result, wide);
    multiply<Engine>(n, columns, over_keys, y, over_keys, own.keys, over_keys, own.result, wide, true);
  }

  // to = x factor, or own.result where there is no factor.
  void write_block(const TokenMatrix& to, const TokenMatrix& factor, int64_t chunk, int64_t e, int64_t columns,
                   const Own& own) const {
    const Rows<T> by = rows(factor, chunk, columns, e);
    const int64_t wide = padded<Engine, Side::right>(columns), whole = columns / LANES * LANES;
    for (int64_t i = 0; i < tokens_of(chunk); ++i) {
      T* row = token(to, chunk * c + i) + e;
      const float* from = own.result + i * wide;
      const T* f = by.data + i * by.step;
      if (by.data == nullptr)
        for (int64_t j = 0; j < whole; j += LANES) storev(row + j, loadv(from + j));
      else
        for (int64_t j = 0; j < whole; j += LANES) storev(row + j, loadv(from + j) * loadv(f + j));
      for (int64_t j = whole; j < columns; ++j) store(row + j, by.data == nullptr ? from[j] : from[j] * load(f + j));
    }
  }

  // M and dM go on changing; the chunk keeps what it has read.
  void copy_sums(const float* from, float* to, int64_t e, int64_t columns) const {
    for (int64_t s = 0; s < S; ++s)
      for (int64_t j = e; j < e + columns; j += LANES) storev(to + s * step + j, loadv(from + s * step + j));
  }

  void sum_block(int64_t first, int64_t last, int64_t e, int64_t columns, const Own& own) const {
    for (int64_t g = first; g < last; ++g) {
      right_columns(rows(p.v, g, columns, e), columns, over_tokens, own.right);
      add_to(M, chunks[g - first].k_turned, tokens_of(g), e, columns, own);
      if (!gradients || p.causal) continue;
      right_columns(gated(g, chunks[g - first], columns, e), columns, over_tokens, own.right);
      add_to(dM, chunks[g - first].q_turned, tokens_of(g), e, columns, own);
    }
  }

  void forward_block(int64_t first, int64_t last, int64_t e, int64_t columns, const Own& own) const {
    for (int64_t g = first; g < last; ++g) {
      const Chunk& chunk = chunks[g - first];
      if (gradients) copy_sums(M, chunk.M, e, columns);
      right_columns(rows(p.v, g, columns, e), columns, over_tokens, own.right);
      if (!gradients || p.du.data != nullptr) attend(chunk.A, false, chunk.q, M, tokens_of(g), e, columns, own);
      if (p.out.data != nullptr) write_block(p.out, p.u, g, e, columns, own);
      if (p.du.data != nullptr) write_block(p.du, p.grad, g, e, columns, own);
      if (p.causal && !(gradients && g == last - 1)) add_to(M, chunk.k_turned, tokens_of(g), e, columns, own);
    }
  }

  void backward_block(int64_t first, int64_t last, int64_t e, int64_t columns, const Own& own) const {
    for (int64_t g = last; g-- > first;) {
      const Chunk& chunk = chunks[g - first];
      copy_sums(dM, chunk.dM, e, columns);
      right_columns(gated(g, chunk, columns, e), columns, over_tokens, own.right);
      attend(chunk.A_turned, true, chunk.k, dM, tokens_of(g), e, columns, own);
      write_block(p.dv, {}, g, e, columns, own);
      if (p.causal) add_to(dM, chunk.q_turned, tokens_of(g), e, columns, own);
    }
  }

  // --- the last pass of gradients, over chunks

  void write_keys(const TokenMatrix& to, int64_t chunk, float factor, bool turned, const float* from,
                  int64_t from_step) const {
    for (int64_t i = 0; i < tokens_of(chunk); ++i) {
      T* row = token(to, chunk * c + i);
      for (int64_t s = 0; s < S; ++s) store(row + s, factor * from[turned ? s * from_step + i : i * from_step + s]);
    }
  }

  void key_gradients(int64_t g, const Chunk& chunk, const Own& own) const {
    const int64_t n = tokens_of(g), keys = padded<Engine, Side::right>(S);
    for (int64_t e = 0; e < E; e += BLOCK) {
      const int64_t columns = at_most(BLOCK, E - e), deep = depth_of<Engine>(columns);
      left_rows(gated(g, chunk, columns, e), n, deep, own.left);
      right_rows(rows(p.v, g, columns, e), n, deep, own.right);
      right_rows(block_of(chunk.M, e, columns), S, deep, own.keys);
      left_rows(block_of(chunk.dM, e, columns), S, deep, own.values);
      square_product(n, deep, own.left, own.right, own.grads, e > 0);
      multiply<Engine>(n, S, deep, own.left, deep, own.keys, deep, own.result, keys, e > 0);
      multiply<Engine>(S, n, deep, own.values, deep, own.right, deep, own.turned, square, e > 0);
    }
    write_keys(p.dq_lin, g, weight(g), false, own.result, keys);
    write_keys(p.dk_lin, g, 1, true, own.turned, square);

    scores(g, own);
    const Rows<float> dS = weigh(n, own.grads, own);
    left_rows(dS, n, over_tokens, own.left);
    right_columns(rows(p.k_quad, g, S), S, over_tokens, own.right);
    triangle_times(n, S, false, own.left, own.right, own.result, keys);
    write_keys(p.dq_quad, g, 1, false, own.result, keys);
    left_columns(dS, n, over_tokens, own.left);
    right_columns(rows(p.q_quad, g, S), S, over_tokens, own.right);
    triangle_times(n, S, true, own.left, own.right, own.result, keys);
    write_keys(p.dk_quad, g, 1, false, own.result, keys);
  }

  // --- the whole

  template <class Body>
  void share(int64_t count, int threads, const Body& body) const {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#ifdef _OPENMP
      const Own own = own_of(threads > 1 ? omp_get_thread_num() : 0);
#else
      const Own own = own_of(0);
#endif
      Engine::begin();
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < count; ++i) body(i, own);
      Engine::end();
    }
  }

  // Blocks of E, at least one a thread where there are enough columns.
  template <class Body>
  void share_blocks(int threads, const Body& body) const {
    int64_t size = round_up((E + threads - 1) / threads, 96);
    size = at_most(size, BLOCK);
    share((E + size - 1) / size, threads,
          [&](int64_t i, const Own& own) { body(i * size, at_most(size, E - i * size), own); });
  }

  void read_sums(const float* from, float* sums) const {
    for (int64_t s = 0; s < padded<Engine, Side::left>(S); ++s)
      for (int64_t e = 0; e < step; ++e)
        sums[s * step + e] = from != nullptr && s < S && e < E ? from[(b * S + s) * E + e] : 0;
  }
  void write_sums(const float* sums, float* to) const {
    if (to == nullptr) return;
    for (int64_t s = 0; s < S; ++s) __builtin_memcpy(to + (b * S + s) * E, sums + s * step, 4 * E);
  }

  void clear_padding() const {
    const TokenMatrix all[] = {p.dq_quad, p.dk_quad, p.dq_lin, p.dk_lin, p.dv, p.du, p.out};
    for (int i = 0; i < 7; ++i)
      for (int64_t t = length; t < p.tokens && all[i].data != nullptr; ++t)
        __builtin_memset(token(all[i], t), 0, (i < 4 ? S : E) * sizeof(T));
  }

  void run(int threads) const {
    const int64_t last_chunk = (length + c - 1) / c;
    const auto each_segment = [&](bool reverse, const auto& body) {
      for (int64_t i = 0; i < segments; ++i) {
        const int64_t s = reverse ? segments - 1 - i : i, first = s * segment;
        const int64_t last = at_most(first + segment, last_chunk);
        if (first < last) body(s, first, last);
      }
    };
    const auto pack = [&](int64_t first, int64_t last, bool all) {
      share(last - first, threads,
            [&](int64_t i, const Own& own) { pack_chunk(first + i, chunks[i], own, all); });
    };
    const int64_t sums = padded<Engine, Side::left>(S) * step;
    read_sums(p.before, M);
    if (gradients) read_sums(p.dafter, dM);

    if (!p.causal || gradients)
      each_segment(false, [&](int64_t s, int64_t first, int64_t last) {
        if (p.causal) __builtin_memcpy(starts + s * sums, M, 4 * sums);
        if (p.causal && last == last_chunk) return;
        pack(first, last, false);
        share_blocks(threads, [&](int64_t e, int64_t columns, const Own& own) {
          sum_block(first, last, e, columns, own);
        });
      });
    each_segment(gradients, [&](int64_t s, int64_t first, int64_t last) {
      pack(first, last, true);
      if (starts != nullptr) __builtin_memcpy(M, starts + s * sums, 4 * sums);
      share_blocks(threads, [&](int64_t e, int64_t columns, const Own& own) {
        forward_block(first, last, e, columns, own);
        if (gradients) backward_block(first, last, e, columns, own);
      });
      if (gradients)
        share(last - first, threads, [&](int64_t i, const Own& own) { key_gradients(first + i, chunks[i], own); });
    });
    write_sums(M, p.after);
    if (gradients) write_sums(dM, p.dbefore);
    clear_padding();
  }
};

template <class Engine, class T>
static int64_t mixed_chunk_of(const MixedChunkParams& p, int64_t b, int threads, float* memory) {
  const MixedChunk<Engine, T> sample(p, b, threads, memory);
  if (memory != nullptr) sample.run(threads);
  return sample.floats;
}

// The floats of memory that a sample needs; with memory, also computes it.
static int64_t mixed_chunk_sample(const MixedChunkParams& p, int64_t b, int threads, float* memory) {
  if (p.type == FloatType::f32) return mixed_chunk_of<Float32, float>(p, b, threads, memory);
#if SUPY_LANES == 16
  if (p.unit == MatrixUnit::tiles) return mixed_chunk_of<Bfloat16Tiles, bf16>(p, b, threads, memory);
  if (p.unit == MatrixUnit::pairs) return mixed_chunk_of<Bfloat16Pairs, bf16>(p, b, threads, memory);
#endif
  return mixed_chunk_of<Float32, bf16>(p, b, threads, memory);
}
