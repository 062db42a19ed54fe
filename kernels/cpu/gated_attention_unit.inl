// The projections around gated attention. Each is a product whose operands and results are read, activated, gated and
// rotated on the way, so that the unit keeps h and A v between forward and backward and nothing else of their size.
#include "gau_attention.inl"

template <class Engine, class T>
struct Unit : Gau<Engine, T> {
  using Base = Gau<Engine, T>;
  using Base::ROWS, Base::STRIP, Base::WIDE, Base::FEW, Base::L, Base::R, Base::clear, Base::columns, Base::depth,
      Base::keep, Base::left_at, Base::pack_weight, Base::product, Base::right_at, Base::row_of, Base::rows_from,
      Base::rows_in, Base::store_rows, Base::words;

  // h for a block of rows, and q and k from its last columns.
  static void project(const GauSample& s, const GauUnit& l, GauWork& w, int64_t row) {
    const int64_t rows = rows_in(s, row, s.rows), E = s.value_size, S = s.key_size, d = l.dim;
    clear(l.h, row + rows, at_most(row + s.rows, s.tokens), 2 * E + S);
    if (rows == 0) return;
    Engine::begin();
    pack_rows<Engine, L>(rows_from(l.x, row, s.length, d), 0, padded<Engine, L>(rows), depth(d), depth(d), w.left);
    for (int64_t j = 0; j < 2 * E; j += WIDE) {
      const int64_t now = at_most(WIDE, 2 * E - j);
      product(rows, now, d, w.left, right_at(l.uv_right, depth(d), j, 0), w.sums,
              {row_of(l.h, 0) + j, 0, l.h.token_step}, row);
    }
    multiply<Engine>(rows, S, words(d), w.left, depth(d), l.z_right, depth(d), w.sums, columns(S), false);
    store_rows(w.sums, columns(S), {row_of(l.h, 0) + 2 * E, 0, l.h.token_step}, row, rows, S);
    Engine::end();
    for (int64_t r = 0; r < rows; ++r) rotate_row(s, l, row + r, w.sums + r * columns(S));
  }

  template <class From>
  static void rotate_row(const GauSample& s, const GauUnit& l, int64_t t, const From* h) {
    const int64_t S = s.key_size;
    const float *c = l.cosine + t * (S / 2), *sn = l.sine + t * (S / 2);
    for (int64_t j = 0; j < S; j += LANES) {
      const vec z = swish(load_some(h + j, S - j));
      const TokenMatrix* to[] = {&s.q, &s.k};
      for (int i = 0; i < 2; ++i) {
        const vec x = z * load_some(l.gamma + i * S + j, S - j) + load_some(l.beta + i * S + j, S - j);
        keep(row_of(*to[i], t) + j, rotate_pairs(x, c + j / 2, sn + j / 2, (S - j) / 2, 1), S - j);
      }
    }
  }

  static void attend_unit(const GauSample& s, const GauUnit& l, GauWork& w, int64_t row) {
    const int64_t rows = rows_in(s, row, s.rows), E = s.value_size, d = l.dim;
    Engine::begin();
    Base::sum_values(s, w, row);
    Base::gate(s, w, row);
    pack_rows<Engine, L>(Rows<float>{w.sums, columns(E), rows, E}, 0, padded<Engine, L>(rows), depth(E), depth(E), w.left);
    product(rows, d, E, w.left, l.out_right, w.sums, l.y, row);
    Engine::end();
    clear(l.y, row + rows, at_most(row + s.rows, s.tokens), d);
  }

  static void prepare_unit(const GauSample& s, const GauUnit& l, GauWork& w, int64_t row) {
    const int64_t rows = rows_in(s, row, ROWS), E = s.value_size, d = l.dim, turned = depth(s.tokens);
    if (rows == 0) return;
    for (int64_t t = row; t < row + rows; ++t) rotate_row(s, l, t, row_of(l.h, t) + 2 * E);
    const Rows<T> grad = rows_from(l.grad, row, s.length, d);
    Engine::begin();
    pack_rows<Engine, L>(grad, 0, padded<Engine, L>(rows), depth(d), depth(d), w.left);
    multiply<Engine>(rows, E, words(d), w.left, depth(d), l.out_turned, depth(d), w.sums, columns(E), false);
    Engine::end();
    pack_columns<Engine, L>(grad, 0, padded<Engine, L>(d), depth(rows), turned, left_at(l.grad_turned, turned, 0, row));
    Base::prepare_from(s, w, row, Rows<float>{w.sums, columns(E), rows, E}, [&](const Rows<float>& gated, int64_t t, int64_t first) {
      pack_columns<Engine, R>(gated, 0, padded<Engine, R>(gated.columns), depth(gated.rows), turned,
                              right_at(l.gated_turned, turned, first, t));
    });
  }

  // Rows of the gradient of w_out, and of w_in: sums over the sample's tokens, added to those before.
  static void sum_w_out(const GauSample& s, const GauUnit& l, int64_t row, int64_t rows) {
    const int64_t turned = depth(s.tokens), step = columns(s.value_size);
    Engine::begin();
    multiply<Engine>(at_most(rows, l.dim - row), s.value_size, words(s.length), left_at(l.grad_turned, turned, row, 0), turned,
                     l.gated_turned, turned, l.sum_w_out + row * step, step, true);
    Engine::end();
  }
  static void sum_w_in(const GauSample& s, const GauUnit& l, int64_t row, int64_t rows) {
    const int64_t turned = depth(s.tokens), step = columns(l.dim), N = 2 * s.value_size + s.key_size;
    Engine::begin();
    multiply<Engine>(at_most(rows, N - row), l.dim, words(s.length), left_at(l.dh_turned, turned, row, 0), turned, l.x_turned,
                     turned, l.sum_w_in + row * step, step, true);
    Engine::end();
  }

