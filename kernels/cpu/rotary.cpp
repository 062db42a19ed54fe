#include "rotary.h"

#include "simd.h"

#define SUPY_KERNEL "rotary.inl"
#include "multitarget.h"

namespace supy {

void rotary_cpu(const RotaryParams& params) { SUPY_SELECT(rotary, params); }

}  // namespace supy
