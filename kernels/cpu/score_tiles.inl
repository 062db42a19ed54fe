// Tiles of scores and rows of tokens, for the kernels of both GlobalPointers.
#include "gemm.inl"

// out[0, count) as float32, times a factor; zeros up to `padded`.
template <typename T>
static inline void read_row(const T* in, int64_t step, int64_t count, int64_t padded, float factor, float* out) {
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) out[i] = factor * load(in + i);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = factor * load(in + i * step);
  for (int64_t i = count; i < padded; ++i) out[i] = 0;
}

static void read_token(const TokenRows& rows, FloatType type, int64_t batch, int64_t token, int64_t head, int64_t count,
                       int64_t padded, float factor, float* out) {
  const int64_t at = batch * rows.batch_step + token * rows.token_step + head * rows.head_step;
  if (type == FloatType::bf16)
    read_row(static_cast<const bf16*>(rows.data) + at, rows.step, count, padded, factor, out);
  else
    read_row(static_cast<const float*>(rows.data) + at, rows.step, count, padded, factor, out);
}

// out[size][TILE] = the tile's rows [TILE][size], turned; size is a multiple of LANES.
static void turn_tile(const float* rows, int64_t size, float* out) { transpose(rows, size, TILE, size, out, TILE); }

// -inf where a cell of the tile is hidden: in columns that are closed (not 0) and, on the diagonal, before the row's own.
static void hide(float* tile, int64_t rows, int64_t columns, const float* closed, bool diagonal) {
  ivec lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += LANES) {
      ivec seen = loadv(closed + c) == vec{};
      if (diagonal) seen &= lane + static_cast<int32_t>(c) >= static_cast<int32_t>(r);
      float* at = tile + r * TILE + c;
      storev(at, seen ? loadv(at) : splat(-INF));
    }
  }
}

static inline float finite_or_zero(float peak) { return peak == -INF ? 0.0f : peak; }

// log(1 + e^shift * rest), where shift >= 0 is 0 or what `rest` was divided by.
static inline float log_one_plus(float shift, float rest) {
  return shift == 0 ? __builtin_log1pf(rest) : shift + __builtin_logf(__builtin_expf(-shift) + rest);
}

// A score as a tensor of the inputs' type would hold it.
static inline vec rounded(vec s, FloatType type) {
  if (type == FloatType::f32) return s;
  for (int i = 0; i < LANES; ++i) s[i] = float_of(round_to_bf16(s[i]) & 0xffff0000);
  return s;
}

// Writes the scores of one start, `row`, to their place in [B, H, T, T]; cells that are hidden become -inf.
template <typename T>
static void write_row(const SpanScores& p, int64_t b, int64_t i, const float* row, T* out) {
  const int64_t n = p.lengths[b], begin = i >= n ? p.tokens : p.tril ? i : 0, end = i >= n ? p.tokens : n;
  for (int64_t j = 0; j < begin; ++j) store(out + j, -INF);
  for (int64_t j = begin; j < end; ++j) store(out + j, row[j]);
  for (int64_t j = end; j < p.tokens; ++j) store(out + j, -INF);
}

static void write_scores(const SpanScores& p, int64_t b, int64_t h, int64_t i, const float* row, void* scores) {
  const int64_t at = ((b * p.heads + h) * p.tokens + i) * p.tokens;
  if (p.type == FloatType::bf16)
    write_row(p, b, i, row, static_cast<bf16*>(scores) + at);
  else
    write_row(p, b, i, row, static_cast<float*>(scores) + at);
}
