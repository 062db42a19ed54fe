// Stores that pass the caches by; they want addresses aligned to the vector.
static inline void streamv(float* p, vec v) {
#if SUPY_LANES == 16
  __builtin_ia32_movntps512(p, v);
#elif SUPY_LANES == 8
  __builtin_ia32_movntps256(p, v);
#else
  storev(p, v);
#endif
}
template <class T>
static inline void streamv(T* p, vec v) {
#if SUPY_LANES > 4
  typedef long long line __attribute__((vector_size(2 * LANES)));
  T rounded[LANES];
  line all;
  storev(rounded, v);
  __builtin_memcpy(&all, rounded, sizeof all);
#endif
#if SUPY_LANES == 16
  __builtin_ia32_movntdq256((line*)p, all);
#elif SUPY_LANES == 8
  __builtin_ia32_movntdq((line*)p, all);
#else
  storev(p, v);
#endif
}
template <bool STREAM, class T>
static inline void put(T* p, vec v) {
  if (STREAM)
    streamv(p, v);
  else
    storev(p, v);
}
static inline void end_of_stream() {
#if SUPY_LANES > 4
  __builtin_ia32_sfence();
#endif
}

template <class T>
static inline bool aligned_to_vector(const T* p) {
  return (uintptr_t)p % (sizeof(T) * LANES) == 0;
}
