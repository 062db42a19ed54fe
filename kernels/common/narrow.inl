// float32 from and to the storage type, rounding to nearest even; one copy for each instruction set (multitarget.h).
static inline float load(const float* p) { return *p; }
static inline void store(float* p, float value) { *p = value; }

static inline float load(const bf16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

static inline void store(bf16* p, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40;  // keeps a NaN a NaN where rounding would carry into infinity
  p->bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}
