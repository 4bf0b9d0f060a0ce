// Small known kernels in CUDA C++, for the tests of the interpreter.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cstdint>
#include <cstdio>
#include <type_traits>

// ---- reductions ------------------------------------------------------------------------------------------------

__device__ float warp_sum(float x) {
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  return x;
}
__device__ float warp_max(float x) {
  for (int offset = 16; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
  return x;
}

// Of the whole block; every thread gets the result. `scratch` holds a value per warp.
template <class F>
__device__ float block_reduce(float x, float identity, float* scratch, F warp_reduce) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = warp_reduce(x);
  __syncthreads();  // the last use of scratch is over
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_reduce(lane < blockDim.x / 32 ? scratch[lane] : identity);
}

// One row a block.
extern "C" __global__ void softmax(const __nv_bfloat16* x, __nv_bfloat16* y, int cols) {
  __shared__ float scratch[32];
  const __nv_bfloat16* row = x + size_t(blockIdx.x) * cols;
  float largest = -INFINITY;
  for (int c = threadIdx.x; c < cols; c += blockDim.x) largest = fmaxf(largest, __bfloat162float(row[c]));
  largest = block_reduce(largest, -INFINITY, scratch, warp_max);
  float sum = 0;
  for (int c = threadIdx.x; c < cols; c += blockDim.x) sum += __expf(__bfloat162float(row[c]) - largest);
  sum = block_reduce(sum, 0.f, scratch, warp_sum);
  for (int c = threadIdx.x; c < cols; c += blockDim.x) {
    y[size_t(blockIdx.x) * cols + c] = __float2bfloat16(__expf(__bfloat162float(row[c]) - largest) / sum);
  }
}

// One row a warp, eight bf16 a load; cols is a multiple of 8.
extern "C" __global__ void layer_norm(const __nv_bfloat16* x, const float* w, const float* b, __nv_bfloat16* y,
                                      int rows, int cols, float eps) {
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const uint4* in = reinterpret_cast<const uint4*>(x + size_t(row) * cols);
  uint4* out = reinterpret_cast<uint4*>(y + size_t(row) * cols);
  float sum = 0;
  for (int v = lane; v < cols / 8; v += 32) {
    uint4 packed = in[v];
    const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&packed);
    for (int k = 0; k < 4; ++k) {
      float2 f = __bfloat1622float2(pairs[k]);
      sum += f.x + f.y;
    }
  }
  float mean = warp_sum(sum) / cols, square = 0;
  for (int v = lane; v < cols / 8; v += 32) {
    uint4 packed = in[v];
    const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&packed);
    for (int k = 0; k < 4; ++k) {
      float2 f = __bfloat1622float2(pairs[k]);
      square += (f.x - mean) * (f.x - mean) + (f.y - mean) * (f.y - mean);
    }
  }
  float rstd = rsqrtf(warp_sum(square) / cols + eps);
  for (int v = lane; v < cols / 8; v += 32) {
    uint4 packed = in[v];
    __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&packed);
    for (int k = 0; k < 4; ++k) {
      float2 f = __bfloat1622float2(pairs[k]);
      int c = 8 * v + 2 * k;
      pairs[k] = __floats2bfloat162_rn((f.x - mean) * rstd * w[c] + b[c], (f.y - mean) * rstd * w[c + 1] + b[c + 1]);
    }
    out[v] = packed;
  }
}

extern "C" __global__ void row_sums(const int* x, int* sums, unsigned long long* total, int cols) {
  int c = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
  int value = c < cols ? x[size_t(row) * cols + c] : 0;
  int sum = __reduce_add_sync(0xffffffff, value);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&sums[row], sum);
    atomicAdd(total, static_cast<unsigned long long>(static_cast<long long>(sum)));
  }
}

// The last block to finish adds up what all of them stored.
extern "C" __global__ void last_block_sum(const int* x, int* partial, unsigned* arrived, int* out, int n) {
  __shared__ int sum;
  __shared__ bool last;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) atomicAdd(&sum, x[i]);
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    int result = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) result += partial[b];
    *out = result;
  }
}

