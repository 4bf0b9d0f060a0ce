#pragma once

#include <cstdint>

namespace fastlm::cpu {

constexpr int64_t kGemmLanes = 16;

// Matrices in float: a (m, k), or stored transposed, (k, m); b (k, n); c (m, n); n is a multiple of kGemmLanes.
// ld: the stride between rows as stored. Each element of c is one sum in the order of k, whatever m and n are.
// For operands that fit the cache; runs on the calling thread.
enum class A { plain, transposed };
void gemm(A form, int64_t m, int64_t n, int64_t k, float scale, const float* a, int64_t lda, const float* b,
          int64_t ldb, float* c, int64_t ldc);  // c = scale a b
void gemm_add(A form, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
              float* c, int64_t ldc);  // c += a b

}  // namespace fastlm::cpu
