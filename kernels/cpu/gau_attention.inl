// Gated attention in blocks of rows, on packed operands. The weights of a block go from the scores straight into the panel
// that is multiplied with the values, so that neither is ever larger than a block.
#include "panels.inl"

// 1 / (1 + e^-x), to about 2 ulp.
static inline vec sigmoid(vec x) {
  const vec d = 1.0f + expv(-maxv(splat(-87.0f), x));
#if SUPY_LANES == 16
  vec r;  // an estimate and one step of Newton's, a third of the time of a division
  asm("vrcp14ps %1, %0" : "=v"(r) : "v"(d));
  return r + r * (1.0f - d * r);
#else
  return 1.0f / d;
#endif
}
static inline vec swish(vec x) { return x * sigmoid(x); }
static inline vec swish_slope(vec x) {
  const vec s = sigmoid(x);
  return s + x * s * (1.0f - s);
}

// Pairs of neighbours turned by the angle of their token; sign 1 or, back, -1.
static inline vec rotate_pairs(vec x, const float* cosine, const float* sine, int64_t pairs, float sign) {
  ivec twice, other;
  vec signs;
  for (int l = 0; l < LANES; ++l) twice[l] = l / 2, other[l] = l ^ 1, signs[l] = l % 2 ? sign : -sign;
  const vec c = __builtin_shuffle(load_some(cosine, at_most(pairs, LANES / 2)), twice);
  const vec s = __builtin_shuffle(load_some(sine, at_most(pairs, LANES / 2)), twice);
  return x * c + __builtin_shuffle(x, other) * s * signs;
}

template <class T>
struct Activated {
  Rows<T> rows;
  bool swish_;
  vec operator()(int64_t i, int64_t j) const { return swish_ ? swish(rows(i, j)) : rows(i, j); }
};

template <class Engine, class T>
struct Gau {
  // Rows of sums that stay in the second-level cache, at most, forward and while operands are prepared; rows and keys of a
  // tile of gradients; keys of a tile of scores; rows and keys of a part of a tile, and of a task that packs keys; rows and
  // columns that are changed and packed while they stay in the caches. Where panels begin, slivers and vectors of words do.
  static constexpr int64_t FORWARD = Engine::TILES ? 192 : 96, ROWS = Engine::TILES ? 128 : 96;
  static constexpr int64_t BACKWARD = Engine::TILES ? 256 : 288, KEYS = 384, PART = 96;
  static constexpr int64_t FEW = 32, STRIP = 384;
  static constexpr int64_t WIDE = 480;  // columns of h that are made at once, and rows of a weight that are packed
  static constexpr Side L = Side::left, R = Side::right;

  static int64_t left_floats(int64_t rows, int64_t k) { return panel_floats<Engine, L>(rows, k); }
  static int64_t right_floats(int64_t rows, int64_t k) { return panel_floats<Engine, R>(rows, k); }
  static int64_t columns(int64_t n) { return round_up(n, 32); }
  static int64_t depth(int64_t k) { return depth_of<Engine>(k); }
  static int64_t words(int64_t k) { return Engine::TILES ? depth(k) : (k + Engine::WORD - 1) / Engine::WORD; }
  static float* right_at(float* panel, int64_t panel_depth, int64_t row, int64_t k) {
    return at<Engine, R>(panel, panel_depth, row, k / Engine::WORD);
  }
  static float* left_at(float* panel, int64_t panel_depth, int64_t row, int64_t k) {
    return at<Engine, L>(panel, panel_depth, row, k / Engine::WORD);
  }

  // Rows of a task, forward: an even number of tasks, so that the last does not leave half of the threads idle.
  static int64_t forward_rows(int64_t tokens) {
    if (Engine::TILES || tokens <= FORWARD) return FORWARD;
    const int64_t tasks = round_up((tokens + FORWARD - 1) / FORWARD, 2);
    return round_up((tokens + tasks - 1) / tasks, Engine::LEFT);
  }

  static void keep(T* p, vec x, int64_t count) { count >= LANES ? Engine::store(p, x) : store_some(p, x, count); }

