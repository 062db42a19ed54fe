// The loops of hull_separation.cpp. Vectors are padded with zeros to whole lines of `line` numbers.
static constexpr int64_t line = 16, block = 32;

// out[i] = rows_i . x, where rows is stored in blocks of 32 rows: [blocks, n, 32].
static void block_products(const double* __restrict rows, int64_t blocks, int64_t n, const double* __restrict x,
                           double* __restrict out) {
  for (int64_t b = 0; b < blocks; ++b, out += block) {
    double sum[block] = {};
    for (int64_t j = 0; j < n; ++j, rows += block)
      for (int64_t i = 0; i < block; ++i) sum[i] += rows[i] * x[j];
    for (int64_t i = 0; i < block; ++i) out[i] = sum[i];
  }
}

// out[i] = rows_i . x, where rows is [count, n].
static void row_products(const double* __restrict rows, int64_t count, int64_t n, const double* __restrict x,
                         double* __restrict out) {
  for (int64_t r = 0; r < count; ++r, rows += n) {
    double sum[line] = {};
    int64_t j = 0;
    for (; j + line <= n; j += line)
      for (int64_t i = 0; i < line; ++i) sum[i] += rows[j + i] * x[j + i];
    for (; j < n; ++j) sum[0] += rows[j] * x[j];
    for (int64_t half = line / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
    out[r] = sum[0];
  }
}

// v -= Q Q^T v, with the coefficients added to `coefficients`: q is [count, size], orthonormal rows.
static void project_out(const double* __restrict q, int64_t count, int64_t size, double* __restrict v,
                        double* __restrict coefficients) {
  for (int64_t r = 0; r < count; ++r) {
    const double* __restrict row = q + r * size;
    double sum[line] = {};
    for (int64_t j = 0; j < size; j += line)
      for (int64_t i = 0; i < line; ++i) sum[i] += row[j + i] * v[j + i];
    for (int64_t half = line / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
    coefficients[r] += sum[0];
    for (int64_t j = 0; j < size; ++j) v[j] -= sum[0] * row[j];  // modified Gram-Schmidt
  }
}

// (a, b) = (c a + s b, c b - s a)
static void rotate_pair(double* __restrict a, double* __restrict b, int64_t size, double c, double s) {
  for (int64_t j = 0; j < size; ++j) {
    const double old = a[j];
    a[j] = c * old + s * b[j];
    b[j] = c * b[j] - s * old;
  }
}
