// The memory in which the loss of one sample is computed.
#pragma once

#include "efficient_global_pointer.h"

namespace supy {

// A cell that is positive for the heads of some spans.
struct PositiveCell {
  int64_t row, column;  // among the rows of the sample
  int64_t first, last;  // of its spans
  float score;          // scale q . k, set by the forward pass
};

// One sample. Its rows are the tokens of which some head can use the start or the end; rows and heads are padded.
struct EfficientWork {
  EfficientWork(const EfficientGlobalPointerParams& p, float* base, int64_t& used) {
    const int64_t rows = (p.tokens + 63) / 64 * 64;
    Pieces pieces(base);
    size = (p.size + 15) / 16 * 16;
    heads = (p.heads + 15) / 16 * 16;
    for (float** piece : {&q, &k, &k_turned, &dq, &dk}) *piece = pieces.take(rows * size);
    for (float** piece : {&x, &ex, &ey, &ey_turned, &u, &v}) *piece = pieces.take(rows * heads);
    for (float** piece : {&shift, &closed_start, &closed_end}) *piece = pieces.take(rows);
    for (float** piece : {&top_x, &top_y, &log_z, &negative, &positive, &weight, &sum, &sum_positive, &head_of_cell, &row_x, &row_y})
      *piece = pieces.take(heads);
    for (float** piece : {&direct_x, &direct_y, &direct_dx, &direct_dy}) *piece = pieces.take(rows);
    tiles = pieces.take(2 * 64 * 64);
    token = reinterpret_cast<int32_t*>(pieces.take(rows));
    row_of = reinterpret_cast<int32_t*>(pieces.take(rows));
    used = pieces.used();
  }

  int64_t size, heads;              // D and H, padded
  float *q, *k, *k_turned;          // q is scaled; k_turned is [tiles][size][64]
  float *dq, *dk;                   // dq still lacks the scale
  float *x, *ex, *ey, *ey_turned;   // start biases; e^x and e^y, shifted; ey_turned is [tiles][heads][64]
  float *u, *v;                     // P e^y, then dx; P^T e^x, then dy
  float* shift;                     // of each row of P: its largest product
  float *closed_start, *closed_end; // 0, or -inf where every head's bias is
  float *top_x, *top_y;             // what e^x and e^y are shifted by
  float *log_z;                     // log of the sum over all cells that are positive for no head
  float *negative, *positive;       // the two halves of the loss, a head
  float* weight;                    // gradient of the loss by e^x P e^y, a head
  float *sum, *sum_positive;        // parts of these, a head
  float *head_of_cell, *row_x, *row_y;                 // of one cell
  float *direct_x, *direct_y, *direct_dx, *direct_dy;  // of one head
  float* tiles;                     // two tiles for the caller's thread
  int32_t *token, *row_of;          // of each row, and back: -1 for a token without a row
  int64_t rows;
  PositiveCell* cells;              // by (row, column)
  int64_t num_cells;
};

// One sample for its scores and spans.
struct EfficientScan {
  EfficientScan(const EfficientGlobalPointerParams& p, float* base, int64_t& used) {
    columns = (p.tokens + 63) / 64 * 64;
    size = (p.size + 15) / 16 * 16;
    heads = (p.heads + 15) / 16 * 16;
    Pieces pieces(base);
    for (float** piece : {&q, &k, &k_turned}) *piece = pieces.take(columns * size);
    for (float** piece : {&x, &y}) *piece = pieces.take(columns * heads);
    for (float** piece : {&top_x, &top_y, &ends, &row}) *piece = pieces.take(columns);
    strip = pieces.take(64 * columns);
    used = pieces.used();
  }

  int64_t rows, columns, size, heads;  // tokens; T, D and H, padded
  float *q, *k, *k_turned;             // as above
  float *x, *y, *top_x, *top_y;        // biases, and the largest of each token
  float *strip, *ends, *row;           // products of a tile's height of rows; one head's end biases and scores
};

// What cpu/efficient_global_pointer.inl defines, for one instruction set.
struct EfficientKernels {
  void (*begin)(const EfficientGlobalPointerParams&, EfficientWork&, int64_t b);
  void (*rows)(const EfficientGlobalPointerParams&, EfficientWork&, int64_t i0, float* tile);
  double (*sum)(const EfficientGlobalPointerParams&, EfficientWork&, const Span* spans, int64_t b);
  void (*weigh)(const EfficientGlobalPointerParams&, EfficientWork&);
  void (*tile_gradient)(const EfficientGlobalPointerParams&, EfficientWork&, int64_t i0, int64_t j0, float* tiles);
  void (*finish)(const EfficientGlobalPointerParams&, EfficientWork&, const EfficientGlobalPointerLoss&, int64_t b);
  void (*scan_begin)(const EfficientGlobalPointerParams&, EfficientScan&, int64_t b);
  void (*scores)(const EfficientGlobalPointerParams&, const EfficientScan&, int64_t b, int64_t i0, void* scores);
  void (*search)(const EfficientGlobalPointerParams&, const EfficientScan&, int64_t i0, float threshold,
                 FoundCallback found, void* context, FoundSpan* buffer);
};

}  // namespace supy