  static T* row_of(const TokenMatrix& m, int64_t t) { return static_cast<T*>(m.data) + t * m.token_step; }
  // The rows from `first` on; what stands at and beyond the sample's length is not read.
  static Rows<T> rows_from(const TokenMatrix& m, int64_t first, int64_t length, int64_t columns) {
    return {row_of(m, first), m.token_step, length - first, columns};
  }
  static TokenMatrix shifted(TokenMatrix m, int64_t column) {
    m.data = static_cast<T*>(m.data) + column;
    return m;
  }
  static void clear(const TokenMatrix& m, int64_t first, int64_t last, int64_t n) {
    for (int64_t t = first; t < last && m.data != nullptr; ++t)
      for (int64_t j = 0; j < n; j += LANES) store_some(row_of(m, t) + j, vec{}, n - j);
  }
  static int64_t rows_in(const GauSample& s, int64_t first, int64_t block) {
    return at_most(block, s.length > first ? s.length - first : 0);
  }

  // Rows [first, first + WIDE) of the right panel of a weight [rows, columns], whose depth is its columns or, turned, its rows.
  static void pack_weight(const void* data, int64_t rows, int64_t columns, bool turned, int64_t first, float* panel) {
    const Rows<T> weight{static_cast<const T*>(data), columns, rows, columns};
    const int64_t count = padded<Engine, R>(at_most(WIDE, (turned ? columns : rows) - first));
    if (turned)
      pack_columns<Engine, R>(weight, first, count, depth(rows), depth(rows), panel);
    else
      pack_rows<Engine, R>(weight, first, count, depth(columns), depth(columns), panel);
  }

  // --- forward -------------------------------------------------------------------------------------------------------------

  static int64_t key_depth(const GauSample& s) { return depth(at_most(KEYS, s.tokens)); }
  static float* values_at(const GauSample& s, int64_t block) {
    return s.v_turned + block * right_floats(s.value_size, at_most(KEYS, s.tokens));
  }

  static void pack_keys(const GauSample& s, int64_t first) {
    const int64_t count = rows_in(s, first, PART), S = s.key_size, E = s.value_size;
    if (count == 0) return;
    pack_rows<Engine, R>(rows_from(s.k, first, s.length, S), 0, padded<Engine, R>(count), depth(S), depth(S),
                         right_at(s.k_right, depth(S), first, 0));
    pack_columns<Engine, R>(Activated<T>{rows_from(s.v, first, s.length, E), s.swish}, 0, padded<Engine, R>(E), depth(count),
                            key_depth(s), right_at(values_at(s, first / KEYS), key_depth(s), 0, first % KEYS));
  }

  // Scores of one row, columns [from, to) of them visible, become weights; returns the factor by which the sums so far
  // shrink. The exponent's shift is the row's peak, or a little less: it moves when it has to, not whenever it could.
  static float softmax_row(float* row, int64_t from, int64_t to, int64_t width, float factor, float& peak, float& total) {
    for (int64_t c = from / LANES * LANES; c < to; c += LANES) storev(row + c, factor * loadv(row + c));
    fill(row, from, -INF);
    fill(row + to, width - to, -INF);
    vec top = splat(-INF);
    for (int64_t c = 0; c < width; c += LANES) top = maxv(loadv(row + c), top);
    const float now = max_of(top);
    float shrink = 1;
    if (now > peak + 8) {
      shrink = peak == -INF ? 0 : __builtin_expf(peak - now);
      total *= shrink;
      peak = now;
    }
    const vec shift = splat(peak == -INF ? 0 : peak);
    vec sum{};
    for (int64_t c = 0; c < width; c += LANES) {
      const vec e = expv(loadv(row + c) - shift);
      storev(row + c, e);
      sum += e;
    }
    total += sum_of(sum);
    return shrink;
  }

  static void relu2_row(float* row, int64_t from, int64_t to, int64_t width, float factor, float share) {
    for (int64_t c = from / LANES * LANES; c < to; c += LANES) {
      const vec x = maxv(vec{}, factor * loadv(row + c));  // this way round NaN stays NaN
      storev(row + c, x * x * share);
    }
    fill(row, from, 0);
    fill(row + to, width - to, 0);
  }

