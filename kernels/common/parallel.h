// Threads for the CPU kernels. torch and supy share one OpenMP runtime, so torch.set_num_threads governs these loops.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

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

// body(thread, i) for every i of [0, n), handed out in ascending order; thread 0 is the caller's. After an exception no
// later i begins, and the exception of the lowest i is thrown on: what the caller sees does not depend on timing.
template <class Body>
void parallel_for(int64_t n, int threads, Body&& body) {
  std::atomic<int64_t> next{0}, failed{n};
  std::exception_ptr error;
  std::mutex lock;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
#ifdef _OPENMP
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
    for (int64_t i; (i = next++) < failed;) {
      try {
        body(thread, i);
      } catch (...) {
        const std::lock_guard<std::mutex> hold(lock);
        if (i < failed) failed = i, error = std::current_exception();
      }
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace supy
