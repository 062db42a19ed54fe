// One row of `half` pairs. Contiguous rows get loops that the compiler vectorises; others go element by element.
template <typename T>
static void rotate_row(const T* x, int64_t xs, const float* c, const float* s, int64_t ts, T* out, int64_t os,
                       int64_t half, bool interleaved, float sign) {
  if (xs == 1 && ts == 1 && os == 1) {
    if (interleaved) {
      for (int64_t i = 0; i < half; ++i) {
        const float a = load(x + 2 * i), b = load(x + 2 * i + 1), sine = sign * s[i];
        store(out + 2 * i, a * c[i] - b * sine);
        store(out + 2 * i + 1, b * c[i] + a * sine);
      }
    } else {
      for (int64_t i = 0; i < half; ++i) {
        const float a = load(x + i), b = load(x + i + half), sine = sign * s[i];
        store(out + i, a * c[i] - b * sine);
        store(out + i + half, b * c[i] + a * sine);
      }
    }
    return;
  }
  const int64_t step = interleaved ? 2 : 1, pair = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = load(x + i * step * xs), b = load(x + (i * step + pair) * xs);
    const float cosine = c[i * ts], sine = sign * s[i * ts];
    store(out + i * step * os, a * cosine - b * sine);
    store(out + (i * step + pair) * os, b * cosine + a * sine);
  }
}

template <typename T>
static void rotary_typed(const RotaryParams& p) {
  const int64_t rows = p.size[0] * p.size[1] * p.size[2];
  const float sign = p.inverse ? -1.0f : 1.0f;
#pragma omp parallel for if (rows * p.dim > 16384) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i2 = row % p.size[2], i1 = row / p.size[2] % p.size[1], i0 = row / p.size[2] / p.size[1];
    const int64_t table = i0 * p.table_stride[0] + i1 * p.table_stride[1] + i2 * p.table_stride[2];
    rotate_row(static_cast<const T*>(p.x) + i0 * p.x_stride[0] + i1 * p.x_stride[1] + i2 * p.x_stride[2],
               p.x_stride[3], p.cosine + table, p.sine + table, p.table_stride[3],
               static_cast<T*>(p.out) + i0 * p.out_stride[0] + i1 * p.out_stride[1] + i2 * p.out_stride[2],
               p.out_stride[3], p.dim / 2, p.interleaved, sign);
  }
}

static void rotary(const RotaryParams& p) {
  if (p.type == RotaryType::bf16)
    rotary_typed<bf16>(p);
  else
    rotary_typed<float>(p);
}
