#include "multilabel_cross_entropy.h"

#include <vector>

#include "simd.h"

namespace supy {
namespace {

constexpr int64_t CHUNK = 16384;  // classes that one task sums: fixed, so that the sum does not depend on the threads

// A sum of positive terms, in units of e^shift.
struct Sum {
  float shift;
  double sum;
};

struct Sums {
  Sum negative, positive;
};

}  // namespace
}  // namespace supy

#define SUPY_KERNEL "multilabel_cross_entropy.inl"
#include "multitarget.h"

namespace supy {

int64_t multilabel_cross_entropy_cpu(const MultilabelParams& params) {
  const int64_t chunks = (params.classes + CHUNK - 1) / CHUNK;
  std::vector<Sums> sums(chunks > 1 ? params.rows * chunks : 0);
  SUPY_SELECT(multilabel_cross_entropy, params, chunks, sums.data());
}

void multilabel_cross_entropy_backward_cpu(const MultilabelParams& params) {
  SUPY_SELECT(multilabel_cross_entropy_backward, params);
}

}  // namespace supy