  // w.sums = A v for a block of rows, before division by the softmax's total.
  static void sum_values(const GauSample& s, GauWork& w, int64_t row) {
    const int64_t rows = rows_in(s, row, s.rows), S = s.key_size, E = s.value_size, step = columns(E);
    int64_t low = s.tokens, high = 0;
    for (int64_t r = 0; r < rows; ++r) {
      w.peak[r] = -INF, w.total[r] = 0;
      if (s.first[row + r] >= s.last[row + r]) continue;
      low = at_most(low, s.first[row + r]);
      high = s.last[row + r] > high ? s.last[row + r] : high;
    }
    if (low >= high) return fill(w.sums, rows * step, 0);
    pack_rows<Engine, L>(rows_from(s.q, row, s.length, S), 0, padded<Engine, L>(rows), depth(S), depth(S), w.left);
    bool add = false;
    for (int64_t block = low / KEYS; block * KEYS < high; ++block, add = true) {
      const int64_t start = block * KEYS, end = at_most(high, start + KEYS);
      const int64_t from = (low > start ? low : start) / Engine::RIGHT * Engine::RIGHT, count = end - from;
      const int64_t width = depth(count) * Engine::WORD, stride = KEYS;
      multiply<Engine>(rows, count, words(S), w.left, depth(S), right_at(s.k_right, depth(S), from, 0), depth(S), w.scores,
                       stride, false);
      for (int64_t r = 0; r < rows; ++r) {
        float* scores = w.scores + r * stride;
        int64_t c0 = s.first[row + r] - from, c1 = at_most(s.last[row + r], end) - from;
        c0 = c0 < 0 ? 0 : c0;
        if (c0 >= c1) {
          fill(scores, width, 0);
        } else if (s.softmax) {
          const float shrink = softmax_row(scores, c0, c1, width, s.factor[row + r], w.peak[r], w.total[r]);
          if (add && shrink != 1)
            for (int64_t e = 0; e < step; e += LANES)
              storev(w.sums + r * step + e, shrink * loadv(w.sums + r * step + e));
        } else {
          relu2_row(scores, c0, c1, width, s.factor[row + r], s.share[row + r]);
        }
      }
      pack_rows<Engine, L>(Rows<float>{w.scores, stride, rows, width}, 0, padded<Engine, L>(rows), depth(count),
                           depth(count), w.weights);
      multiply<Engine>(rows, E, words(count), w.weights, depth(count),
                       right_at(values_at(s, block), key_depth(s), 0, from - start), key_depth(s), w.sums, step, add);
    }
  }

  // w.sums = u * A v; stores A v and the statistics where they are wanted.
  static void gate(const GauSample& s, GauWork& w, int64_t row) {
    const int64_t rows = rows_in(s, row, s.rows), E = s.value_size, step = columns(E);
    for (int64_t r = 0; r < rows; ++r) {
      float share = 1;
      if (s.softmax) {
        const bool any = s.first[row + r] < s.last[row + r];
        share = any ? 1 / w.total[r] : 0;
        if (s.stats != nullptr) s.stats[row + r] = any ? w.peak[r] + __builtin_logf(w.total[r]) : -INF;
      }
      for (int64_t e = 0; e < E; e += LANES) {
        float* at = w.sums + r * step + e;
        vec a = share * loadv(at);
        if (s.attended.data != nullptr) keep(row_of(s.attended, row + r) + e, a, E - e);
        if (s.u.data != nullptr) {
          const vec u = load_some(row_of(s.u, row + r) + e, E - e);
          a *= s.swish ? swish(u) : u;
        }
        storev(at, a);
      }
    }
    const int64_t end = at_most(row + s.rows, s.tokens);
    clear(s.attended, row + rows, end, E);
    for (int64_t t = row + rows; t < end && s.stats != nullptr; ++t) s.stats[t] = -INF;
  }