// Eighths of a warp reduce with member masks of their own, then a loop of compare-and-swap takes the maximum.
extern "C" __global__ void largest(const float* x, float* out, int n) {
  __shared__ float s[128];
  int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
  unsigned members = 0xfu << (lane & 28);
  float value = i < n ? x[i] : -INFINITY;
  for (int offset = 2; offset; offset /= 2) value = fmaxf(value, __shfl_xor_sync(members, value, offset));
  s[threadIdx.x] = value;
  __syncwarp(members);
  if (s[threadIdx.x ^ 3] != value) return;  // the same in all four
  if (lane % 4) return;
  unsigned* cell = reinterpret_cast<unsigned*>(out);
  unsigned old = *cell, seen;
  do {
    seen = old;
    if (__uint_as_float(seen) >= value) break;
    old = atomicCAS(cell, seen, __float_as_uint(value));
  } while (old != seen);
}

// ---- integers --------------------------------------------------------------------------------------------------

// Philox4x32-10: counter (index, 0, 0, 0).
extern "C" __global__ void philox(uint4* out, uint64_t seed, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  uint32_t c0 = i, c1 = 0, c2 = 0, c3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    uint32_t h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    uint32_t h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  out[i] = make_uint4(c0, c1, c2, c3);
}

// Inclusive sum of a block's 256 elements.
extern "C" __global__ void scan(const int* x, int* y) {
  __shared__ int warps[8];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = blockIdx.x * 256 + threadIdx.x;
  int value = x[i];
  for (int offset = 1; offset < 32; offset *= 2) {
    int other = __shfl_up_sync(0xffffffff, value, offset);
    if (lane >= offset) value += other;
  }
  if (lane == 31) warps[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += warps[w];
  y[i] = value;
}

// Bitonic sort of 512 floats a block of 256 threads.
extern "C" __global__ void sort(const float* x, float* y) {
  __shared__ float s[512];
  for (int k = 0; k < 2; ++k) s[threadIdx.x + 256 * k] = x[blockIdx.x * 512 + threadIdx.x + 256 * k];
  for (int size = 2; size <= 512; size *= 2) {
    for (int step = size / 2; step; step /= 2) {
      __syncthreads();
      int low = 2 * threadIdx.x - (threadIdx.x & (step - 1)), high = low + step;
      bool up = (low & size) == 0;
      if ((s[low] > s[high]) == up) {
        float t = s[low];
        s[low] = s[high];
        s[high] = t;
      }
    }
  }
  __syncthreads();
  for (int k = 0; k < 2; ++k) y[blockIdx.x * 512 + threadIdx.x + 256 * k] = s[threadIdx.x + 256 * k];
}

// ---- matrices --------------------------------------------------------------------------------------------------

__device__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// C = A B, one warp a 16x8 tile of C; A (M, K) and B (K, N) of 16 bits, K a multiple of 16. cp.async and ldmatrix.
template <class T>
__device__ void matmul16(const T* a, const T* b, float* c, int n, int k) {
  __shared__ __align__(16) T as[2][16][16];
  __shared__ __align__(16) T bs[2][16][8];
  int lane = threadIdx.x, row = blockIdx.y * 16, col = blockIdx.x * 8;
  auto fetch = [&](int stage, int at) {
    __pipeline_memcpy_async(&as[stage][lane / 2][lane % 2 * 8], &a[size_t(row + lane / 2) * k + at + lane % 2 * 8], 16);
    if (lane < 16) __pipeline_memcpy_async(&bs[stage][lane][0], &b[size_t(at + lane) * n + col], 16);
    __pipeline_commit();
  };
  float d[4] = {};
  fetch(0, 0);
  for (int at = 0, stage = 0; at < k; at += 16, stage ^= 1) {
    if (at + 16 < k)
      fetch(stage ^ 1, at + 16);
    else
      __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncwarp();
    uint32_t fa[4], fb[2];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
                 : "r"(shared_address(&as[stage][lane % 16][lane / 16 * 8]))
                 : "memory");
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(fb[0]), "=r"(fb[1])
                 : "r"(shared_address(&bs[stage][lane % 16][0]))
                 : "memory");
    if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
    } else {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
    }
    __syncwarp();
  }
  int g = lane / 4, t = lane % 4;
  float* out = c + size_t(row + g) * n + col + 2 * t;
  *reinterpret_cast<float2*>(out) = make_float2(d[0], d[1]);
  *reinterpret_cast<float2*>(out + 8 * size_t(n)) = make_float2(d[2], d[3]);
}
extern "C" __global__ void matmul_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int n, int k) {
  matmul16(a, b, c, n, k);
}
extern "C" __global__ void matmul_f16(const __half* a, const __half* b, float* c, int n, int k) {
  matmul16(a, b, c, n, k);
}

