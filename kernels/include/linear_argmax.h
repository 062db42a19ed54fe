// The largest logit of each row of a product, of which nothing else is stored.
#pragma once
#include <cstdint>

#include "simd.h"

namespace supy {

struct LinearArgmaxParams {
  FloatType type;        // of x and weight
  const void *x, *weight;
  int64_t x_step, weight_step;  // from row to row, in elements
  int64_t rows, classes, size;
  const float* bias;       // [classes], or null
  const int64_t* exclude;  // [rows], or null: a class that does not count
  const float* floor;      // [rows], or null: what is below it does not count
  float* values;           // [rows]: the largest x . w + b, or -inf
  int64_t* best;           // [rows]: the first class that has it, or -1
};

void linear_argmax_cpu(const LinearArgmaxParams& params);

}  // namespace supy