  static void store_rows(const float* sums, int64_t step, const TokenMatrix& out, int64_t first, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < n; j += LANES) keep(row_of(out, first + r) + j, loadv(sums + r * step + j), n - j);
  }

  // Rows of `out` = left * right over k; `sums` is used where results are not stored as they are.
  static void product(int64_t rows, int64_t n, int64_t k, const float* left, const float* right, float* sums,
                      const TokenMatrix& out, int64_t first) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (rows % Engine::LEFT == 0 && n % LANES == 0)
        return multiply<Engine>(rows, n, words(k), left, depth(k), right, depth(k), row_of(out, first), out.token_step, false);
    }
    multiply<Engine>(rows, n, words(k), left, depth(k), right, depth(k), sums, columns(n), false);
    store_rows(sums, columns(n), out, first, rows, n);
  }

  static void attend(const GauSample& s, GauWork& w, int64_t row) {
    Engine::begin();
    const int64_t rows = rows_in(s, row, s.rows), E = s.value_size;
    sum_values(s, w, row);
    gate(s, w, row);
    store_rows(w.sums, columns(E), s.out, row, rows, E);
    clear(s.out, row + rows, at_most(row + s.rows, s.tokens), E);
    Engine::end();
  }

  // --- backward: g = u * grad, and the sums over tiles of dS and A -----------------------------------------------------------

  // Of `count` rows from row + r on: g, packed, v, packed, du, and rowsum(g * A v).
  template <class Source, class PackGated>
  static void prepare_few(const GauSample& s, GauWork& w, int64_t row, int64_t r, int64_t count, const Source& grad,
                          PackGated pack_gated) {
    const int64_t rows = rows_in(s, row, ROWS), E = s.value_size, turned = depth(s.tokens), t = row + r;
    const int64_t left = padded<Engine, L>(count), right = r + FEW < rows ? FEW : padded<Engine, R>(rows) - r;
    vec delta[FEW];
    for (vec& sum : delta) sum = vec{};
    for (int64_t first = 0; first < E; first += STRIP) {
      const int64_t n = at_most(STRIP, E - first);
      float *g_strip = w.strip, *gated = w.strip + FEW * STRIP;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t e = first; e < first + n; e += LANES) {
          const vec dout = grad(r + i, e), attended = load_some(row_of(s.attended, t + i) + e, E - e);
          vec g = dout;
          if (s.u.data != nullptr) {
            vec u = load_some(row_of(s.u, t + i) + e, E - e), du = dout * attended;
            if (s.swish) {
              const vec sigma = sigmoid(u);
              u *= sigma;
              du *= sigma + u * (1.0f - sigma);
              storev(gated + i * STRIP + e - first, u * attended);
            }
            g *= u;
            keep(row_of(s.du, t + i) + e, du, E - e);
          }
          g = Engine::rounded(g);  // as in the products, so that delta cancels what it has to
          delta[i] += g * attended;
          storev(g_strip + i * STRIP + e - first, g);
        }
      const Rows<float> g{g_strip, STRIP, count, n};
      pack_rows<Engine, L>(g, 0, left, depth(n), depth(E), left_at(s.g_left, depth(E), t, first));
      pack_columns<Engine, R>(g, 0, padded<Engine, R>(n), depth(count), turned, right_at(s.g_turned, turned, first, t));
      pack_rows<Engine, R>(Activated<T>{rows_from(shifted(s.v, first), row, s.length, n), s.swish}, r, right, depth(n),
                           depth(E), right_at(s.v_right, depth(E), row, first));
      pack_gated(Rows<float>{gated, STRIP, count, n}, t, first);
    }
    for (int64_t i = 0; i < count; ++i) s.delta[t + i] = sum_of(delta[i]);
  }

  // Packs a block's g, q, k and v, stores du and rowsum(g * A v). With projections pack_gated(Rows<float> u * A v, first row,
  // first column) follows each strip of it.
  template <class Source, class PackGated>
  static void prepare_from(const GauSample& s, GauWork& w, int64_t row, const Source& grad, PackGated pack_gated) {
    const int64_t rows = rows_in(s, row, ROWS), S = s.key_size, now = depth(rows), turned = depth(s.tokens);
    if (rows == 0) return;
    for (int64_t r = 0; r < rows; r += FEW) prepare_few(s, w, row, r, at_most(FEW, rows - r), grad, pack_gated);
    const Rows<T> q = rows_from(s.q, row, s.length, S), k = rows_from(s.k, row, s.length, S);
    pack_rows<Engine, L>(q, 0, padded<Engine, L>(rows), depth(S), depth(S), left_at(s.q_left, depth(S), row, 0));
    pack_columns<Engine, R>(q, 0, padded<Engine, R>(S), now, turned, right_at(s.q_turned, turned, 0, row));
    pack_rows<Engine, R>(k, 0, padded<Engine, R>(rows), depth(S), depth(S), right_at(s.k_right, depth(S), row, 0));
    pack_columns<Engine, R>(k, 0, padded<Engine, R>(S), now, turned, right_at(s.k_turned, turned, 0, row));
  }

  static void prepare(const GauSample& s, GauWork& w, int64_t row) {
    const int64_t end = at_most(row + ROWS, s.tokens), rows = rows_in(s, row, ROWS);
    prepare_from(s, w, row, rows_from(s.grad, row, s.length, s.value_size), [](const Rows<float>&, int64_t, int64_t) {});
    if (s.u.data != nullptr) clear(s.du, row + rows, end, s.value_size);
  }

  // What of a tile some rows see, or what of it sees some keys: [from, to), `from` a multiple of PART.
  struct Range {
    int64_t from, to;
    bool operator==(const Range& other) const { return from == other.from && to == other.to; }
  };
  static bool sees(const GauSample& s, int64_t t, int64_t key, int64_t keys) {
    return s.first[t] < s.last[t] && s.first[t] < key + keys && s.last[t] > key;
  }
  static Range keys_seen(const GauSample& s, int64_t row, int64_t rows, int64_t key, int64_t keys) {
    int64_t low = key + keys, high = key;
    for (int64_t t = row; t < row + rows; ++t) {
      if (!sees(s, t, key, keys)) continue;
      low = at_most(low, s.first[t]);
      high = s.last[t] > high ? s.last[t] : high;
    }
    low = low > key ? low - key : 0;
    return {low / PART * PART, at_most(high - key, keys)};
  }
  static Range rows_seeing(const GauSample& s, int64_t row, int64_t rows, int64_t key, int64_t keys) {
    int64_t low = rows, high = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (!sees(s, row + r, key, keys)) continue;
      low = at_most(low, r);
      high = r + 1;
    }
    return {low / PART * PART, high};
  }

  // body(first, count, range) for parts of [0, n) with a range that is not empty; neighbours of equal range are one part.
  template <class Find, class Body>
  static void by_parts(int64_t n, Find find, Body body) {
    Range now{}, next{};
    for (int64_t first = 0, end; first < n; first = end, now = next) {
      if (first == 0) now = find(0, at_most(PART, n));
      for (end = first + PART; end < n; end += PART)
        if (next = find(end, at_most(PART, n - end)); !(next == now)) break;
      end = at_most(end, n);
      if (now.from < now.to) body(first, end - first, now);
    }
  }

  // The share of one tile of A in dv, dk and dq.
  static void tile_gradient(const GauSample& s, GauWork& w, int64_t row, int64_t key) {
    const int64_t rows = rows_in(s, row, BACKWARD), keys = rows_in(s, key, BACKWARD), S = s.key_size, E = s.value_size;
    const int64_t step = BACKWARD, turned = depth(s.tokens);
    const auto seen = [&](int64_t r, int64_t count) { return keys_seen(s, row + r, count, key, keys); };
    const auto seeing = [&](int64_t c, int64_t count) { return rows_seeing(s, row, rows, key + c, count); };
    const Range all = seen(0, rows);
    if (all.from >= all.to) return;
    Engine::begin();
    by_parts(rows, seen, [&](int64_t r, int64_t count, Range c) {
      multiply<Engine>(count, c.to - c.from, words(S), left_at(s.q_left, depth(S), row + r, 0), depth(S),
                       right_at(s.k_right, depth(S), key + c.from, 0), depth(S), w.scores + r * step + c.from, step, false);
      multiply<Engine>(count, c.to - c.from, words(E), left_at(s.g_left, depth(E), row + r, 0), depth(E),
                       right_at(s.v_right, depth(E), key + c.from, 0), depth(E), w.more + r * step + c.from, step, false);
    });
    for (int64_t r = 0; r < rows; ++r) {
      float *a = w.scores + r * step, *d = w.more + r * step;
      int64_t c0 = at_most(s.first[row + r] - key, keys), c1 = at_most(s.last[row + r] - key, keys);
      c0 = c0 < 0 ? 0 : c0;
      c1 = c1 < c0 ? c0 : c1;
      const float factor = s.factor[row + r];
      if (s.softmax) {
        const vec stats = splat(c0 < c1 ? s.stats[row + r] : 0), delta = splat(s.delta[row + r]);
        // A single key has the weight 1 whatever its score; dA and delta cancel there up to rounding only.
        const float slope = s.last[row + r] - s.first[row + r] > 1 ? factor : 0;
        for (int64_t c = c0 / LANES * LANES; c < c1; c += LANES) {
          const vec e = expv(factor * loadv(a + c) - stats);
          storev(a + c, e);
          storev(d + c, e * (loadv(d + c) - delta) * slope);
        }
      } else {
        const float share = s.share[row + r];
        for (int64_t c = c0 / LANES * LANES; c < c1; c += LANES) {
          const vec x = maxv(vec{}, factor * loadv(a + c));
          storev(a + c, x * x * share);
          storev(d + c, loadv(d + c) * x * (2 * share * factor));
        }
      }
      for (float* p : {a, d}) {
        fill(p, c0, 0);
        fill(p + c1, keys - c1, 0);
      }
    }
    const Rows<float> a{w.scores, step, rows, keys}, d{w.more, step, rows, keys};
    pack_columns<Engine, L>(a, 0, padded<Engine, L>(keys), depth(rows), depth(rows), w.weights);
    by_parts(keys, seeing, [&](int64_t c, int64_t count, Range r) {
      multiply<Engine>(count, E, words(r.to - r.from), left_at(w.weights, depth(rows), c, r.from), depth(rows),
                       right_at(s.g_turned, turned, 0, row + r.from), turned, s.sum_dv + (key + c) * columns(E), columns(E),
                       true);
    });
    pack_columns<Engine, L>(d, 0, padded<Engine, L>(keys), depth(rows), depth(rows), w.weights);
    by_parts(keys, seeing, [&](int64_t c, int64_t count, Range r) {
      multiply<Engine>(count, S, words(r.to - r.from), left_at(w.weights, depth(rows), c, r.from), depth(rows),
                       right_at(s.q_turned, turned, 0, row + r.from), turned, s.sum_dk + (key + c) * columns(S), columns(S),
                       true);
    });
    pack_rows<Engine, L>(d, 0, padded<Engine, L>(rows), depth(keys), depth(keys), w.weights);
    by_parts(rows, seen, [&](int64_t r, int64_t count, Range c) {
      multiply<Engine>(count, S, words(c.to - c.from), left_at(w.weights, depth(keys), r, c.from), depth(keys),
                       right_at(s.k_turned, turned, 0, key + c.from), turned, s.sum_dq + (row + r) * columns(S), columns(S),
                       true);
    });
    Engine::end();
  }

  static void finish(const GauSample& s, int64_t row) {
    const int64_t rows = rows_in(s, row, ROWS), S = s.key_size, E = s.value_size;
    const int64_t end = at_most(row + ROWS, s.tokens);
    store_rows(s.sum_dq + row * columns(S), columns(S), s.dq, row, rows, S);
    store_rows(s.sum_dk + row * columns(S), columns(S), s.dk, row, rows, S);
    store_rows(s.sum_dv + row * columns(E), columns(E), s.dv, row, rows, E);
    clear(s.dq, row + rows, end, S);
    clear(s.dk, row + rows, end, S);
    clear(s.dv, row + rows, end, E);
  }
};
