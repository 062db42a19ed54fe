// The loss of one sample by matrix products, the scores and the spans of one. See supy/reference/efficient_global_pointer.py
// for the formula. Here every row of P has a shift of its own, and tiles of P are computed again where they are needed, so
// that a sample takes memory in proportion to T (H + D).
#include "score_tiles.inl"

static void read_q(const EfficientGlobalPointerParams& p, int64_t b, int64_t token, int64_t padded, float* out) {
  read_token(p.q, p.type, b, token, 0, p.size, padded, p.scale, out);
}
static void read_k(const EfficientGlobalPointerParams& p, int64_t b, int64_t token, int64_t padded, float* out) {
  read_token(p.k, p.type, b, token, 0, p.size, padded, 1, out);
}
// Padded heads are -inf: they take part in nothing.
static void read_bias(const EfficientGlobalPointerParams& p, const TokenRows& bias, int64_t b, int64_t token,
                      int64_t padded, float* out) {
  read_token(bias, p.type, b, token, 0, p.heads, p.heads, 1, out);
  fill(out + p.heads, padded - p.heads, -INF);
}

static float read_element(const TokenRows& rows, FloatType type, int64_t batch, int64_t token, int64_t i) {
  const int64_t at = batch * rows.batch_step + token * rows.token_step + i * rows.step;
  return type == FloatType::bf16 ? load(static_cast<const bf16*>(rows.data) + at)
                                 : load(static_cast<const float*>(rows.data) + at);
}

// Whether some number is not -inf; NaN is not.
static bool open(const float* row, int64_t count) {
  uint32_t bits = 0;
  for (int64_t h = 0; h < count; h += LANES) bits |= ~bits_of(loadv(row + h) == splat(-INF));
  return static_cast<uint32_t>(bits << (32 - LANES)) != 0;
}

// Reads the sample's tokens into rows, and prepares e^y.
static void efficient_begin(const EfficientGlobalPointerParams& p, EfficientWork& w, int64_t b) {
  const int64_t D = w.size, H = w.heads;
  fill(w.top_y, H, -INF);
  int64_t n = 0;
  for (int64_t t = 0; t < p.tokens; ++t) {
    w.row_of[t] = -1;
    if (t >= p.lengths[b]) continue;
    float *x = w.x + n * H, *y = w.ey + n * H;
    read_bias(p, p.x, b, t, H, x);
    read_bias(p, p.y, b, t, H, y);
    const bool starts = open(x, H), ends = open(y, H);
    if (!starts && !ends) continue;
    w.closed_start[n] = starts ? 0 : -INF;
    w.closed_end[n] = ends ? 0 : -INF;
    read_q(p, b, t, D, w.q + n * D);
    read_k(p, b, t, D, w.k + n * D);
    for (int64_t h = 0; h < H; h += LANES) storev(w.top_y + h, maxv(loadv(y + h), loadv(w.top_y + h)));
    w.token[n] = static_cast<int32_t>(t);
    w.row_of[t] = static_cast<int32_t>(n++);
  }
  w.rows = n;
  const int64_t padded = round_up(n, TILE);
  fill(w.q + n * D, (padded - n) * D, 0);
  fill(w.k + n * D, (padded - n) * D, 0);
  fill(w.ey + n * H, (padded - n) * H, -INF);
  fill(w.closed_start + n, padded - n, -INF);
  fill(w.closed_end + n, padded - n, -INF);
  for (int64_t h = 0; h < H; ++h) w.top_y[h] = finite_or_zero(w.top_y[h]);
  for (int64_t r = 0; r < padded; ++r)
    for (int64_t h = 0; h < H; h += LANES) {
      float* y = w.ey + r * H + h;
      storev(y, expv(loadv(y) - loadv(w.top_y + h)));
    }
  for (int64_t r = 0; r < padded; r += TILE) {
    turn_tile(w.k + r * D, D, w.k_turned + r * D);
    turn_tile(w.ey + r * H, H, w.ey_turned + r * H);
  }
}

static inline int64_t tile_size(const EfficientWork& w, int64_t first) {
  return w.rows - first < TILE ? w.rows - first : TILE;
}

