// What the loops of gated attention work on: one sample, one thread's memory, and the functions of an instruction set.
#pragma once
#include "gau_attention.h"

namespace supy {

// A sample's tensors (see GauAttentionParams), and what is made of them once and read by all rows. A panel is named after
// its matrix; "_left" and "_right" say which side of a product it is, "_turned" that its depth is the tokens.
struct GauSample {
  int64_t tokens, length, key_size, value_size;
  int64_t rows;          // of a task, forward
  bool softmax, swish;  // swish: v and u hold what comes before the activation
  const int64_t *first, *last;
  const float *factor, *share;
  TokenMatrix q, k, v, u, out, attended, grad, dq, dk, dv, du;
  float* stats;
  float *k_right, *v_turned;                                                    // forward
  float *q_left, *q_turned, *k_turned, *v_right, *g_left, *g_turned, *delta;    // backward
  float *sum_dq, *sum_dk, *sum_dv;
};

// The projections of a sample.
struct GauUnit {
  int64_t dim;
  TokenMatrix x, h, y, grad, dx;
  const float *gamma, *beta, *cosine, *sine;
  float *uv_right, *z_right, *out_right, *in_turned, *out_turned;   // of the weights
  float *gated_turned, *grad_turned, *dh_turned, *x_turned;         // backward
  float *sum_w_in, *sum_w_out;  // gradients of the weights, rows and columns padded
  float* sum_affine;            // [4, S] of each block of rows: gradients of gamma and beta
};

struct GauWork {
  float *left;           // a panel of a block of rows, as deep as any matrix here
  float *weights;        // a panel of A or dS
  float *scores, *more;  // [block, keys]
  float *sums;           // [block, columns]
  float *strip;          // numbers on their way into a panel
  float *peak, *total;   // [block]
};

struct GauKernels {
  int64_t forward_block, row_block, backward_block;  // rows of a task: forward (at most), backward, of a tile of gradients
  int64_t keys, packed, strip, wide;                 // keys of a tile and of a task; floats; columns of h made at once
  int64_t (*forward_rows)(int64_t tokens);
  int64_t (*left_floats)(int64_t rows, int64_t depth);
  int64_t (*right_floats)(int64_t rows, int64_t depth);
  int64_t (*columns)(int64_t n);  // of a row of results of n numbers
  void (*pack_keys)(const GauSample& s, int64_t first);
  void (*attend)(const GauSample& s, GauWork& w, int64_t row);
  void (*prepare)(const GauSample& s, GauWork& w, int64_t row);
  void (*tile_gradient)(const GauSample& s, GauWork& w, int64_t row, int64_t key);
  void (*finish)(const GauSample& s, int64_t row);
  void (*pack_weight)(const void* data, int64_t rows, int64_t columns, bool turned, int64_t first, float* panel);
  void (*project)(const GauSample& s, const GauUnit& l, GauWork& w, int64_t row);
  void (*attend_unit)(const GauSample& s, const GauUnit& l, GauWork& w, int64_t row);
  void (*prepare_unit)(const GauSample& s, const GauUnit& l, GauWork& w, int64_t row);
  void (*sum_w_out)(const GauSample& s, const GauUnit& l, int64_t row, int64_t rows);
  void (*finish_unit)(const GauSample& s, const GauUnit& l, GauWork& w, int64_t row);
  void (*sum_w_in)(const GauSample& s, const GauUnit& l, int64_t row, int64_t rows);
  void (*round)(const float* sums, int64_t step, int64_t rows, int64_t n, void* out);  // to the tensors' type
};

}  // namespace supy
