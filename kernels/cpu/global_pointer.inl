// One head of one sample: its loss, scores and spans. See supy/reference/global_pointer.py for the formula.
#include "score_tiles.inl"

// Reads some heads of a sample. A token's heads lie side by side and tokens far apart, so the more heads are read at once,
// the fewer pages are visited.
static void pointer_begin(const GlobalPointerParams& p, PointerWork& w, int64_t b, int64_t first, int64_t count) {
  const int64_t D = w.size;
  w.rows = p.lengths[b];
  const int64_t padded = round_up(w.rows, TILE);
  for (int64_t t = 0; t < padded; ++t)
    for (int64_t g = 0; g < count; ++g) {
      float *q = w.group_q + (g * w.columns + t) * D, *k = w.group_k + (g * w.columns + t) * D;
      if (t < w.rows) {
        read_token(p.q, p.type, b, t, first + g, p.size, D, p.scale, q);
        read_token(p.k, p.type, b, t, first + g, p.size, D, 1, k);
      } else {
        fill(q, D, 0);
        fill(k, D, 0);
      }
    }
  fill(w.closed, w.rows, 0);
  fill(w.closed + w.rows, padded - w.rows, -INF);
}

static void pointer_select(PointerWork& w, int64_t g) {
  const int64_t head = w.columns * w.size;
  w.q = w.group_q + g * head, w.k = w.group_k + g * head;
  w.dq = w.group_dq + g * head, w.dk = w.group_dk + g * head;
  for (int64_t t = 0; t < w.rows; t += TILE) turn_tile(w.k + t * w.size, w.size, w.k_turned + t * w.size);
}

// The scores of a tile of cells: [TILE][step].
static void pointer_tile(const GlobalPointerParams& p, const PointerWork& w, int64_t i0, int64_t j0, float* out,
                         int64_t step, Part part) {
  const int64_t rows = w.rows - i0 < TILE ? w.rows - i0 : TILE;
  const int64_t columns = round_up(w.rows - j0 < TILE ? w.rows - j0 : TILE, LANES);
  gemm(rows, columns, p.size, {w.q + i0 * w.size, w.size, 1}, w.k_turned + j0 * w.size, TILE, out, step, false, part);
}

static void multiply(float* x, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

// The group's gradients to their place in [B, T, H, D], and zeros beyond the sample.
static void pointer_write(const GlobalPointerParams& p, const PointerWork& w, const GlobalPointerLoss& loss, int64_t b,
                          int64_t first, int64_t count) {
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t g = 0; g < count; ++g) {
      const int64_t from = (g * w.columns + t) * w.size, to = ((b * p.tokens + t) * p.heads + first + g) * p.size;
      if (t < w.rows) {
        for (int64_t d = 0; d < p.size; ++d) loss.dq[to + d] = p.scale * w.group_dq[from + d];
        for (int64_t d = 0; d < p.size; ++d) loss.dk[to + d] = w.group_dk[from + d];
      } else {
        fill(loss.dq + to, p.size, 0);
        fill(loss.dk + to, p.size, 0);
      }
    }
}