// The products a_ij of a tile, -inf on cells that are hidden or positive for some head; `keep` stores those of the latter.
static void efficient_tile(const EfficientGlobalPointerParams& p, EfficientWork& w, int64_t i0, int64_t j0, float* tile,
                           bool keep) {
  const int64_t rows = tile_size(w, i0), columns = round_up(tile_size(w, j0), LANES);
  const bool diagonal = p.tril && i0 == j0;
  gemm(rows, columns, p.size, {w.q + i0 * w.size, w.size, 1}, w.k_turned + j0 * w.size, TILE, tile, TILE, false,
       diagonal ? Part::upper_result : Part::all);
  hide(tile, rows, columns, w.closed_end + j0, diagonal);
  for (int64_t r = 0; r < rows; ++r)
    if (w.closed_start[i0 + r] != 0) fill(tile + r * TILE, columns, -INF);
  int64_t low = 0, high = w.num_cells;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (w.cells[middle].row < i0)
      low = middle + 1;
    else
      high = middle;
  }
  for (; low < w.num_cells && w.cells[low].row < i0 + rows; ++low) {
    PositiveCell& cell = w.cells[low];
    if (cell.column < j0 || cell.column >= j0 + TILE) continue;
    float& a = tile[(cell.row - i0) * TILE + cell.column - j0];
    if (keep) cell.score = a;
    a = -INF;
  }
}

// u_i = sum_j e^(a_ij - shift_i) e^y_j for a tile's height of rows, and their shifts.
static void efficient_rows(const EfficientGlobalPointerParams& p, EfficientWork& w, int64_t i0, float* tile) {
  const int64_t H = w.heads, rows = tile_size(w, i0), begin = p.tril ? i0 : 0;
  fill(w.shift + i0, TILE, -INF);
  for (int64_t j0 = begin; j0 < w.rows; j0 += TILE) {
    const int64_t columns = tile_size(w, j0), padded = round_up(columns, LANES);
    efficient_tile(p, w, i0, j0, tile, true);
    for (int64_t r = 0; r < rows; ++r) {
      float* a = tile + r * TILE;
      vec top = splat(-INF);
      for (int64_t c = 0; c < padded; c += LANES) top = maxv(loadv(a + c), top);
      const float before = w.shift[i0 + r], peak = max_of(top), now = peak > before ? peak : before;
      w.shift[i0 + r] = now;
      if (now > before && j0 > begin && before > -INF) {
        const vec factor = expv(splat(before - now));
        float* u = w.u + (i0 + r) * H;
        for (int64_t h = 0; h < H; h += LANES) storev(u + h, factor * loadv(u + h));
      }
      const vec shift = splat(finite_or_zero(now));
      for (int64_t c = 0; c < padded; c += LANES) storev(a + c, expv(loadv(a + c) - shift));
    }
    const bool diagonal = p.tril && i0 == j0;
    gemm(rows, H, columns, {tile, TILE, 1}, w.ey + j0 * H, H, w.u + i0 * H, H, j0 > begin,
         diagonal ? Part::upper_left : Part::all);
  }
}