// tf32, one warp a 16x8 tile, straight from global memory; K a multiple of 8.
extern "C" __global__ void matmul_tf32(const float* a, const float* b, float* c, int n, int k) {
  int lane = threadIdx.x, g = lane / 4, t = lane % 4, row = blockIdx.y * 16, col = blockIdx.x * 8;
  auto tf32 = [](float x) {
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
  };
  float d[4] = {};
  for (int at = 0; at < k; at += 8) {
    uint32_t fa[4], fb[2];
    for (int r = 0; r < 4; ++r) fa[r] = tf32(a[size_t(row + g + 8 * (r & 1)) * k + at + t + 4 * (r >> 1)]);
    for (int r = 0; r < 2; ++r) fb[r] = tf32(b[size_t(at + t + 4 * r) * n + col + g]);
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  }
  float* out = c + size_t(row + g) * n + col + 2 * t;
  *reinterpret_cast<float2*>(out) = make_float2(d[0], d[1]);
  *reinterpret_cast<float2*>(out + 8 * size_t(n)) = make_float2(d[2], d[3]);
}

// int8, B given transposed (N, K); K a multiple of 32.
extern "C" __global__ void matmul_int8(const int8_t* a, const int8_t* bt, int* c, int n, int k) {
  int lane = threadIdx.x, g = lane / 4, t = lane % 4, row = blockIdx.y * 16, col = blockIdx.x * 8;
  int d[4] = {};
  for (int at = 0; at < k; at += 32) {
    uint32_t fa[4], fb[2];
    for (int r = 0; r < 4; ++r) {
      fa[r] = *reinterpret_cast<const uint32_t*>(a + size_t(row + g + 8 * (r & 1)) * k + at + 4 * t + 16 * (r >> 1));
    }
    for (int r = 0; r < 2; ++r)
      fb[r] = *reinterpret_cast<const uint32_t*>(bt + size_t(col + g) * k + at + 4 * t + 16 * r);
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  }
  int* out = c + size_t(row + g) * n + col + 2 * t;
  out[0] = d[0], out[1] = d[1], out[8 * size_t(n)] = d[2], out[8 * size_t(n) + 1] = d[3];
}

// ---- what the compiler leaves: calls, local memory, switches, printf -------------------------------------------

__device__ __noinline__ int collatz(int n, int* steps) {
  while (n != 1 && *steps < 1000) n = n % 2 ? 3 * n + 1 : n / 2, ++*steps;
  return n;
}
__device__ __noinline__ double horner(const double* c, int n, double x) {
  double y = 0;
  for (int k = n - 1; k >= 0; --k) y = y * x + c[k];
  return y;
}
__constant__ double coefficients[5] = {1.0, -0.5, 0.25, 3.0, 1e-3};

extern "C" __global__ void leftovers(int* steps, double* values, int* switched, float* sines, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  steps[i] = 0;
  int count = 0;
  if (collatz(i + 1, &count) == 1) steps[i] = count;
  values[i] = horner(coefficients, 5, i * 0.125);
  switch (i % 7) {
    case 0:
      switched[i] = i * 3;
      break;
    case 1:
      switched[i] = i / 3;
      break;
    case 2:
      switched[i] = i ^ 0x55;
      break;
    case 3:
      switched[i] = __popc(i);
      break;
    case 4:
      switched[i] = __clz(i);
      break;
    default:
      switched[i] = -i;
  }
  sines[i] = sinf(i * 1e4f);  // large arguments: Payne and Hanek's reduction, in local memory
  if (i == 3) printf("thread %d of %u: %s %.3f %lld%%\n", i, blockDim.x, "hello", values[i], 1ll << 40);
}
