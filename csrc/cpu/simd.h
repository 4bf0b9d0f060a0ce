// Scalar functions written so that the compiler turns a loop over them into vector code, for every clone below.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// One source is compiled to three machine codes; one is chosen at load time. The name of the level matters: a clone for
// plain "avx2" may not use FMA; "arch=x86-64-v3" may. Outside x86-64 Linux with GCC, only the portable code is built.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(FASTLM_NO_CLONES)
#define FASTLM_HAS_CLONES
#define FASTLM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTLM_CLONES
#endif
#define FASTLM_INLINE static inline __attribute__((always_inline))

namespace fastlm::cpu {

struct bfloat16 {
  uint16_t bits;
};

FASTLM_INLINE float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

FASTLM_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

FASTLM_INLINE float load(const float* p) { return *p; }
FASTLM_INLINE float load(const bfloat16* p) { return bits_to_float(uint32_t(p->bits) << 16); }

FASTLM_INLINE void store(float* p, float v) { *p = v; }
// Round to nearest even; a NaN stays a (quiet) NaN.
FASTLM_INLINE void store(bfloat16* p, float v) {
  const uint32_t u = float_to_bits(v);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  p->bits = uint16_t(v != v ? 0x7FC0u : rounded);
}

// v rounded to the type T, as a later pass reads it back from memory.
FASTLM_INLINE float round_to(const float*, float v) { return v; }
FASTLM_INLINE float round_to(const bfloat16*, float v) {
  bfloat16 b;
  store(&b, v);
  return load(&b);
}

}  // namespace fastlm::cpu
