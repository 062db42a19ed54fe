// Mixed-chunk attention, and the layer around it, in blocks of rows of a chunk, on packed operands. See
// supy/reference/mixed_chunk_attention.py for the formula.
//
// Both parts of a row are one product: [w q_lin, A] [M; v], and so are their gradients: [dq_lin, dA] = g [M; v]^T and
// dv = [A^T, k_lin] [g; dM]. What a causal row sees is the beginning of such a panel, what a key is seen by its end.
#include "gau_attention.inl"

static inline vec only_first(vec v, int64_t count) {
  ivec lane;
  for (int l = 0; l < LANES; ++l) lane[l] = l;
  return lane < static_cast<int32_t>(count < 0 ? 0 : count < LANES ? count : LANES) ? v : vec{};
}

template <class T>
struct Shifted {
  Rows<T> rows;
  int64_t by;
  vec operator()(int64_t i, int64_t j) const { return rows(i - by, j); }
};

template <class Engine, class T>
struct Mixed : Gau<Engine, T> {
  using Base = Gau<Engine, T>;
  using Base::L, Base::R, Base::clear, Base::columns, Base::depth, Base::left_at, Base::product, Base::right_at,
      Base::row_of, Base::rows_from, Base::store_rows, Base::words;
  static constexpr int64_t BLOCK = Engine::TILES ? 128 : 64;
  static constexpr int64_t COLUMNS = 192;  // whole slivers of every engine

  static int64_t deep(const MixedCall& z) { return depth(z.key_size) + depth(z.chunk); }
  static int64_t square(const MixedCall& z) { return padded<Engine, R>(z.chunk); }
  static int64_t hidden(const MixedCall& z) { return 2 * z.value_size + z.key_size; }
  static int64_t rows_in(const MixedChunk& m, int64_t row) { return m.rows > row ? at_most(BLOCK, m.rows - row) : 0; }
  static int64_t seen(const MixedCall& z, const MixedChunk& m, int64_t row) {
    return z.causal ? row + rows_in(m, row) : m.rows;
  }

  // --- packing: one copy of each for the many places that need it, because the compiler takes long over them

  // Into rows of the panel from `row` on, a multiple of LANES.
  template <Side side, class From>
  __attribute__((noinline)) static void pack_rows_at(const Rows<From>& in, int64_t row, int64_t words,
                                                     int64_t panel_depth, float* panel) {
    int64_t count = Engine::TILES ? columns(in.rows) : round_up(in.rows, LANES);
    if (side == L) count = padded<Engine, L>(in.rows);
    pack_rows<Engine, side>(Shifted<From>{in, row}, row, count, words, panel_depth, panel);
  }
  template <Side side, class From>
  __attribute__((noinline)) static void pack_columns_at(const Rows<From>& in, int64_t words, int64_t panel_depth,
                                                        float* panel) {
    pack_columns<Engine, side>(in, 0, padded<Engine, side>(in.columns), words, panel_depth, panel);
  }

