// Threads for the CPU kernels. torch and supy share one OpenMP runtime, so torch.set_num_threads governs these loops.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace supy {

// How many threads to use for n items when fewer than `grain` items are not worth a thread of their own.
inline int threads_for(int64_t n, int64_t grain) {
#ifdef _OPENMP
  if (omp_in_parallel()) return 1;
  return static_cast<int>(std::clamp<int64_t>(n / std::max<int64_t>(grain, 1), 1, omp_get_max_threads()));
#else
  return 1;
#endif
}

// body(thread, begin, end) over contiguous blocks of [0, n), in ascending order of thread. An exception ends its own
// block only; the one of the lowest block is thrown on, so what the caller sees does not depend on timing.
template <class Body>
void parallel_blocks(int64_t n, int threads, Body&& body) {
  if (threads <= 1) return body(0, int64_t{0}, n);
  std::vector<std::exception_ptr> errors(threads);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
  for (int t = 0; t < threads; ++t) {
    try {
      body(t, n / threads * t + std::min<int64_t>(n % threads, t),
           n / threads * (t + 1) + std::min<int64_t>(n % threads, t + 1));
    } catch (...) {
      errors[t] = std::current_exception();
    }
  }
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace supy