// log of the sum of e^s of one head over the cells that are positive for no head, directly; with `gradients`, adds the
// derivatives of its share of the loss to dq, dk, and to the head's column of u and v, which are dx and dy by then.
static float efficient_direct(const EfficientGlobalPointerParams& p, EfficientWork& w, int64_t b, int64_t head,
                              bool gradients) {
  const int64_t D = w.size, H = w.heads, padded_rows = round_up(w.rows, TILE);
  for (int64_t r = 0; r < w.rows; ++r) {
    w.direct_x[r] = w.x[r * H + head];
    w.direct_y[r] = read_element(p.y, p.type, b, w.token[r], head);
  }
  fill(w.direct_y + w.rows, padded_rows - w.rows, -INF);
  fill(w.direct_dx, padded_rows, 0);
  fill(w.direct_dy, padded_rows, 0);
  float peak = -INF, total = 0, *tile = w.tiles;
  const float share = 1.0f / static_cast<float>(p.batch);
  for (int64_t i0 = 0; i0 < w.rows; i0 += TILE) {
    for (int64_t j0 = p.tril ? i0 : 0; j0 < w.rows; j0 += TILE) {
      const int64_t rows = tile_size(w, i0), columns = tile_size(w, j0), padded = round_up(columns, LANES);
      efficient_tile(p, w, i0, j0, tile, false);
      vec top = splat(-INF);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < padded; c += LANES) {
          float* s = tile + r * TILE + c;
          storev(s, loadv(s) + w.direct_x[i0 + r] + loadv(w.direct_y + j0 + c));
          top = maxv(loadv(s), top);
        }
      float now = w.negative[head];
      if (!gradients) {
        now = max_of(top) > peak ? max_of(top) : peak;
        total *= peak == -INF ? 0 : __builtin_expf(peak - now);
        peak = now;
      }
      const vec shift = splat(finite_or_zero(now));
      for (int64_t r = 0; r < rows; ++r) {
        vec sum{};
        for (int64_t c = 0; c < padded; c += LANES) {
          float* s = tile + r * TILE + c;
          const vec e = expv(loadv(s) - shift);
          sum += e;
          if (!gradients) continue;
          storev(s, share * e);
          storev(w.direct_dy + j0 + c, loadv(w.direct_dy + j0 + c) + share * e);
        }
        if (gradients)
          w.direct_dx[i0 + r] += share * sum_of(sum);
        else
          total += sum_of(sum);
      }
      if (!gradients) continue;
      gemm(rows, D, columns, {tile, TILE, 1}, w.k + j0 * D, D, w.dq + i0 * D, D, true);
      gemm(columns, D, rows, {tile, 1, TILE}, w.q + i0 * D, D, w.dk + j0 * D, D, true);
    }
  }
  if (!gradients) return finite_or_zero(peak) + __builtin_logf(total);
  for (int64_t r = 0; r < w.rows; ++r) {
    w.u[r * H + head] += w.direct_dx[r];
    w.v[r * H + head] += w.direct_dy[r];
  }
  return 0;
}

// Scores of a cell for every head, into w.row_x; w.head_of_cell is 1 where it is positive.
static void efficient_cell(const EfficientGlobalPointerParams& p, EfficientWork& w, const Span* spans,
                           const PositiveCell& cell, int64_t b) {
  const float* x = w.x + cell.row * w.heads;
  read_bias(p, p.y, b, w.token[cell.column], w.heads, w.row_y);
  for (int64_t h = 0; h < w.heads; h += LANES) storev(w.row_x + h, cell.score + loadv(x + h) + loadv(w.row_y + h));
  fill(w.head_of_cell, w.heads, 0);
  for (int64_t i = cell.first; i < cell.last; ++i) w.head_of_cell[spans[i].head] = 1;
}

// The terms of a cell: s where it is a negative, -s where it is a positive, else -inf, which takes part in nothing.
struct Terms {
  vec negative, positive;
};
static inline Terms terms_of(const EfficientWork& w, int64_t h) {
  const vec s = loadv(w.row_x + h), none = splat(-INF);
  const ivec is_positive = loadv(w.head_of_cell + h) != vec{};
  return {is_positive ? none : s, is_positive & (s != none) ? -s : none};
}