  static Rows<T> rows_of(const TokenMatrix& x, int64_t row, int64_t rows, int64_t n) {
    return {row_of(x, row), x.token_step, rows, n};
  }
  // factor x, or its swish.
  static Rows<float> copy(const TokenMatrix& x, int64_t row, int64_t rows, int64_t n, bool swish_, float factor,
                          float* to) {
    const int64_t step = columns(n);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < n; j += LANES) {
        const vec v = load_some(row_of(x, row + r) + j, n - j);
        storev(to + r * step + j, swish_ ? swish(v) : factor * v);
      }
    return {to, step, rows, n};
  }
  static Rows<float> values_of(const MixedCall& z, const MixedChunk& m, int64_t row, float* to) {
    return copy(m.v, row, rows_in(m, row), z.value_size, z.dim > 0, 1, to);
  }

  // --- forward

  // h for a block of rows.
  static void project(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row) {
    const int64_t rows = rows_in(m, row), N = hidden(z), d = z.dim;
    clear(m.h, row + rows, at_most(row + BLOCK, m.tokens), N);
    if (rows == 0) return;
    Engine::begin();
    pack_rows_at<L>(rows_of(m.x, row, rows, d), 0, depth(d), depth(d), w.left);
    for (int64_t j = 0; j < N; j += Base::WIDE)
      product(rows, at_most(Base::WIDE, N - j), d, w.left, right_at(z.in_right, depth(d), j, 0), w.sums,
              {row_of(m.h, 0) + j, 0, m.h.token_step}, row);
    Engine::end();
  }

  static void rotate_row(const MixedCall& z, const MixedChunk& m, int64_t row) {
    const int64_t S = z.key_size;
    for (int64_t j = 0; j < S; j += LANES) {
      const vec x = swish(load_some(row_of(m.h, row) + 2 * z.value_size + j, S - j));
      const int64_t angle = row * (S / 2) + j / 2;
      for (int i = 0; i < 4; ++i) {
        const vec head = x * load_some(z.scale + i * S + j, S - j) + load_some(z.offset + i * S + j, S - j);
        const vec turned = rotate_pairs(head, m.cosine + angle, m.sine + angle, (S - j) / 2, 1);
        store_some(row_of(m.heads[i], row) + j, turned, S - j);
      }
    }
  }

  // The panels that other rows need; with `known`, also those for gradients.
  static void pack(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row) {
    const int64_t rows = rows_in(m, row), S = z.key_size, E = z.value_size, now = depth(rows), long_ = depth(z.chunk);
    if (z.dim > 0)
      for (int64_t r = row; r < row + rows; ++r) rotate_row(z, m, r);
    const Rows<T> k = rows_of(m.heads[1], row, rows, S);
    pack_rows_at<R>(k, row, depth(S), depth(S), m.k_right);
    pack_columns_at<L>(rows_of(m.heads[3], row, rows, S), now, long_, left_at(m.k_turned, long_, 0, row));
    const Rows<float> v = values_of(z, m, row, w.sums);
    pack_columns_at<R>(v, now, deep(z), right_at(m.values, deep(z), 0, row) + depth(S) * Engine::RIGHT);
    if (m.known == nullptr) return;
    pack_rows_at<R>(v, columns(S) + row, depth(E), depth(E), m.known);
    const Rows<float> q = copy(m.heads[2], row, rows, S, false, m.weight, w.heads);
    pack_columns_at<L>(q, now, long_, left_at(m.q_turned, long_, 0, row));
    pack_columns_at<R>(k, now, long_, right_at(m.quad_k_turned, long_, 0, row));
    pack_columns_at<R>(rows_of(m.heads[0], row, rows, S), now, long_, right_at(m.quad_q_turned, long_, 0, row));
  }

  // COLUMNS of M or dM: writes them where the chunk reads them, and adds what the chunk adds.
  static void scan(const MixedCall& z, const MixedChunk& m, const MixedSums& s, int64_t e, bool read, bool add) {
    const int64_t S = z.key_size, E = z.value_size, count = at_most(COLUMNS, E - e), step = columns(E), far = deep(z);
    const int64_t sums_at = s.last ? depth(m.rows) : 0, tokens_at = s.last ? 0 : depth(S);
    if (m.rows == 0) return;
    if (read) {
      const Rows<float> block{s.sums + e, step, S, count};
      pack_columns_at<R>(block, depth(S), far, at<Engine, R>(s.panel, far, e, sums_at));
      if (s.rows != nullptr) pack_rows_at<R>(block, 0, depth(count), depth(E), right_at(s.rows, depth(E), 0, e));
    }
    if (!add) return;
    Engine::begin();
    multiply<Engine>(S, count, words(m.rows), s.turned, depth(z.chunk), at<Engine, R>(s.panel, far, e, tokens_at), far,
                     s.sums + e, step, true);
    Engine::end();
  }

  // w.scores = relu(q k^T), w.wide = A, and w.sums = A v + w q_lin M for a block of rows.
  static void sum_values(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row) {
    const int64_t rows = rows_in(m, row), S = z.key_size, E = z.value_size, step = square(z);
    const int64_t count = seen(z, m, row);
    pack_rows_at<L>(rows_of(m.heads[0], row, rows, S), 0, depth(S), depth(S), w.left);
    multiply<Engine>(rows, count, words(S), w.left, depth(S), m.k_right, depth(S), w.scores, step, false);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < count; j += LANES) {
        const int64_t at = r * step + j, visible = z.causal ? row + r + 1 : m.rows;
        const vec s = only_first(maxv(vec{}, loadv(w.scores + at)), visible - j);  // this way round NaN stays NaN
        storev(w.scores + at, s);
        storev(w.wide + at, s * s * z.factor);
      }
    pack_rows_at<L>(copy(m.heads[2], row, rows, S, false, m.weight, w.heads), 0, depth(S), deep(z), w.left);
    pack_rows_at<L>(Rows<float>{w.wide, step, rows, count}, 0, depth(count), deep(z),
                    at<Engine, L>(w.left, deep(z), 0, depth(S)));
    multiply<Engine>(rows, E, depth(S) + words(count), w.left, deep(z), m.values, deep(z), w.sums, columns(E), false);
  }

  static void attend(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row) {
    const int64_t rows = rows_in(m, row), E = z.value_size, step = columns(E), width = z.dim > 0 ? z.dim : E;
    clear(m.out, row + rows, at_most(row + BLOCK, m.tokens), width);
    if (rows == 0) return;
    Engine::begin();
    sum_values(z, m, w, row);
    for (int64_t r = 0; r < rows && m.u.data != nullptr; ++r)
      for (int64_t e = 0; e < E; e += LANES) {
        const vec u = load_some(row_of(m.u, row + r) + e, E - e);
        float* sum = w.sums + r * step + e;
        storev(sum, loadv(sum) * (z.dim > 0 ? swish(u) : u));
      }
    if (z.dim > 0) {
      pack_rows_at<L>(Rows<float>{w.sums, step, rows, E}, 0, depth(E), depth(E), w.left);
      product(rows, z.dim, E, w.left, z.out_right, w.sums, m.out, row);
    } else {
      store_rows(w.sums, step, m.out, row, rows, E);
    }
    Engine::end();
  }

  // --- backward

  // g = grad w_out.
  static void project_grad(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row) {
    const int64_t rows = rows_in(m, row);
    if (rows == 0) return;
    Engine::begin();
    pack_rows_at<L>(rows_of(m.grad, row, rows, z.dim), 0, depth(z.dim), depth(z.dim), w.left);
    product(rows, z.value_size, z.dim, w.left, z.out_turned, w.sums, m.g, row);
    Engine::end();
  }

  // u * g, for dM alone.
  static void pack_grad(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row) {
    const int64_t rows = rows_in(m, row), E = z.value_size, step = columns(E);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t e = 0; e < E; e += LANES) {
        vec g = load_some(row_of(m.g, row + r) + e, E - e);
        if (m.u.data != nullptr) {
          const vec u = load_some(row_of(m.u, row + r) + e, E - e);
          g *= z.dim > 0 ? swish(u) : u;
        }
        storev(w.more + r * step + e, g);
      }
    pack_columns_at<R>(Rows<float>{w.more, step, rows, E}, depth(rows), deep(z), right_at(m.grads, deep(z), 0, row));
  }

  static void store_heads(const MixedCall& z, const MixedChunk& m, int64_t head, int64_t row, int64_t rows,
                          float factor, const float* from, int64_t from_step) {
    const int64_t step = columns(z.key_size);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < z.key_size; j += LANES)
        storev(m.dheads + (head * z.chunk + row + r) * step + j, factor * loadv(from + r * from_step + j));
  }

  // From g of a block of rows: what comes of it for u, w_out and both q, and the panels that its keys need.
  static void row_gradients(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row) {
    const int64_t rows = rows_in(m, row), S = z.key_size, E = z.value_size, step = columns(E), now = depth(rows);
    const int64_t count = seen(z, m, row), heads = columns(S), long_ = depth(z.chunk), far = deep(z);
    if (rows == 0) return;
    Engine::begin();
    sum_values(z, m, w, row);
    pack_columns_at<L>(Rows<float>{w.wide, square(z), rows, count}, now, far, left_at(m.weights_turned, far, 0, row));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t e = 0; e < E; e += LANES) {
        float* sum = w.sums + r * step + e;
        const vec attended = loadv(sum), g = load_some(row_of(m.g, row + r) + e, E - e);
        vec u = splat(1);
        if (m.u.data != nullptr) u = load_some(row_of(m.u, row + r) + e, E - e);
        if (z.dim > 0) {
          const vec sigma = sigmoid(u);
          u *= sigma;
          store_some(m.dh + (row + r) * hidden(z) + e, g * attended * (sigma + u * (1.0f - sigma)), E - e);
          storev(sum, u * attended);
        } else if (m.u.data != nullptr) {
          store_some(row_of(m.du, row + r) + e, g * attended, E - e);
        }
        storev(w.more + r * step + e, u * g);
      }
    if (z.dim > 0) {
      const int64_t word = m.word + row / Engine::WORD;
      const Rows<float> gated{w.sums, step, rows, E};
      pack_columns_at<R>(gated, now, z.turned, at<Engine, R>(z.gated_turned, z.turned, 0, word));
      const Rows<T> grad = rows_of(m.grad, row, rows, z.dim);
      pack_columns_at<L>(grad, now, z.turned, at<Engine, L>(z.grad_turned, z.turned, 0, word));
    }
    const Rows<float> g{w.more, step, rows, E};
    pack_columns_at<R>(g, now, far, right_at(m.grads, far, 0, row));
    pack_rows_at<L>(g, 0, depth(E), depth(E), w.left);
    const int64_t wide = heads + columns(z.chunk);
    multiply<Engine>(rows, heads + count, words(E), w.left, depth(E), m.known, depth(E), w.wide, wide, false);
    store_heads(z, m, 2, row, rows, m.weight, w.wide, wide);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < count; j += LANES) {
        float* s = w.scores + r * square(z) + j;
        const vec slope = loadv(s) * loadv(w.wide + r * wide + heads + j) * (2 * z.factor);
        storev(s, only_first(slope, (z.causal ? row + r + 1 : m.rows) - j));
      }
    const Rows<float> slopes{w.scores, square(z), rows, count};
    pack_columns_at<L>(slopes, now, long_, left_at(m.slopes_turned, long_, 0, row));
    pack_rows_at<L>(slopes, 0, depth(count), long_, w.left);
    multiply<Engine>(rows, S, words(count), w.left, long_, m.quad_k_turned, long_, w.wide, heads, false);
    store_heads(z, m, 0, row, rows, 1, w.wide, heads);
    Engine::end();
  }

  // A block of keys: dv and both dk, and so all of dh.
  static void key_gradients(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row) {
    const int64_t rows = rows_in(m, row), S = z.key_size, E = z.value_size, step = columns(E), heads = columns(S);
    const int64_t long_ = depth(z.chunk), far = deep(z), first = z.causal ? row : 0, end = depth(m.rows);
    const int64_t queries = end - first / Engine::WORD;
    if (rows > 0) {
      Engine::begin();
      const Rows<T> k = rows_of(m.heads[3], row, rows, S);
      pack_rows_at<L>(k, 0, depth(S), far, at<Engine, L>(m.weights_turned, far, row, end));
      multiply<Engine>(rows, E, queries + words(S), left_at(m.weights_turned, far, row, first), far,
                       right_at(m.grads, far, 0, first), far, w.sums, step, false);
      pack_rows_at<L>(values_of(z, m, row, w.more), 0, depth(E), depth(E), w.left);
      multiply<Engine>(rows, S, words(E), w.left, depth(E), m.back, depth(E), w.wide, heads, false);
      store_heads(z, m, 3, row, rows, 1, w.wide, heads);
      multiply<Engine>(rows, S, queries, left_at(m.slopes_turned, long_, row, first), long_,
                       right_at(m.quad_q_turned, long_, 0, first), long_, w.wide, heads, false);
      store_heads(z, m, 1, row, rows, 1, w.wide, heads);
      Engine::end();
    }
    const int64_t stop = at_most(row + BLOCK, m.tokens);
    if (z.dim > 0) return finish(z, m, w, row, rows, stop);
    store_rows(w.sums, step, m.dv, row, rows, E);
    clear(m.dv, row + rows, stop, E);
    clear(m.du, row + rows, stop, E);
    for (int i = 0; i < 4; ++i) {
      store_rows(m.dheads + (i * z.chunk + row) * heads, heads, m.dheads_out[i], row, rows, S);
      clear(m.dheads_out[i], row + rows, stop, S);
    }
  }

  // The rest of dh from w.sums = dv and the heads' gradients; then dx = dh w_in, and what w_in needs.
  static void finish(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row, int64_t rows, int64_t stop) {
    const int64_t S = z.key_size, E = z.value_size, N = hidden(z), d = z.dim, now = depth(rows);
    float* affine = m.affine + row / BLOCK * 8 * S;
    fill(affine, 8 * S, 0);
    for (int64_t r = row; r < row + rows; ++r) {
      float* dh = m.dh + r * N;
      const T* h = row_of(m.h, r);
      for (int64_t e = 0; e < E; e += LANES) {
        const vec dv = loadv(w.sums + (r - row) * columns(E) + e);
        store_some(dh + E + e, dv * swish_slope(load_some(h + E + e, E - e)), E - e);
      }
      for (int64_t j = 0; j < S; j += LANES) {
        const vec before = load_some(h + 2 * E + j, S - j), active = swish(before);
        const float *c = m.cosine + r * (S / 2) + j / 2, *sn = m.sine + r * (S / 2) + j / 2;
        vec dz{};
        for (int i = 0; i < 4; ++i) {
          const vec dhead = load_some(m.dheads + (i * z.chunk + r) * columns(S) + j, S - j);
          const vec turned_back = rotate_pairs(dhead, c, sn, (S - j) / 2, -1);
          dz += turned_back * load_some(z.scale + i * S + j, S - j);
          float *scale = affine + i * S + j, *offset = affine + (4 + i) * S + j;
          store_some(scale, load_some(scale, S - j) + turned_back * active, S - j);
          store_some(offset, load_some(offset, S - j) + turned_back, S - j);
        }
        store_some(dh + 2 * E + j, dz * swish_slope(before), S - j);
      }
    }
    if (rows > 0) {
      const Rows<float> dh{m.dh + row * N, N, rows, N};
      const int64_t word = m.word + row / Engine::WORD;
      Engine::begin();
      pack_rows_at<L>(dh, 0, depth(N), depth(N), w.left);
      product(rows, d, N, w.left, z.in_turned, w.sums, m.dx, row);
      Engine::end();
      pack_columns_at<L>(dh, now, z.turned, at<Engine, L>(z.dh_turned, z.turned, 0, word));
      pack_columns_at<R>(rows_of(m.x, row, rows, d), now, z.turned, at<Engine, R>(z.x_turned, z.turned, 0, word));
    }
    clear(m.dx, row + rows, stop, d);
  }

  static void add_product(int64_t row, int64_t rows, int64_t n, MixedWords depth, float* left, float* right,
                          float* sums) {
    Engine::begin();
    multiply<Engine>(rows, n, depth.last - depth.first, at<Engine, L>(left, depth.all, row, depth.first), depth.all,
                     at<Engine, R>(right, depth.all, 0, depth.first), depth.all, sums + row * columns(n), columns(n),
                     true);
    Engine::end();
  }

  static MixedKernels kernels() {
    return {BLOCK, COLUMNS, Base::WIDE, Base::left_floats, Base::right_floats, columns, depth,
            Base::pack_weight, project, pack, scan, attend, project_grad, pack_grad, row_gradients, key_gradients,
            add_product};
  }
};

static MixedKernels mixed_kernels(FloatType type, MatrixUnit unit) {
#if SUPY_LANES == 16
  if (type == FloatType::bf16 && unit == MatrixUnit::tiles) return Mixed<Bfloat16Tiles, bf16>::kernels();
  if (type == FloatType::bf16 && unit == MatrixUnit::pairs) return Mixed<Bfloat16Pairs, bf16>::kernels();
#endif
  (void)unit;
  return type == FloatType::bf16 ? Mixed<Float32, bf16>::kernels() : Mixed<Float32, float>::kernels();
}
