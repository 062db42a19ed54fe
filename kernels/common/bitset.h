// Sets of small integers as 64-bit words, the first element in the highest bit: comparing two words as numbers then
// compares the sets in lexicographic order, largest first.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SUPY_HOST_DEVICE __host__ __device__
#else
#define SUPY_HOST_DEVICE
#endif

namespace supy::bits {

SUPY_HOST_DEVICE inline uint64_t bit(int i) { return (uint64_t{1} << 63) >> i; }

// The set {0, ..., n - 1}, n <= 64.
SUPY_HOST_DEVICE inline uint64_t first_n(int n) { return n == 0 ? 0 : ~uint64_t{0} << (64 - n); }

SUPY_HOST_DEVICE inline int count(uint64_t set) {
#ifdef __CUDA_ARCH__
  return __popcll(set);
#else
  return __builtin_popcountll(set);
#endif
}

// The smallest element of a set that is not empty.
SUPY_HOST_DEVICE inline int first(uint64_t set) {
#ifdef __CUDA_ARCH__
  return __clzll(set);
#else
  return __builtin_clzll(set);
#endif
}

// visit(i) for every element, ascending.
template <class Visit>
SUPY_HOST_DEVICE inline void each(uint64_t set, Visit&& visit) {
  while (set) {
    const int i = first(set);
    set ^= bit(i);
    visit(i);
  }
}

// Sets of any size: element i is in word i / 64.
SUPY_HOST_DEVICE inline int64_t words(int64_t n) { return (n + 63) / 64; }
SUPY_HOST_DEVICE inline bool has(const uint64_t* set, int64_t i) { return set[i >> 6] & bit(i & 63); }
SUPY_HOST_DEVICE inline void add(uint64_t* set, int64_t i) { set[i >> 6] |= bit(i & 63); }
SUPY_HOST_DEVICE inline void remove(uint64_t* set, int64_t i) { set[i >> 6] &= ~bit(i & 63); }

}  // namespace supy::bits