// From u and the shifts: e^x, and the two halves of the loss of each head. Returns their sum.
static double efficient_sum(const EfficientGlobalPointerParams& p, EfficientWork& w, const Span* spans, int64_t b) {
  const int64_t H = w.heads, n = w.rows;
  fill(w.top_x, H, -INF);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t h = 0; h < H; h += LANES)
      storev(w.top_x + h, maxv(loadv(w.x + r * H + h) + w.shift[r], loadv(w.top_x + h)));
  fill(w.log_z, H, 0);
  for (int64_t r0 = 0; r0 < n; r0 += TILE) {
    fill(w.sum, H, 0);  // a tile's rows first: the fewer terms a sum has, the less it rounds
    for (int64_t r = r0; r < r0 + tile_size(w, r0); ++r) {
      const float shift = w.shift[r];
      for (int64_t h = 0; h < H; h += LANES) {
        const vec top = loadv(w.top_x + h), x = loadv(w.x + r * H + h) + shift;
        const vec ex = expv(x - (top == splat(-INF) ? vec{} : top));
        storev(w.ex + r * H + h, ex);
        storev(w.sum + h, loadv(w.sum + h) + ex * loadv(w.u + r * H + h));
      }
    }
    for (int64_t h = 0; h < H; h += LANES) storev(w.log_z + h, loadv(w.log_z + h) + loadv(w.sum + h));
  }

  // Products below the smallest normal number are lost: n * n of them must not show beside the sum.
  const float faint = static_cast<float>(n) * static_cast<float>(n) * 1e-31f;
  for (int64_t h = 0; h < p.heads; ++h) {
    const bool some = w.top_x[h] != -INF || w.log_z[h] != 0;  // NaN shows in the sum only
    const bool direct = some && w.log_z[h] < faint;
    w.weight[h] = direct ? 0 : 1;
    if (direct)
      w.log_z[h] = efficient_direct(p, w, b, h, false);
    else
      w.log_z[h] = some ? __builtin_logf(w.log_z[h]) + w.top_x[h] + w.top_y[h] : -INF;
  }

  // The largest term of each half, 0 among them, then the sums.
  for (int64_t h = 0; h < H; ++h) w.negative[h] = w.log_z[h] > 0 ? w.log_z[h] : 0;
  fill(w.positive, H, 0);
  for (int64_t c = 0; c < w.num_cells; ++c) {
    efficient_cell(p, w, spans, w.cells[c], b);
    for (int64_t h = 0; h < H; h += LANES) {
      const Terms terms = terms_of(w, h);
      storev(w.negative + h, maxv(terms.negative, loadv(w.negative + h)));
      storev(w.positive + h, maxv(terms.positive, loadv(w.positive + h)));
    }
  }
  for (int64_t h = 0; h < H; h += LANES) storev(w.sum + h, expv(loadv(w.log_z + h) - loadv(w.negative + h)));
  fill(w.sum_positive, H, 0);
  for (int64_t c = 0; c < w.num_cells; ++c) {
    efficient_cell(p, w, spans, w.cells[c], b);
    for (int64_t h = 0; h < H; h += LANES) {
      const Terms terms = terms_of(w, h);
      storev(w.sum + h, loadv(w.sum + h) + expv(terms.negative - loadv(w.negative + h)));
      storev(w.sum_positive + h, loadv(w.sum_positive + h) + expv(terms.positive - loadv(w.positive + h)));
    }
  }
  double total = 0;
  for (int64_t h = 0; h < p.heads; ++h) {
    w.negative[h] = log_one_plus(w.negative[h], w.sum[h]);
    w.positive[h] = log_one_plus(w.positive[h], w.sum_positive[h]);
    total += static_cast<double>(w.negative[h]) + static_cast<double>(w.positive[h]);
  }
  return total;
}

// e^x times the weight of its head, and dx in u; dy, dq and dk begin at zero.
static void efficient_weigh(const EfficientGlobalPointerParams& p, EfficientWork& w) {
  const int64_t H = w.heads, padded = round_up(w.rows, TILE);
  fill(w.weight + p.heads, H - p.heads, 0);
  for (int64_t h = 0; h < H; h += LANES) {
    const vec top = loadv(w.top_x + h) + loadv(w.top_y + h), weight = loadv(w.weight + h);
    const vec value = expv(top - loadv(w.negative + h)) * (1.0f / static_cast<float>(p.batch));
    storev(w.weight + h, weight == vec{} ? vec{} : value);
  }
  for (int64_t r = 0; r < w.rows; ++r)
    for (int64_t h = 0; h < H; h += LANES) {
      float *x = w.ex + r * H + h, *u = w.u + r * H + h;
      const vec ex = loadv(x) * loadv(w.weight + h);
      storev(x, ex);
      storev(u, ex * loadv(u));
    }
  fill(w.v, padded * H, 0);
  fill(w.dq, padded * w.size, 0);
  fill(w.dk, padded * w.size, 0);
}

