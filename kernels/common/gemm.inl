// Small matrix products on packed tiles, for kernels that fuse them with what comes before and after. Includes vector.inl.
#include "vector.inl"

static constexpr int64_t TILE = 64;  // rows and columns of a tile of scores: 16 KB, which stay in the first-level cache
static constexpr int ROWS = LANES == 16 ? 8 : 4;  // rows of a register block: with 3 vectors of columns, all registers

// Element (row, column) is at data[row * row_step + column * column_step].
struct Matrix {
  const float* data;
  int64_t row_step, column_step;
};

// Which part of a product is wanted, or not zero, where the tile lies on the diagonal of an upper triangle.
enum class Part {
  all,
  upper_result,  // only c[i][j] with j >= i is wanted
  upper_left,    // a[i][l] is zero for l < i
  lower_left,    // a[i][l] is zero for l > i
};

template <int VECTORS>
static inline void gemm_block(int64_t first, int64_t last, Matrix a, const float* b, int64_t b_step, float* c,
                              int64_t c_step, bool add) {
  vec sum[ROWS][VECTORS];  // registers, which is why every loop over it is unrolled
#pragma GCC unroll 24
  for (int i = 0; i < ROWS * VECTORS; ++i)
    sum[i / VECTORS][i % VECTORS] = add ? loadv(c + i / VECTORS * c_step + i % VECTORS * LANES) : vec{};
  for (int64_t l = first; l < last; ++l) {
    vec right[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) right[v] = loadv(b + l * b_step + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const vec left = splat(a.data[r * a.row_step + l * a.column_step]);
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < ROWS * VECTORS; ++i)
    storev(c + i / VECTORS * c_step + i % VECTORS * LANES, sum[i / VECTORS][i % VECTORS]);
}

// c[m, n] = a[m, k] b[k, n], or += with `add`; n is a multiple of LANES, and m is rounded up to one of ROWS: a and c have
// such rows. Each element is one chain of sums over k, so its bits depend on nothing else.
static void gemm(int64_t m, int64_t n, int64_t k, Matrix a, const float* b, int64_t b_step, float* c, int64_t c_step,
                 bool add, Part part = Part::all) {
  for (int64_t j = 0; j < n;) {
    const int64_t left = (n - j) / LANES;
    const int vectors = left == 4 || left == 2 ? 2 : left < 3 ? 1 : 3;
    for (int64_t i = 0; i < m; i += ROWS) {
      if (part == Part::upper_result && j + vectors * LANES <= i) break;
      const int64_t first = part == Part::upper_left ? i : 0;
      const int64_t last = part == Part::lower_left && i + ROWS < k ? i + ROWS : k;
      const Matrix rows{a.data + i * a.row_step, a.row_step, a.column_step};
      float* out = c + i * c_step + j;
      if (vectors == 3)
        gemm_block<3>(first, last, rows, b + j, b_step, out, c_step, add);
      else if (vectors == 2)
        gemm_block<2>(first, last, rows, b + j, b_step, out, c_step, add);
      else
        gemm_block<1>(first, last, rows, b + j, b_step, out, c_step, add);
    }
    j += vectors * LANES;
  }
}

// out[columns][rows] = in[rows][columns], both multiples of LANES.
static void transpose(const float* in, int64_t in_step, int64_t rows, int64_t columns, float* out, int64_t out_step) {
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t j = 0; j < columns; j += LANES) {
      vec block[LANES];
      for (int l = 0; l < LANES; ++l) block[l] = loadv(in + (i + l) * in_step + j);
      transpose(block);
      for (int l = 0; l < LANES; ++l) storev(out + (j + l) * out_step + i, block[l]);
    }
}
