// Which rows can be separated from all others by a direction within bounds: the contract between kernels/cpu and csrc.
// supy/reference/hull_separation.py says how.
#pragma once

#include <cstdint>

namespace supy {

struct HullSeparationParams {
  const double* rows;      // [num_rows, n], distinct
  const double* lower;     // [n - 1], at most 0
  const double* upper;     // [n - 1], at least 0
  const int64_t* classes;  // [num_classes], which rows
  const int64_t* start;    // [num_start], the rows that are tried first, the likeliest ones before the others
  int64_t num_rows, n, num_classes, num_start;
  int64_t* kind;        // [num_classes]: 0 undecided, 1 separated, 2 inside
  double* directions;   // [num_classes, n]
  int64_t* support;     // [num_classes, n + 1], -1 where there is none
  double* multipliers;  // [num_classes, n + 1]
};

void hull_separation_cpu(const HullSeparationParams& params);

}  // namespace supy