  // The numbers [first, first + count) of dh for `rows` rows into w.strip; affine gets their sums.
  static void dh_strip(const GauSample& s, const GauUnit& l, GauWork& w, int64_t row, int64_t rows, int64_t first,
                       int64_t count, float* affine) {
    const int64_t S = s.key_size, E = s.value_size;
    const auto within = [&](int64_t j) { return j < first ? first : at_most(j, first + count); };
    const int64_t values = within(E), keys = within(2 * E), end = first + count;
    for (int64_t r = 0; r < rows; ++r) {
      float* dh = w.strip + r * STRIP - first;
      const T *h = row_of(l.h, row + r), *du = row_of(s.du, row + r);
      const float* dv = s.sum_dv + (row + r) * columns(E) - E;
      for (int64_t j = first; j < values; j += LANES) store_some(dh + j, load_some(du + j, values - j), values - j);
      for (int64_t j = values; j < keys; j += LANES)
        store_some(dh + j, load_some(dv + j, keys - j) * swish_slope(load_some(h + j, keys - j)), keys - j);
      for (int64_t j = keys; j < end; j += LANES) {
        const int64_t at = j - 2 * E, left = end - j;
        const vec before = load_some(h + j, left), z = swish(before);
        const float *c = l.cosine + (row + r) * (S / 2) + at / 2, *sn = l.sine + (row + r) * (S / 2) + at / 2;
        vec dz{};
        for (int i = 0; i < 2; ++i) {
          const float* sums = (i == 0 ? s.sum_dq : s.sum_dk) + (row + r) * columns(S) + at;
          const vec turned_back = rotate_pairs(load_some(sums, left), c, sn, left / 2, -1);
          dz += turned_back * load_some(l.gamma + i * S + at, left);
          float *gamma = affine + i * S + at, *beta = affine + (2 + i) * S + at;
          store_some(gamma, load_some(gamma, left) + turned_back * z, left);
          store_some(beta, load_some(beta, left) + turned_back, left);
        }
        store_some(dh + j, dz * swish_slope(before), left);
      }
    }
  }

  // dh of a block of rows, dx = dh w_in, and the block's sums for gamma and beta.
  static void finish_unit(const GauSample& s, const GauUnit& l, GauWork& w, int64_t row) {
    const int64_t rows = rows_in(s, row, ROWS), S = s.key_size, d = l.dim, N = 2 * s.value_size + S;
    const int64_t turned = depth(s.tokens);
    float* affine = l.sum_affine + row / ROWS * 4 * S;
    fill(affine, 4 * S, 0);
    for (int64_t r = 0; r < rows; r += FEW)
      for (int64_t first = 0; first < N; first += STRIP) {
        const int64_t few = at_most(FEW, rows - r), count = at_most(STRIP, N - first);
        dh_strip(s, l, w, row + r, few, first, count, affine);
        const Rows<float> dh{w.strip, STRIP, few, count};
        pack_rows<Engine, L>(dh, 0, padded<Engine, L>(few), depth(count), depth(N), left_at(w.left, depth(N), r, first));
        pack_columns<Engine, L>(dh, 0, padded<Engine, L>(count), depth(few), turned,
                                left_at(l.dh_turned, turned, first, row + r));
      }
    if (rows > 0) {
      Engine::begin();
      product(rows, d, N, w.left, l.in_turned, w.sums, l.dx, row);
      Engine::end();
      pack_columns<Engine, R>(rows_from(l.x, row, s.length, d), 0, padded<Engine, R>(d), depth(rows), turned,
                              right_at(l.x_turned, turned, 0, row));
    }
    clear(l.dx, row + rows, at_most(row + ROWS, s.tokens), d);
  }

  static void round(const float* sums, int64_t step, int64_t rows, int64_t n, void* out) {
    store_rows(sums, step, {out, 0, n}, 0, rows, n);
  }

  static GauKernels kernels() {
    GauKernels k{};
    k.forward_block = Base::FORWARD, k.row_block = ROWS, k.backward_block = Base::BACKWARD;
    k.keys = Base::KEYS, k.packed = Base::PART, k.strip = 2 * FEW * STRIP, k.wide = WIDE;
    k.forward_rows = Base::forward_rows;
    k.left_floats = Base::left_floats, k.right_floats = Base::right_floats, k.columns = columns;
    k.pack_keys = Base::pack_keys, k.attend = Base::attend;
    k.prepare = Base::prepare, k.tile_gradient = Base::tile_gradient, k.finish = Base::finish;
    k.pack_weight = pack_weight, k.project = project, k.attend_unit = attend_unit;
    k.prepare_unit = prepare_unit, k.sum_w_out = sum_w_out, k.finish_unit = finish_unit, k.sum_w_in = sum_w_in;
    k.round = round;
    return k;
  }
};

static GauKernels gau_kernels(FloatType type, MatrixUnit unit) {
#if SUPY_LANES == 16
  if (type == FloatType::bf16 && unit == MatrixUnit::tiles) return Unit<Bfloat16Tiles, bf16>::kernels();
  if (type == FloatType::bf16 && unit == MatrixUnit::pairs) return Unit<Bfloat16Pairs, bf16>::kernels();
#endif
  (void)unit;
  return type == FloatType::bf16 ? Unit<Float32, bf16>::kernels() : Unit<Float32, float>::kernels();
}