// What a tile of cells adds to v, dq and dk. `tile` has room for two.
static void efficient_tile_gradient(const EfficientGlobalPointerParams& p, EfficientWork& w, int64_t i0, int64_t j0,
                                    float* tile) {
  const int64_t D = w.size, H = w.heads, rows = tile_size(w, i0), columns = tile_size(w, j0);
  const int64_t padded = round_up(columns, LANES);
  const bool diagonal = p.tril && i0 == j0;
  const Part left = diagonal ? Part::upper_left : Part::all, turned = diagonal ? Part::lower_left : Part::all;
  efficient_tile(p, w, i0, j0, tile, false);
  for (int64_t r = 0; r < rows; ++r) {
    const vec shift = splat(finite_or_zero(w.shift[i0 + r]));
    for (int64_t c = 0; c < padded; c += LANES) {
      float* a = tile + r * TILE + c;
      storev(a, expv(loadv(a) - shift));
    }
  }
  gemm(columns, H, rows, {tile, 1, TILE}, w.ex + i0 * H, H, w.v + j0 * H, H, true, turned);
  float* sums = tile + TILE * TILE;
  gemm(rows, padded, p.heads, {w.ex + i0 * H, H, 1}, w.ey_turned + j0 * H, TILE, sums, TILE, false,
       diagonal ? Part::upper_result : Part::all);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < padded; c += LANES) {
      float* a = tile + r * TILE + c;
      storev(a, loadv(a) * loadv(sums + r * TILE + c));
    }
  gemm(rows, D, columns, {tile, TILE, 1}, w.k + j0 * D, D, w.dq + i0 * D, D, true, left);
  gemm(columns, D, rows, {tile, 1, TILE}, w.q + i0 * D, D, w.dk + j0 * D, D, true, turned);
}

static void write_rows(const EfficientGlobalPointerParams& p, const EfficientWork& w, int64_t b, const float* rows,
                       int64_t padded, int64_t count, float factor, float* out) {
  for (int64_t t = 0; t < p.tokens; ++t) {
    float* to = out + (b * p.tokens + t) * count;
    if (w.row_of[t] < 0) {
      fill(to, count, 0);
      continue;
    }
    const float* from = rows + w.row_of[t] * padded;
    for (int64_t i = 0; i < count; ++i) to[i] = factor * from[i];
  }
}

// Adds what the positive cells and the heads that are computed directly contribute, and writes the gradients.
static void efficient_finish(const EfficientGlobalPointerParams& p, EfficientWork& w,
                             const EfficientGlobalPointerLoss& loss, int64_t b) {
  const int64_t D = w.size, H = w.heads;
  const float share = 1.0f / static_cast<float>(p.batch);
  for (int64_t i = 0; i < w.rows * H; i += LANES) storev(w.v + i, loadv(w.v + i) * loadv(w.ey + i));
  for (int64_t c = 0; c < w.num_cells; ++c) {
    const PositiveCell& cell = w.cells[c];
    efficient_cell(p, w, loss.spans, cell, b);
    vec sum{};
    for (int64_t h = 0; h < H; h += LANES) {
      const Terms terms = terms_of(w, h);
      const vec ds = share * (expv(terms.negative - loadv(w.negative + h)) - expv(terms.positive - loadv(w.positive + h)));
      float *dx = w.u + cell.row * H + h, *dy = w.v + cell.column * H + h;
      storev(dx, loadv(dx) + ds);
      storev(dy, loadv(dy) + ds);
      sum += ds;
    }
    const float da = sum_of(sum);
    for (int64_t d = 0; d < D; ++d) {
      w.dq[cell.row * D + d] += da * w.k[cell.column * D + d];
      w.dk[cell.column * D + d] += da * w.q[cell.row * D + d];
    }
  }
  for (int64_t h = 0; h < p.heads; ++h)
    if (w.weight[h] == 0 && w.log_z[h] != -INF) efficient_direct(p, w, b, h, true);
  write_rows(p, w, b, w.dq, D, p.size, p.scale, loss.dq);
  write_rows(p, w, b, w.dk, D, p.size, 1, loss.dk);
  write_rows(p, w, b, w.u, H, p.heads, 1, loss.dx);
  write_rows(p, w, b, w.v, H, p.heads, 1, loss.dy);
}

// Reads a sample for its scores themselves: every visible token is a row.
static void efficient_scan_begin(const EfficientGlobalPointerParams& p, EfficientScan& w, int64_t b) {
  w.rows = p.lengths[b];
  for (int64_t t = 0; t < round_up(w.rows, TILE); ++t) {
    if (t >= w.rows) {
      fill(w.q + t * w.size, w.size, 0);
      fill(w.k + t * w.size, w.size, 0);
      continue;
    }
    read_q(p, b, t, w.size, w.q + t * w.size);
    read_k(p, b, t, w.size, w.k + t * w.size);
    float *x = w.x + t * w.heads, *y = w.y + t * w.heads;
    read_bias(p, p.x, b, t, w.heads, x);
    read_bias(p, p.y, b, t, w.heads, y);
    vec top_x = splat(-INF), top_y = splat(-INF);
    for (int64_t h = 0; h < w.heads; h += LANES) {
      top_x = maxv(loadv(x + h), top_x);
      top_y = maxv(loadv(y + h), top_y);
    }
    w.top_x[t] = max_of(top_x);
    w.top_y[t] = max_of(top_y);
  }
  for (int64_t t = 0; t < w.rows; t += TILE) turn_tile(w.k + t * w.size, w.size, w.k_turned + t * w.size);
}

