// Blocks of a cluster that use each other's shared memory. `fault` plants one fault, at the lines marked with its
// number; 0 is the correct kernel. Blocks of THREADS threads, with an element each.
#include <cstdint>

namespace {

constexpr int THREADS = 64, BYTES = 4 * THREADS;

__device__ uint32_t address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ uint32_t rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ uint32_t blocks() {
  uint32_t n;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
}
// Where `p` is in another block.
__device__ uint32_t map(const void* p, uint32_t rank) {
  uint32_t a;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(address(p)), "r"(rank));
  return a;
}
__device__ void arrive_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ void arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ void wait_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ void meet() {
  arrive_cluster();
  wait_cluster();
}
__device__ int load(uint32_t a) {
  int value;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(value) : "r"(a) : "memory");
  return value;
}
__device__ int load_own(uint32_t a) {
  int value;
  asm volatile("ld.shared::cta.s32 %0, [%1];" : "=r"(value) : "r"(a) : "memory");
  return value;
}
__device__ void store(uint32_t a, int value) {
  asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(a), "r"(value) : "memory");
}
__device__ void add(uint32_t a, int value) {
  asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;" ::"r"(a), "r"(value) : "memory");
}
__device__ void add_in_block(uint32_t a, int value) {
  asm volatile("red.relaxed.cta.shared::cluster.add.u32 [%0], %1;" ::"r"(a), "r"(value) : "memory");
}

__device__ void init(uint64_t* signal, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(signal)), "r"(count) : "memory");
}
__device__ void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ void arrive_expecting(uint64_t* signal, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(signal)), "r"(bytes) : "memory");
}
__device__ void arrive_there(uint32_t signal) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(signal) : "memory");
}
__device__ void wait(uint64_t* signal, int parity) {
  asm volatile(
      "{ .reg .pred p;\n"
      "W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra W; }" ::"r"(address(signal)),
      "r"(parity)
      : "memory");
}
__device__ void multicast(void* to, const int* from, uint64_t* signal, int targets) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(address(to)),
      "l"(from), "n"(BYTES), "r"(address(signal)), "h"(uint16_t(targets))
      : "memory");
}
__device__ void copy_there(uint32_t to, const void* from, uint32_t signal) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "r"(address(from)), "n"(BYTES), "r"(signal)
               : "memory");
}
__device__ void store_there(uint32_t to, int value, uint32_t signal) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(value),
               "r"(signal)
               : "memory");
}

}  // namespace

// y = the next block's x + 2 x + 1000 times how many odd x the previous block has, and 1 for each thread.
extern "C" __global__ void ring(const int* x, int* y, int fault) {
  __shared__ int votes, mine[THREADS];
  const uint32_t next = (rank() + 1) % blocks(), i = blockIdx.x * THREADS + threadIdx.x;
  if (fault != 3 || threadIdx.x != 5) mine[threadIdx.x] = x[i];
  if (threadIdx.x == 0) votes = 0;
  if (fault == 5) arrive_cluster();
  if (fault == 6) wait_cluster();  // fault 6
  if (fault == 12 && threadIdx.x < 32 && rank() == 1) asm volatile("bar.sync 1, 64;" ::: "memory");
  if (fault == 9 || fault == 13) {  // 13 is none: the PTX ISA's example of .relaxed
    if (fault == 13) asm volatile("fence.acq_rel.cluster;" ::: "memory");
    arrive_relaxed();
  } else if (fault != 1) {
    arrive_cluster();  // fault 5
  }
  if (fault != 1) wait_cluster();  // fault 12
  if (fault == 11 && (rank() == 0 || threadIdx.x >= 32)) return;
  const uint32_t there = map(&mine[threadIdx.x], next);
  const int value = fault == 7 ? load_own(there) : load(there + (fault == 8 ? BYTES : 0));  // fault 1 2 3 7 8 9 11
  if (fault == 2 || fault == 3 || fault == 11) {
    if (fault == 3) meet();
    y[i] = value;
    return;
  }
  if (fault == 10) {
    add_in_block(map(&votes, next), value & 1);  // fault 10
  } else {
    add(map(&votes, next), value & 1);
  }
  add(address(&votes), 1);
  const int sum = value + 2 * mine[threadIdx.x];  // fault 4
  if (fault == 4) store(there, 0);
  meet();
  y[i] = sum + 1000 * votes;
}

