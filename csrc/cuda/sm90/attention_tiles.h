// Shared by the kernels of attention for sm_90a: the shape of a block, and its tiles in shared memory.
//
// A block has three warpgroups. The first loads; each of the others computes 64 rows (queries or keys). A tile has 64
// columns after the other, in rows of 128 bytes.
#pragma once

#include "../attention_tile.cuh"
#include "hopper.h"

namespace fastlm::cuda::sm90 {

constexpr int kGroups = 2, kRows = 64;  // warpgroups that compute, and the rows of each
constexpr int kThreads = (1 + kGroups) * kWarpgroup, kTile = kGroups * kRows;
constexpr int kTurn = 1, kTogether = kTurn + kGroups;  // named barriers, one for each group

// Registers of a thread that loads, and of one that computes. A block starts with kRegisters for each, all of 65536
// that 384 threads can have in steps of 8; what it asks for in sum must not be more, or setmaxnreg waits for ever.
// tests/test_cuda_sm90.py holds ptxas to kRegisters.
constexpr int kFew = 24, kMany = 240, kRegisters = 65536 / kThreads / 8 * 8;
static_assert(kFew + kGroups * kMany <= (1 + kGroups) * kRegisters);

// Bytes of shared memory that a block can have.
constexpr int kMostBytes = 227 * 1024;

// One thread: the tile's rows from `row` on.
template <int D, int ROWS, class T>
__device__ __forceinline__ void load_tile(T* to, const CUtensorMap& map, int head, int row, int sequence,
                                          uint64_t* barrier) {
#pragma unroll
  for (int col = 0; col < D; col += 64) load_box(to + col * ROWS, map, col, head, row, sequence, barrier);
}

// One warp: sets rows for which stays(row) is false to 0.
template <int D, int ROWS, class T, class F>
__device__ __forceinline__ void clean_tile(T* tile, F stays) {
#pragma unroll 1
  for (int row = threadIdx.x % 32; row < ROWS; row += 32) {
    if (stays(row)) continue;
    uint4* const to = reinterpret_cast<uint4*>(tile + row * 64);  // the swizzle permutes within a row of 128 bytes
#pragma unroll 1
    for (int i = 0; i < D / 8; ++i) to[i / 8 * ROWS * 8 + i % 8] = uint4{};
  }
}

// One lane of the warp arrives for all, after what all have read and written.
__device__ __forceinline__ void release(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(barrier);
}

// A tile x (64, D), the left side of products. KEEP: its fragments are loaded once and stay in registers. Else each
// product reads x from shared memory, and with a y of 64 rows the two take all of its 128 bytes a cycle.
template <int D, class T, bool KEEP>
struct LeftTile {
  const T* tile;
  uint32_t kept[KEEP ? D / 16 : 1][4];

  __device__ __forceinline__ explicit LeftTile(const T* tile) : tile(tile) {
    if constexpr (KEEP) {
#pragma unroll
      for (int i = 0; i < D / 16; i += 4) {
        const int warp_row = 16 * (threadIdx.x % kWarpgroup / 32);
        const Left<T, 64, 1, true> part(tile + (i / 4 * kRows + warp_row) * 64);
#pragma unroll
        for (int j = 0; j < 16; ++j) kept[i + j / 4][j % 4] = part.kept[0][j / 4][j % 4];
      }
    }
  }

  // d (64, 8 NT) = x yᵀ of a tile y (8 NT, D). Starts the products. A descriptor counts 16 bytes.
  template <int NT>
  __device__ __forceinline__ void start_product(float (&d)[NT][4], const T* y) const {
    const uint64_t a = describe(tile), b = describe(y);
    products_begin();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const uint64_t columns = b + i / 4 * (8 * 8 * NT) + i % 4 * 2;
      if constexpr (KEEP) {
        multiply<T, false>(d, kept[i], columns, i > 0);
      } else {
        multiply<T, false>(d, a + i / 4 * (8 * kRows) + i % 4 * 2, columns, i > 0);
      }
    }
    products_commit();
  }
};

// d (64, D) += x y of a rounded fragment x (64, 16 KT) and a tile y (16 KT, D). Starts the products.
template <class T, int KT, int DT>
__device__ __forceinline__ void start_accumulate(float (&d)[DT][4], const uint32_t (&x)[KT][4], const T* y) {
  const uint64_t b = describe(y, 128 * 16 * KT);
  products_begin();
#pragma unroll
  for (int i = 0; i < KT; ++i) multiply<T, true>(d, x[i], b + i * 128);
  products_commit();
}

// A fragment, rounded to T.
template <class T, int NT>
__device__ __forceinline__ void round_to(uint32_t (&to)[NT / 2][4], const float (&x)[NT][4]) {
#pragma unroll
  for (int i = 0; i < NT / 2; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) to[i][r] = pack(T(), x[2 * i + r / 2][r % 2 * 2], x[2 * i + r / 2][r % 2 * 2 + 1]);
  }
}

// ---- what is launched

inline void check_arguments(const Attention& a, DType dtype) {
  if (dtype == DType::f32 || a.d % 8 || a.d > 128 || a.sk == 0)
    throw std::invalid_argument("attention for sm_90a: expected 16 bits, d of 8 to 128 and some keys, got d " +
                                std::to_string(a.d) + " and " + std::to_string(a.sk) + " keys");
}

// f(T, D, EXTRAS): only bfloat16, in which most models are trained, has kernels without dropout, bias and softcap.
template <class F>
void choose_kernel(const Attention& a, DType dtype, F f) {
  auto width = [&](auto type, auto extras) {
    if (a.d <= 64) return f(type, std::integral_constant<int, 64>(), extras);
    f(type, std::integral_constant<int, 128>(), extras);
  };
  if (dtype == DType::f16) return width(__half(), std::true_type());
  if (a.bias || a.dropout.threshold || a.softcap > 0.0f) return width(__nv_bfloat16(), std::true_type());
  width(__nv_bfloat16(), std::false_type());
}

}  // namespace fastlm::cuda::sm90