// The products a_ij of the rows of one tile with every column that they see: [TILE][w.columns]. Returns the first column.
static int64_t efficient_strip(const EfficientGlobalPointerParams& p, const EfficientScan& w, int64_t i0) {
  const int64_t rows = w.rows - i0 < TILE ? w.rows - i0 : TILE, begin = p.tril ? i0 : 0;
  for (int64_t j0 = begin; j0 < w.rows; j0 += TILE) {
    const int64_t columns = round_up(w.rows - j0 < TILE ? w.rows - j0 : TILE, LANES);
    gemm(rows, columns, p.size, {w.q + i0 * w.size, w.size, 1}, w.k_turned + j0 * w.size, TILE,
         w.strip + j0, w.columns, false);
  }
  return begin;
}

// Writes the scores of a tile's height of starts for every head: (a + x) + y, as the search below computes them.
static void efficient_scores(const EfficientGlobalPointerParams& p, const EfficientScan& w, int64_t b, int64_t i0,
                             void* scores) {
  if (i0 < w.rows) efficient_strip(p, w, i0);
  for (int64_t h = 0; h < p.heads; ++h) {
    for (int64_t j = 0; j < w.rows; ++j) w.ends[j] = w.y[j * w.heads + h];
    for (int64_t i = i0; i < p.tokens && i < i0 + TILE; ++i) {
      float* row = w.row;
      const float *a = w.strip + (i - i0) * w.columns, x = i < w.rows ? w.x[i * w.heads + h] : 0;
      for (int64_t j = 0; j < w.rows; ++j) row[j] = a[j] + x + w.ends[j];
      write_scores(p, b, h, i, row, scores);
    }
  }
}

// The spans of a tile's height of starts, by (start, end, head), to `found` one cell at a time.
// A cell is looked at only if its largest start and end bias together pass: rounding is monotone, so the bound holds.
static void efficient_search(const EfficientGlobalPointerParams& p, const EfficientScan& w, int64_t i0, float threshold,
                             FoundCallback found, void* context, FoundSpan* buffer) {
  const int64_t begin = efficient_strip(p, w, i0);
  const float* strip = w.strip;
  const vec limit = rounded(splat(threshold), p.type);
  for (int64_t i = i0; i < w.rows && i < i0 + TILE; ++i) {
    const float *a = strip + (i - i0) * w.columns, *x = w.x + i * w.heads;
    const vec top_x = splat(w.top_x[i]);
    for (int64_t j0 = begin; j0 < w.rows; j0 += LANES) {
      uint32_t cells = bits_of(rounded(loadv(a + j0) + top_x + loadv(w.top_y + j0), p.type) > limit);
      for (; cells != 0; cells &= cells - 1) {
        const int64_t j = j0 + __builtin_ctz(cells);
        if (j >= w.rows || (p.tril && j < i)) continue;
        const vec product = splat(a[j]);
        const float* y = w.y + j * w.heads;
        int64_t count = 0;
        for (int64_t h = 0; h < w.heads; h += LANES) {
          const vec s = rounded(product + loadv(x + h) + loadv(y + h), p.type);
          for (uint32_t heads = bits_of(s > limit); heads != 0; heads &= heads - 1) {
            const int lane = __builtin_ctz(heads);
            buffer[count++] = {static_cast<int32_t>(h + lane), static_cast<int32_t>(i), static_cast<int32_t>(j), s[lane]};
          }
        }
        if (count != 0) found(context, buffer, count);
      }
    }
  }
}

static EfficientKernels efficient_kernels() {
  return {efficient_begin,  efficient_rows,       efficient_sum,    efficient_weigh, efficient_tile_gradient,
          efficient_finish, efficient_scan_begin, efficient_scores, efficient_search};
}
