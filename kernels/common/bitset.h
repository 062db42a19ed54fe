// Sets of small integers as 64-bit words, the first element in the highest bit: comparing two words as numbers then
// compares the sets in lexicographic order, largest first.
#pragma once

#include <cstdint>

// Always inlined: a copy of its own would not have the instructions of the function that calls it (see simd.h).
#ifdef __CUDACC__
#define SUPY_BITS __host__ __device__ __forceinline__
#else
#define SUPY_BITS inline __attribute__((always_inline))
#endif

namespace supy::bits {

SUPY_BITS uint64_t bit(int i) { return (uint64_t{1} << 63) >> i; }

// The set {0, ..., n - 1}, n <= 64.
SUPY_BITS uint64_t first_n(int n) { return n == 0 ? 0 : ~uint64_t{0} << (64 - n); }

SUPY_BITS int count(uint64_t set) {
#ifdef __CUDA_ARCH__
  return __popcll(set);
#else
  return __builtin_popcountll(set);
#endif
}

// The smallest element of a set that is not empty.
SUPY_BITS int first(uint64_t set) {
#ifdef __CUDA_ARCH__
  return __clzll(set);
#else
  return __builtin_clzll(set);
#endif
}

// Element i becomes bit i, counted from the lowest.
SUPY_BITS uint64_t reversed(uint64_t set) {
  set = (set >> 1 & 0x5555555555555555) | (set & 0x5555555555555555) << 1;
  set = (set >> 2 & 0x3333333333333333) | (set & 0x3333333333333333) << 2;
  set = (set >> 4 & 0x0f0f0f0f0f0f0f0f) | (set & 0x0f0f0f0f0f0f0f0f) << 4;
  set = (set >> 8 & 0x00ff00ff00ff00ff) | (set & 0x00ff00ff00ff00ff) << 8;
  set = (set >> 16 & 0x0000ffff0000ffff) | (set & 0x0000ffff0000ffff) << 16;
  return set >> 32 | set << 32;
}

// visit(i) for every element, ascending.
template <class Visit>
SUPY_BITS void each(uint64_t set, Visit&& visit) {
  while (set) {
    const int i = first(set);
    set ^= bit(i);
    visit(i);
  }
}

// Sets of any size: element i is in word i / 64.
SUPY_BITS int64_t words(int64_t n) { return (n + 63) / 64; }
SUPY_BITS bool has(const uint64_t* set, int64_t i) { return set[i >> 6] & bit(i & 63); }
SUPY_BITS void add(uint64_t* set, int64_t i) { set[i >> 6] |= bit(i & 63); }
SUPY_BITS void remove(uint64_t* set, int64_t i) { set[i >> 6] &= ~bit(i & 63); }

}  // namespace supy::bits
