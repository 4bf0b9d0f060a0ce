// Philox4x32-10 (Salmon et al., SC 2011), shared by the CPU and CUDA kernels.
// The Python form, with the definition, is fastlm/philox.py.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTLM_HD __host__ __device__ __forceinline__
#else
#define FASTLM_HD inline __attribute__((always_inline))
#endif

namespace fastlm {

constexpr uint32_t kMaskDomain = 0x4B53414Du;
constexpr uint32_t kDropoutDomain = 0x504F5244u;

struct Words {
  uint32_t r0, r1, r2, r3;
};

struct Key {
  uint32_t k0, k1;
};

FASTLM_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, Key key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0;
    const uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ key.k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ key.k1;
    c3 = uint32_t(p0);
    key.k0 += 0x9E3779B9u;
    key.k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// key(seed, domain): the low half of the seed, and the high half XOR the domain.
FASTLM_HD Key make_key(uint64_t seed, uint32_t domain) { return {uint32_t(seed), uint32_t(seed >> 32) ^ domain}; }

// The key of one dropout call: a function of (seed, step) on the device and of the call site.
FASTLM_HD Key dropout_key(const int64_t* rng, uint32_t site) {
  const uint64_t step = uint64_t(rng[1]);
  const Words w = philox(uint32_t(step), uint32_t(step >> 32), site, 0u, make_key(uint64_t(rng[0]), kDropoutDomain));
  return {w.r0, w.r1};
}

}  // namespace fastlm
