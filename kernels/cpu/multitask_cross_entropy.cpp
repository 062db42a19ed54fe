#include "multitask_cross_entropy.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace supy {
namespace {

// Tasks of one chunk: fixed by the sizes, so that the sums do not depend on the number of threads.
int64_t chunk_of(const MultitaskParams& p) { return std::max<int64_t>(64, 16384 / p.classes / 16 * 16); }

int threads_for(const MultitaskParams& p) { return supy::threads_for(p.batch * p.tasks * p.classes, 16384); }

}  // namespace
}  // namespace supy

#define SUPY_KERNEL "multitask_cross_entropy.inl"
#include "multitarget.h"

namespace supy {

bool multitask_cross_entropy_cpu(const MultitaskParams& params) {
  const int64_t chunk = chunk_of(params), chunks = (params.tasks + chunk - 1) / chunk;
  // Of each chunk and class a sum and its shift.
  std::vector<float> sums(2 * params.batch * chunks * params.classes);
  SUPY_SELECT(multitask_cross_entropy, params, chunk, sums.data());
}

void multitask_cross_entropy_backward_cpu(const MultitaskParams& params) {
  SUPY_SELECT(multitask_cross_entropy_backward, params, chunk_of(params));
}

}  // namespace supy
