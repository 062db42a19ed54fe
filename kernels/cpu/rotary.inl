// Consecutive rows of `half` pairs: the tokens of one sequence. Contiguous rows get loops that the compiler vectorises.
template <typename T>
static inline void rotate_rows(const RotaryParams& p, const T* __restrict x, const float* __restrict cosine,
                               const float* __restrict sine, T* __restrict out, int64_t rows) {
  const int64_t half = p.dim / 2, xs = p.x_stride[3], ts = p.table_stride[3], os = p.out_stride[3];
  const int64_t x_row = p.x_stride[2], table_row = p.table_stride[2], out_row = p.out_stride[2];
  const float sign = p.inverse ? -1.0f : 1.0f;
  if (xs == 1 && ts == 1 && os == 1 && p.interleaved) {
    for (; rows > 0; --rows, x += x_row, cosine += table_row, sine += table_row, out += out_row) {
      for (int64_t i = 0; i < half; ++i) {
        const Pair in = load_pair(x + 2 * i);
        const float s = sign * sine[i];
        store_pair(out + 2 * i, {in.a * cosine[i] - in.b * s, in.b * cosine[i] + in.a * s});
      }
    }
  } else if (xs == 1 && ts == 1 && os == 1) {
    for (; rows > 0; --rows, x += x_row, cosine += table_row, sine += table_row, out += out_row) {
      for (int64_t i = 0; i < half; ++i) {
        const float a = load(x + i), b = load(x + i + half), s = sign * sine[i];
        store(out + i, a * cosine[i] - b * s);
        store(out + i + half, b * cosine[i] + a * s);
      }
    }
  } else {
    const int64_t step = p.interleaved ? 2 : 1, pair = p.interleaved ? 1 : half;
    for (; rows > 0; --rows, x += x_row, cosine += table_row, sine += table_row, out += out_row) {
      for (int64_t i = 0; i < half; ++i) {
        const float a = load(x + i * step * xs), b = load(x + (i * step + pair) * xs);
        const float c = cosine[i * ts], s = sign * sine[i * ts];
        store(out + i * step * os, a * c - b * s);
        store(out + (i * step + pair) * os, b * c + a * s);
      }
    }
  }
}

template <typename T>
static void rotary_typed(const RotaryParams& p) {
  constexpr int64_t block = 64;  // tokens a task: enough to hide the cost of starting, few enough to share out
  const int64_t blocks = (p.size[2] + block - 1) / block;
#pragma omp parallel for collapse(3) if (p.size[0] * p.size[1] * p.size[2] * p.dim > 16384) schedule(static)
  for (int64_t i0 = 0; i0 < p.size[0]; ++i0) {
    for (int64_t i1 = 0; i1 < p.size[1]; ++i1) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t i2 = b * block, rest = p.size[2] - i2;
        const int64_t table = i0 * p.table_stride[0] + i1 * p.table_stride[1] + i2 * p.table_stride[2];
        rotate_rows(p, static_cast<const T*>(p.x) + i0 * p.x_stride[0] + i1 * p.x_stride[1] + i2 * p.x_stride[2],
                    p.cosine + table, p.sine + table,
                    static_cast<T*>(p.out) + i0 * p.out_stride[0] + i1 * p.out_stride[1] + i2 * p.out_stride[2],
                    rest < block ? rest : block);
      }
    }
  }
}

static void rotary(const RotaryParams& p) {
  if (p.type == RotaryType::bf16)
    rotary_typed<bf16>(p);
  else
    rotary_typed<float>(p);
}
