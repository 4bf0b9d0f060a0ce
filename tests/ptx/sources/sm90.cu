// A pipeline of bulk copies: y = 2 x by tiles of 8 rows and 32 columns, two tiles ahead. FAULT plants one fault, at the
// line marked with its number; 0 is the correct kernel.
#include <cstdint>

#ifndef FAULT
#define FAULT 0
#endif

namespace {

constexpr int ROWS = 8, COLUMNS = 32, TILE = ROWS * COLUMNS, BYTES = 4 * TILE, STAGES = 2, CONSUMERS = 128;

struct alignas(64) Map {
  char opaque[128];
};

__device__ uint32_t address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ void init(uint64_t* signal, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(signal)), "r"(count) : "memory");
}
__device__ void arrive(uint64_t* signal) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(signal)) : "memory");
}
__device__ void arrive_expecting(uint64_t* signal, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(signal)), "r"(bytes) : "memory");
}
__device__ void wait(uint64_t* signal, int parity) {
  asm volatile(
      "{ .reg .pred p;\n"
      "W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra D;\n"
      "bra W;\n"
      "D: }" ::"r"(address(signal)),
      "r"(parity)
      : "memory");
}
__device__ void load(void* to, const Map& map, int column, int row, uint64_t* signal) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(address(signal))
      : "memory");
}
__device__ void store(const Map& map, int column, int row, const void* from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
               "r"(column), "r"(row), "r"(address(from))
               : "memory");
}
__device__ void fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ void meet() { asm volatile("bar.sync 1, 128;" ::: "memory"); }
__device__ bool elected() {
  uint32_t mine;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(mine));
  return mine;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(160)
    twice(const __grid_constant__ Map x, const __grid_constant__ Map y, int tiles) {
  __shared__ alignas(1024) float in[STAGES][TILE];
  __shared__ alignas(1024) float out[TILE];
  __shared__ uint64_t full[STAGES], empty[STAGES];
  const int column = blockIdx.x * COLUMNS;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
#if FAULT != 9
      init(&full[s], 1);
#endif
      init(&empty[s], CONSUMERS);
    }
#if FAULT != 2
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
#if FAULT != 10
  __syncthreads();
#endif
  if (threadIdx.x >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (!elected()) return;
    for (int t = 0; t < tiles; ++t) {
      const int s = t % STAGES;
#if FAULT != 5
      wait(&empty[s], (t / STAGES & 1) ^ 1);
#endif
      arrive_expecting(&full[s], BYTES + (FAULT == 3 ? 16 : 0));           // fault 5 9
      load(in[s] + (FAULT == 11 ? 4 : 0), x, column, t * ROWS, &full[s]);  // fault 2 11
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    for (int t = 0; t < tiles; ++t) {
      const int s = t % STAGES;
#if FAULT != 4
      wait(&full[s], (t / STAGES & 1) ^ (FAULT == 1));  // fault 3 8 10
#endif
      float values[2];
      for (int k = 0; k < 2; ++k) {
        const int e = threadIdx.x + CONSUMERS * k, row = e / COLUMNS;
        values[k] = 2 * in[s][e ^ (row & 7) << 2];  // fault 1 4
      }
      arrive(&empty[s]);
#if FAULT == 8
      arrive(&empty[s]);
#endif
      if (threadIdx.x == 0 && t) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      meet();
      for (int k = 0; k < 2; ++k) {
        const int e = threadIdx.x + CONSUMERS * k, row = e / COLUMNS;
        out[e ^ (row & 7) << 2] = values[k];  // fault 12
      }
#if FAULT != 6
      fence();
#endif
      meet();
      if (threadIdx.x == 0) {
        store(y, column, t * ROWS, out);  // fault 6 7
#if FAULT != 12
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
      }
    }
#if FAULT != 7
    if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
  }
}

// Copies without a tensor map; a wait by the state of its arrival.
extern "C" __global__ void copied(const float* x, float* y, int bytes) {
  __shared__ alignas(128) float tile[1024];
  __shared__ uint64_t signal;
  if (threadIdx.x == 0) {
    init(&signal, 1);
    fence();
    uint64_t state;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 %0, [%1], %2;"
                 : "=l"(state)
                 : "r"(address(&signal)), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(tile)),
        "l"(x), "r"(bytes), "r"(address(&signal))
        : "memory");
    asm volatile(
        "{ .reg .pred p;\n"
        "W: mbarrier.test_wait.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra W; }" ::"r"(address(&signal)),
        "l"(state)
        : "memory");
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(y), "r"(address(tile)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(address(&signal)) : "memory");
  }
}