// One pass over the cells: e^(s - top) is summed and multiplied into dq and dk at once, as the derivative of the loss by s
// is that times one number a head. The scores are shifted by `top`, which follows their maximum so that none exceeds it by
// more than `slack`; few tiles make it move, and then all that was summed is scaled.
static double pointer_loss(const GlobalPointerParams& p, PointerWork& w, bool gradients, const Span* spans, int64_t count,
                           float* at) {
  constexpr float slack = 16;
  const int64_t D = w.size, padded_rows = round_up(w.rows, TILE);
  float top = -INF, *tile = w.strip;
  double total = 0;
  if (gradients) {
    fill(w.dq, padded_rows * D, 0);
    fill(w.dk, padded_rows * D, 0);
  }
  int64_t of_rows = 0;  // the first positive of this height of rows
  for (int64_t i0 = 0; i0 < w.rows; i0 += TILE) {
    const int64_t rows = w.rows - i0 < TILE ? w.rows - i0 : TILE;
    int64_t end = of_rows;
    while (end < count && spans[end].start < i0 + TILE) ++end;
    for (int64_t j0 = p.tril ? i0 : 0; j0 < w.rows; j0 += TILE) {
      const int64_t columns = w.rows - j0 < TILE ? w.rows - j0 : TILE, padded = round_up(columns, LANES);
      const bool diagonal = p.tril && i0 == j0;
      pointer_tile(p, w, i0, j0, tile, TILE, diagonal ? Part::upper_result : Part::all);
      if (diagonal || columns < padded) hide(tile, rows, padded, w.closed + j0, diagonal);
      for (int64_t n = of_rows; n < end; ++n) {
        const int64_t column = spans[n].end - j0;
        if (column < 0 || column >= TILE) continue;
        float& s = tile[(spans[n].start - i0) * TILE + column];
        at[n] = s;
        s = -INF;
      }
      vec peak = splat(-INF);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < padded; c += LANES) peak = maxv(loadv(tile + r * TILE + c), peak);
      const float now = max_of(peak);
      if (now > top + slack || (top == -INF && now > top)) {
        const float factor = top == -INF ? 0 : __builtin_expf(top - now);
        top = now;
        total *= static_cast<double>(factor);
        if (gradients && factor > 0) {
          multiply(w.dq, (i0 + TILE) * D, factor);
          multiply(w.dk, padded_rows * D, factor);
        }
      }
      const vec shift = splat(finite_or_zero(top));
      vec sum{};
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < padded; c += LANES) {
          const vec e = expv(loadv(tile + r * TILE + c) - shift);
          storev(tile + r * TILE + c, e);
          sum += e;
        }
      total += static_cast<double>(sum_of(sum));
      if (!gradients) continue;
      gemm(rows, D, columns, {tile, TILE, 1}, w.k + j0 * D, D, w.dq + i0 * D, D, true,
           diagonal ? Part::upper_left : Part::all);
      gemm(columns, D, rows, {tile, 1, TILE}, w.q + i0 * D, D, w.dk + j0 * D, D, true,
           diagonal ? Part::lower_left : Part::all);
    }
    of_rows = end;
  }

  const float log_z = finite_or_zero(top) + __builtin_logf(static_cast<float>(total));
  const float above = log_z > 0 ? log_z : 0;
  const float negative = log_one_plus(above, __builtin_expf(log_z - above));
  float below = 0, rest = 0;  // -s of the positives; a score of -inf takes part in nothing
  for (int64_t n = 0; n < count; ++n)
    if (-at[n] > below && at[n] != -INF) below = -at[n];
  for (int64_t n = 0; n < count; ++n)
    if (at[n] != -INF) rest += __builtin_expf(-at[n] - below);
  const float positive = log_one_plus(below, rest);
  if (gradients) {
    const float share = 1.0f / static_cast<float>(p.batch);
    const float weight = share * __builtin_expf(finite_or_zero(top) - negative);
    multiply(w.dq, w.rows * D, weight);
    multiply(w.dk, w.rows * D, weight);
    for (int64_t n = 0; n < count; ++n) {
      if (at[n] == -INF) continue;
      const float ds = -share * __builtin_expf(-at[n] - positive);
      const int64_t row = spans[n].start * D, column = spans[n].end * D;
      for (int64_t d = 0; d < D; ++d) {
        w.dq[row + d] += ds * w.k[column + d];
        w.dk[column + d] += ds * w.q[row + d];
      }
    }
  }
  return static_cast<double>(negative) + static_cast<double>(positive);
}

// The scores of a tile's height of starts with every end that they see. Returns the first of these ends.
static int64_t pointer_strip(const GlobalPointerParams& p, const PointerWork& w, int64_t i0) {
  const int64_t begin = p.tril ? i0 : 0;
  for (int64_t j0 = begin; j0 < w.rows; j0 += TILE) pointer_tile(p, w, i0, j0, w.strip + j0, w.columns, Part::all);
  return begin;
}

static void pointer_scores(const GlobalPointerParams& p, const PointerWork& w, int64_t b, int64_t h, void* scores) {
  for (int64_t i = 0; i < p.tokens; ++i) {
    if (i % TILE == 0 && i < w.rows) pointer_strip(p, w, i);
    write_scores(p, b, h, i, w.strip + i % TILE * w.columns, scores);
  }
}

// The spans of a tile's height of starts, by (start, end), to `found` one vector of ends at a time.
static void pointer_search(const GlobalPointerParams& p, const PointerWork& w, int64_t h, int64_t i0, float threshold,
                           FoundCallback found, void* context, FoundSpan* buffer) {
  const int64_t begin = pointer_strip(p, w, i0);
  const vec limit = rounded(splat(threshold), p.type);
  for (int64_t i = i0; i < w.rows && i < i0 + TILE; ++i) {
    const float* row = w.strip + (i - i0) * w.columns;
    for (int64_t j0 = begin; j0 < w.rows; j0 += LANES) {
      const vec s = rounded(loadv(row + j0), p.type);
      int64_t count = 0;
      for (uint32_t cells = bits_of(s > limit); cells != 0; cells &= cells - 1) {
        const int lane = __builtin_ctz(cells);
        const int64_t j = j0 + lane;
        if (j >= w.rows || (p.tril && j < i)) continue;
        buffer[count++] = {static_cast<int32_t>(h), static_cast<int32_t>(i), static_cast<int32_t>(j), s[lane]};
      }
      if (count != 0) found(context, buffer, count);
    }
  }
}

static PointerKernels pointer_kernels() {
  return {pointer_begin, pointer_select, pointer_loss, pointer_write, pointer_scores, pointer_search};
}