// y = x of the cluster's first block + the rank: one copy for all blocks.
extern "C" __global__ void spread(const int* x, int* y, int fault) {
  __shared__ alignas(128) int tile[THREADS];
  __shared__ uint64_t signal;
  if (threadIdx.x == 0 && !(fault == 22 && rank() == 1)) {
    init(&signal, 1);
    fence_init();
    arrive_expecting(&signal, BYTES + (fault == 21 && rank() == 1 ? 16 : 0));
  }
  if (fault == 23) {
    __syncthreads();
  } else {
    meet();
  }
  if (rank() == 0 && threadIdx.x == 0) {
    const int all = (1 << blocks()) - 1;
    multicast(tile, x + blockIdx.x * THREADS, &signal, fault == 24 ? all | 16 : all);  // fault 22 23 24 26
  }
  if (fault == 22 || fault == 25) meet();
  if (fault == 26 && rank() == 1) return;
  if (fault != 25) wait(&signal, 0);
  y[blockIdx.x * THREADS + threadIdx.x] = tile[threadIdx.x] + int(rank());  // fault 25
  meet();                                                                   // fault 21
}

// y = x + 3 x of the previous block: by a copy between shared memories, and by stores.
extern "C" __global__ void send(const int* x, int* y, int fault) {
  __shared__ alignas(128) int from[THREADS], to[THREADS], direct[THREADS];
  __shared__ uint64_t full, empty;
  const uint32_t next = (rank() + 1) % blocks(), previous = (rank() + blocks() - 1) % blocks();
  const uint32_t i = blockIdx.x * THREADS + threadIdx.x;
  if (threadIdx.x == 0) {
    init(&full, 1);
    init(&empty, THREADS);
    fence_init();
    arrive_expecting(&full, 2 * BYTES - (fault == 34 ? 4 : 0));
  }
  from[threadIdx.x] = x[i];
  if (fault != 31) fence_proxy();
  meet();
  if (threadIdx.x == 0) copy_there(map(to, next), from, map(&full, next));  // fault 31
  store_there(map(&direct[threadIdx.x], next), 3 * x[i], map(&full, next));
  if (fault == 32) from[threadIdx.x] = 0;  // fault 32
  if (fault == 35) meet();
  if (fault != 35) wait(&full, 0);               // fault 34
  y[i] = to[threadIdx.x] + direct[threadIdx.x];  // fault 35
  arrive_there(map(&empty, previous));           // its copy is here
  if (fault != 33) wait(&empty, 0);
  from[threadIdx.x] = 0;  // fault 33
  meet();
}

// As spread, by a tile of a tensor of THREADS columns: every block has the row of the cluster's number.
struct alignas(64) Map {
  char opaque[128];
};

extern "C" __global__ void spread_tile(const __grid_constant__ Map x, int* y) {
  __shared__ alignas(128) int tile[THREADS];
  __shared__ uint64_t signal;
  if (threadIdx.x == 0) {
    init(&signal, 1);
    fence_init();
    arrive_expecting(&signal, BYTES);
  }
  meet();
  if (rank() == 1 && threadIdx.x == 0) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(address(tile)),
        "l"(&x), "r"(0), "r"(int(blockIdx.x / blocks())), "r"(address(&signal)), "h"(uint16_t((1 << blocks()) - 1))
        : "memory");
  }
  wait(&signal, 0);
  y[blockIdx.x * THREADS + threadIdx.x] = tile[threadIdx.x];
  meet();
}
