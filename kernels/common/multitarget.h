// Compiles SUPY_KERNEL once for each instruction set, each time in a namespace of its own (see simd.h).
// The kernel file includes nothing and instantiates no template of the standard library: the linker would keep one
// copy for all targets, perhaps one with instructions that this processor lacks.
#ifndef SUPY_KERNEL
#error "define SUPY_KERNEL, the .inl file, before including multitarget.h"
#endif

// SUPY_LANES, the float32 of a vector, because g++ 12 defines __AVX512F__ and its like too late for a pragma to show.
#define SUPY_LANES 4
namespace supy::generic {
#include "narrow.inl"
#include SUPY_KERNEL
}  // namespace supy::generic

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt,lzcnt")
#undef SUPY_LANES
#define SUPY_LANES 8
namespace supy::avx2 {
#include "narrow.inl"
#include SUPY_KERNEL
}  // namespace supy::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
#undef SUPY_LANES
#define SUPY_LANES 16
namespace supy::avx512 {
#include "narrow.inl"
#include SUPY_KERNEL
}  // namespace supy::avx512
#pragma GCC pop_options
#else
namespace supy {
namespace avx2 = generic;
namespace avx512 = generic;
}  // namespace supy
#endif

#undef SUPY_LANES
#undef SUPY_KERNEL
