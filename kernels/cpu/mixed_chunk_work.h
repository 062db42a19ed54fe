// What the loops of mixed chunks work on: a call, one chunk of it, one thread's memory, and the functions of an
// instruction set.
#pragma once
#include "mixed_chunk_attention.h"

namespace supy {

// What all chunks share. A panel is named after its matrix; "_left" and "_right" say which side of a product it is,
// "_turned" that its depth is the tokens.
struct MixedCall {
  int64_t key_size, value_size, chunk, dim;  // dim: 0 without projections; else v and u hold what comes before swish
  bool causal;
  float factor;                                                  // of the squared scores
  const float *scale, *offset;                                   // [4, S]
  float *in_right, *out_right, *in_turned, *out_turned;          // of the weights
  float *gated_turned, *grad_turned, *dh_turned, *x_turned;      // over all tokens in memory
  int64_t turned;                                                // their depth
};

// A chunk that is in memory. Token matrices begin with its first token.
struct MixedChunk {
  int64_t rows, tokens;  // below the sample's length, and all
  int64_t word;          // of its first token in panels over all tokens
  float weight;          // of its linear part
  TokenMatrix heads[4];  // q and k of the quadratic part, then of the linear one
  TokenMatrix v, u, out, x, h;
  const float *cosine, *sine;
  float *k_right, *k_turned;  // quadratic, linear
  float *values;              // right panel of [M; v], M what the linear part reads
  // Gradients: grad is that of out; g that of u * (A v + M q), which without projections is the same.
  TokenMatrix grad, g, dx, dv, du, dheads_out[4];
  float *known;              // right panel of the rows of M, then of v
  float *q_turned;           // linear, weighted
  float *quad_k_turned, *quad_q_turned;
  float *weights_turned;     // left panel of [A^T, k_lin]
  float *slopes_turned;      // left panel of dS^T
  float *grads;              // right panel of [u * g; dM]
  float *back;               // right panel of the rows of dM
  float *dheads;             // [4, chunk, S], rows padded
  float *dh;                 // [chunk, 2 E + S]
  float *affine;             // of each block of rows: gradients of scale and offset, [8, S]
};

// Sums over tokens [S, E], M or dM, and the panels of a chunk that they are read from and written to.
struct MixedSums {
  float *sums, *turned, *panel, *rows;
  bool last;  // the sums stand behind the tokens in the panel
};

struct MixedWork {
  float *left;    // a panel of a block of rows, as deep as any matrix here
  float *scores;  // [block, chunk]
  float *wide;    // [block, S + chunk]
  float *heads;   // [block, S]
  float *sums, *more;  // [block, columns]
};

// Some of the words of a panel's depth.
struct MixedWords {
  int64_t all, first, last;
};

struct MixedKernels {
  int64_t block, columns_at_once, strip;  // rows of a task; columns of M; rows of a weight that are packed
  int64_t (*left_floats)(int64_t rows, int64_t depth);
  int64_t (*right_floats)(int64_t rows, int64_t depth);
  int64_t (*columns)(int64_t n);  // of a row of results of n numbers
  int64_t (*depth)(int64_t k);    // words
  void (*pack_weight)(const void* data, int64_t rows, int64_t columns, bool turned, int64_t first, float* panel);
  void (*project)(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row);
  void (*pack)(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row);
  void (*scan)(const MixedCall& z, const MixedChunk& m, const MixedSums& s, int64_t e, bool read, bool add);
  void (*attend)(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row);
  void (*project_grad)(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row);
  void (*pack_grad)(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row);
  void (*row_gradients)(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row);
  void (*key_gradients)(const MixedCall& z, const MixedChunk& m, MixedWork& w, int64_t row);
  // sums += left * right, rows from `row` on, with rows of sums columns(n) apart.
  void (*add_product)(int64_t row, int64_t rows, int64_t n, MixedWords depth, float* left, float* right, float* sums);
};

}  // namespace supy
