// Which vector instructions this processor has, and loads and stores of narrow floats as float32.
//
// A kernel writes its loop nest once, in cpu/<op>.inl, and cpu/<op>.cpp compiles it for each instruction set:
//
//   #define SUPY_KERNEL "rotary.inl"
//   #include "multitarget.h"          // supy::generic, supy::avx2, supy::avx512
//   void rotary_cpu(const RotaryParams& p) { SUPY_SELECT(rotary, p); }
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace supy {

enum class InstructionSet { generic, avx2, avx512 };

inline const char* name_of(InstructionSet set) {
  constexpr const char* names[] = {"generic", "avx2", "avx512"};
  return names[static_cast<int>(set)];
}

// Asked once. SUPY_ISA=generic or avx2 steps down, to test those builds on a newer processor; see matrix_unit for the rest.
inline InstructionSet instruction_set() {
  static const InstructionSet found = [] {
    const char* wanted = std::getenv("SUPY_ISA");
    (void)wanted;
#if defined(__x86_64__) && defined(__GNUC__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && !(wanted && (!std::strcmp(wanted, "avx2") || !std::strcmp(wanted, "generic"))))
      return InstructionSet::avx512;
    if (avx2 && !(wanted && !std::strcmp(wanted, "generic"))) return InstructionSet::avx2;
#endif
    return InstructionSet::generic;
  }();
  return found;
}

#define SUPY_SELECT(function, ...)                                                      \
  do {                                                                                  \
    switch (::supy::instruction_set()) {                                                \
      case ::supy::InstructionSet::avx512: return ::supy::avx512::function(__VA_ARGS__); \
      case ::supy::InstructionSet::avx2: return ::supy::avx2::function(__VA_ARGS__);     \
      default: return ::supy::generic::function(__VA_ARGS__);                            \
    }                                                                                   \
  } while (0)

// bfloat16 as its bits: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

// float16 as its bits.
struct f16 {
  uint16_t bits;
};

enum class FloatType { f32, bf16 };

// What multiplies matrices of bfloat16: avx512_bf16 (pairs), amx_bf16 (tiles), or the units for float32 after a conversion.
enum class MatrixUnit { none, pairs, tiles };

// Asked once. SUPY_ISA=avx512 and what is below step down from both, bf16_pairs from tiles.
inline MatrixUnit matrix_unit() {
  static const MatrixUnit found = [] {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
    const char* wanted = std::getenv("SUPY_ISA");
    if (instruction_set() != InstructionSet::avx512 || (wanted && !std::strcmp(wanted, "avx512")))
      return MatrixUnit::none;
    unsigned eax, ebx, ecx, edx;
    const bool pairs = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
    const bool tiles = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1) && (edx >> 24 & 1);
    constexpr long request_permission = 0x1023, tile_data = 18;  // of arch_prctl: the kernel saves tiles on request only
    if (pairs && tiles && !(wanted && !std::strcmp(wanted, "bf16_pairs")) &&
        syscall(SYS_arch_prctl, request_permission, tile_data) == 0)
      return MatrixUnit::tiles;
    if (pairs) return MatrixUnit::pairs;
#endif
    return MatrixUnit::none;
  }();
  return found;
}

}  // namespace supy
