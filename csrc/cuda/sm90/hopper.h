// What sm_90a has beyond sm_80, as functions: mbarriers, TMA loads, wgmma, named barriers, registers of a warpgroup.
// A function issues one instruction, unless its comment says more. PTX ISA: "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate Instructions", "mbarrier", "cp.async.bulk.tensor".
#pragma once

#include <cuda.h>

#include "../mma.cuh"

namespace fastlm::cuda::sm90 {

constexpr int kWarpgroup = 128;  // threads

// ---- mbarriers. A phase is complete after `arrivals` arrivals and the bytes that were announced. The first has parity
// 0; waiting for parity 1 of a new one returns at once.

__device__ __forceinline__ void init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// After the inits, before a barrier of the block: TMA sees them.
__device__ __forceinline__ void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces bytes that load_box will bring.
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is complete.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- TMA

__device__ __forceinline__ void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box of a tensor of four dimensions whose first element has these coordinates, the contiguous dimension first.
// What is outside of the tensor is 0. `to` is a multiple of 1024 bytes under the swizzle of 128.
__device__ __forceinline__ void load_box(void* to, const CUtensorMap& map, int x, int y, int z, int w,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(to)),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(barrier))
      : "memory");
}

// What this thread wrote to shared memory is visible to TMA and wgmma.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- named barriers, 1 to 15, and registers

// Waits until `threads` threads have met or passed.
__device__ __forceinline__ void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void pass(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Registers of each thread of the warpgroup from here on: a multiple of 8.
template <int N>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- wgmma
//
// A tile in shared memory has rows of 128 bytes under the swizzle of 128, as TMA writes them: 64 columns of 16 bits.
// Eight rows are 1024 bytes, which the tile's address is a multiple of.

// The descriptor of a tile. chunk: bytes from 64 columns to the next 64, for a tile that is taken across its rows.
__device__ __forceinline__ uint64_t describe(const void* tile, int chunk = 16) {
  return uint64_t(shared_address(tile) >> 4) | uint64_t(chunk >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

// Accumulators and A's registers written so far go into the products that follow.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N groups of products are under way.
template <int N>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving uses of accumulators over a wait, which does not name them.
template <int NT>
__device__ __forceinline__ void settle(float (&d)[NT][4]) {
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[n][e])::"memory");
  }
}

#define FASTLM_4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FASTLM_16(d, n) FASTLM_4(d, n), FASTLM_4(d, n + 1), FASTLM_4(d, n + 2), FASTLM_4(d, n + 3)
#define FASTLM_32(d, n) FASTLM_16(d, n), FASTLM_16(d, n + 4)
#define FASTLM_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTLM_NAMES_32 \
  FASTLM_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTLM_NAMES_64                                                                                              \
  FASTLM_NAMES_32                                                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// rest: A, B, whether to add, and whether A (in shared memory) and B are taken across.
#define FASTLM_WGMMA(columns, type, names, a, b, add, across)                                                        \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type \
  " {" names "}, " a ", " b ", p, 1, 1, " across "; }"

// d (64, 8 NT) = a b or d + a b, sixteen deep. a (64, 16): descriptor of rows. b: descriptor of a tile whose rows are
// the columns of d or, ACROSS, the sixteen.
template <class T, bool ACROSS, int NT>
__device__ __forceinline__ void multiply(float (&d)[NT][4], uint64_t a, uint64_t b, bool add) {
  static_assert(NT == 8 || NT == 16);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  const int keep = add;
  if constexpr (NT == 8 && kBf16) {
    asm volatile(FASTLM_WGMMA("64", "bf16", FASTLM_NAMES_32, "%32", "%33", "%34", "0, %35")
                 : FASTLM_32(d, 0)
                 : "l"(a), "l"(b), "r"(keep), "n"(ACROSS));
  } else if constexpr (NT == 8) {
    asm volatile(FASTLM_WGMMA("64", "f16", FASTLM_NAMES_32, "%32", "%33", "%34", "0, %35")
                 : FASTLM_32(d, 0)
                 : "l"(a), "l"(b), "r"(keep), "n"(ACROSS));
  } else if constexpr (kBf16) {
    asm volatile(FASTLM_WGMMA("128", "bf16", FASTLM_NAMES_64, "%64", "%65", "%66", "0, %67")
                 : FASTLM_32(d, 0), FASTLM_32(d, 8)
                 : "l"(a), "l"(b), "r"(keep), "n"(ACROSS));
  } else {
    asm volatile(FASTLM_WGMMA("128", "f16", FASTLM_NAMES_64, "%64", "%65", "%66", "0, %67")
                 : FASTLM_32(d, 0), FASTLM_32(d, 8)
                 : "l"(a), "l"(b), "r"(keep), "n"(ACROSS));
  }
}

// The same with a in registers, in mma.sync's fragment.
template <class T, bool ACROSS, int NT>
__device__ __forceinline__ void multiply(float (&d)[NT][4], const uint32_t (&a)[4], uint64_t b, bool add = true) {
  static_assert(NT == 8 || NT == 16);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  const int keep = add;
  if constexpr (NT == 8 && kBf16) {
    asm volatile(FASTLM_WGMMA("64", "bf16", FASTLM_NAMES_32, "{%32, %33, %34, %35}", "%36", "%37", "%38")
                 : FASTLM_32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(ACROSS));
  } else if constexpr (NT == 8) {
    asm volatile(FASTLM_WGMMA("64", "f16", FASTLM_NAMES_32, "{%32, %33, %34, %35}", "%36", "%37", "%38")
                 : FASTLM_32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(ACROSS));
  } else if constexpr (kBf16) {
    asm volatile(FASTLM_WGMMA("128", "bf16", FASTLM_NAMES_64, "{%64, %65, %66, %67}", "%68", "%69", "%70")
                 : FASTLM_32(d, 0), FASTLM_32(d, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(ACROSS));
  } else {
    asm volatile(FASTLM_WGMMA("128", "f16", FASTLM_NAMES_64, "{%64, %65, %66, %67}", "%68", "%69", "%70")
                 : FASTLM_32(d, 0), FASTLM_32(d, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(ACROSS));
  }
}

#undef FASTLM_4
#undef FASTLM_16
#undef FASTLM_32
#undef FASTLM_NAMES_16
#undef FASTLM_NAMES_32
#undef FASTLM_NAMES_64
#undef FASTLM_WGMMA

}  // namespace fastlm::cuda::sm90
