// What the loops of linear_argmax work on, and the functions of an instruction set.
#pragma once
#include "linear_argmax.h"

namespace supy {

// Classes [first, first + count) packed, and what their rows can reach: for each tile its longest row and largest bias.
struct PackedClasses {
  int64_t first, count;
  float* panel;
  const float* bias;  // [count], padded with zeros to a tile, or null
  double *longest, *highest;
};

struct ArgmaxWork {
  float *left, *tile;  // a packed block of rows, and its logits [rows, columns]
};

struct LinearArgmaxKernels {
  int64_t rows, columns;  // of a tile of logits
  int64_t (*depth)(int64_t size);
  int64_t (*left_floats)(int64_t rows, int64_t size);
  int64_t (*right_floats)(int64_t rows, int64_t size);
  void (*pack)(const LinearArgmaxParams& p, const PackedClasses& c, int64_t tile);
  void (*lengths)(const LinearArgmaxParams& p, int64_t first, int64_t last, double* out);
  void (*search)(const LinearArgmaxParams& p, const PackedClasses& c, const ArgmaxWork& w, const double* lengths,
                 int64_t row);
};

}  // namespace supy
