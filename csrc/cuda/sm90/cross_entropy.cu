// cross_entropy of long rows on sm_90: a row lies in the shared memory of a cluster. fastlm/ops/cross_entropy.py has
// the maths.
//
// A cluster of 8 blocks processes a row, each a part of its columns. A block copies its part to shared memory,
// asynchronously and 16 bytes at a time, and computes Σ exp with a running maximum as chunks arrive. The blocks then
// read each other's maximum and sums, in the order of their ranks, and write the gradient of their parts. So a row of
// up to 8 x 224 KB is read from memory once. csrc/cuda/cross_entropy.cu reads what exceeds a multiprocessor's shared
// memory twice; its rows of all multiprocessors, and those of the Triton kernel, exceed the second-level cache from
// about 380 KB a row on. With at most 112 KB a block, two blocks share a multiprocessor: one loads while the other
// computes.
//
// Threads select columns by their number, so the bits do not depend on strides or addresses. A part lies in shared
// memory at the same distance from a 16-byte boundary as in global memory. The gradient goes to global memory from
// registers, a warp's 256 contiguous bytes at a time.
#include <cuda_pipeline.h>

#include <cfloat>
#include <type_traits>

#include "cross_entropy.h"
#include "cuda/cross_entropy_rows.cuh"
#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace fastlm::cuda {

namespace sm90 {

constexpr int kBlocks = 8;  // of a cluster: the most that every sm_90 takes
constexpr int kThreads = 512;
constexpr int kUnits = 4;  // 8-byte units of a row that a thread takes from a chunk
constexpr int kAhead = 4;  // chunks under way: 64 KB of a block
constexpr int kPart = 64;  // a part's columns are a multiple of this
constexpr int kPad = 32;   // bytes for the distance from a boundary, at both ends

template <class T>
constexpr int kUnit = 8 / int(sizeof(T));  // columns of a unit
template <class T>
constexpr int kChunk = kUnits * kThreads * kUnit<T>;  // columns: 16 KB

// ---- the cluster

__device__ __forceinline__ void arrive_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// `from` in the shared memory of the block of this rank.
__device__ __forceinline__ float4 load_from(const float4* from, int rank) {
  const uint32_t own = uint32_t(__cvta_generic_to_shared(from));
  float4 x;
  asm volatile(
      "{ .reg .b32 a;\n"
      "mapa.shared::cluster.u32 a, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [a]; }"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "r"(own), "r"(rank)
      : "memory");
  return x;
}

// ---- the columns of a part

// n columns from p on: `head` before a 16-byte boundary, then `packs` of 16 bytes, then the rest.
template <class T>
struct Span {
  int head, packs, n;

  __device__ __forceinline__ Span(const T* p, int n) : n(n) {
    constexpr int V = kVector<T>;
    head = min(n, (V - int(reinterpret_cast<uintptr_t>(p) / sizeof(T) % V)) % V);
    packs = (n - head) / V;
  }
  // The column before or after the packs that this thread copies; -1: none.
  __device__ __forceinline__ int edge() const {
    const int body = packs * kVector<T>, lane = threadIdx.x;
    return lane >= n - body ? -1 : lane < head ? lane : lane + body;
  }
};

// Starts the copies of the packs of a chunk. Those that lie across its end come with it, and across its beginning with
// the one before.
template <class T>
__device__ __forceinline__ void fetch(T* to, const T* from, const Span<T>& span, int chunk) {
  constexpr int V = kVector<T>, kPacks = kChunk<T> / V;
#pragma unroll
  for (int k = threadIdx.x; k < kPacks; k += kThreads) {
    const int pack = chunk * kPacks + k, at = span.head + pack * V;
    if (pack < span.packs) __pipeline_memcpy_async(to + at, from + at, 16);
  }
}

template <class T>
__device__ __forceinline__ void put_zeros(T* to, int n) {
  const Span<T> span(to, n);
  for (int k = threadIdx.x; k < span.packs; k += kThreads) {
    *reinterpret_cast<uint4*>(to + span.head + k * kVector<T>) = uint4{0, 0, 0, 0};
  }
  const int edge = span.edge();
  if (edge >= 0) to[edge] = from_float<T>(0.0f);
}

// Calls of(column, columns left, unit) for this thread's units of a chunk.
template <class T, class F>
__device__ __forceinline__ void each_unit(int begin, int cols, F of) {
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int col = begin + (u * kThreads + int(threadIdx.x)) * kUnit<T>;
    of(col, cols - col, u);
  }
}

// ON: 8 or 4, the bytes to which the units of a complete chunk are aligned; 0: of any other.
template <int ON, class T>
__device__ __forceinline__ void load_unit(const T* at, int left, float (&x)[kUnit<T>]) {
  if constexpr (ON == 8) {
    load(at, x);
  } else if constexpr (ON == 4) {
    constexpr int H = kUnit<T> / 2;
    float low[H], high[H];
    load(at, low), load(at + H, high);
#pragma unroll
    for (int j = 0; j < H; ++j) x[j] = low[j], x[H + j] = high[j];
  } else {
#pragma unroll
    for (int j = 0; j < kUnit<T>; ++j) x[j] = j < left ? to_float(at[j]) : -INFINITY;
  }
}

template <int ON, class T>
__device__ __forceinline__ void store_unit(T* at, int left, const float (&x)[kUnit<T>]) {
  if constexpr (ON == 8) {
    store(at, x);
  } else if constexpr (ON == 4) {
    constexpr int H = kUnit<T> / 2;
    float low[H], high[H];
#pragma unroll
    for (int j = 0; j < H; ++j) low[j] = x[j], high[j] = x[H + j];
    store(at, low), store(at + H, high);
  } else {
#pragma unroll
    for (int j = 0; j < kUnit<T>; ++j) {
      if (j < left) at[j] = from_float<T>(x[j]);
    }
  }
}

template <int ON>
using On = std::integral_constant<int, ON>;

// The bytes to which an address is aligned: 8, 4 or 0.
__device__ __forceinline__ int alignment(const void* p) {
  const int past = int(reinterpret_cast<uintptr_t>(p) % 8);
  return past == 0 ? 8 : past == 4 ? 4 : 0;
}

// Calls of(On<8>), of(On<4>) or of(On<0>), so that a chunk has one branch.
template <class F>
__device__ __forceinline__ void by(int on, F of) {
  if (on == 8) {
    of(On<8>{});
  } else if (on == 4) {
    of(On<4>{});
  } else {
    of(On<0>{});
  }
}

// Of loads and of stores, if both are aligned; logits of a wider tensor may be, where their gradient is not. Pairs that
// no tensors of usual strides have go without.
template <class F>
__device__ __forceinline__ void by(int from, int to, F of) {
  if (from == 8) {
    by(to, [&](auto to) { of(On<8>{}, to); });
  } else if (from == 4 && to) {
    of(On<4>{}, On<4>{});
  } else {
    of(On<0>{}, On<0>{});
  }
}

// ---- rows

// All but kAll fit 64 registers.
template <class T, int MODE>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, MODE == kAll ? 1 : 2)
    cross_entropy_kernel(const CrossEntropyForward a, int part) {
  constexpr int U = kUnit<T>, S = kChunk<T>;
  const bool smooths = MODE == kSmooths || (MODE == kAll && a.label_smoothing > 0.0f);
  const bool caps = MODE == kAll && a.softcap > 0.0f, judges = MODE == kAll && a.accuracy;
  extern __shared__ uint4 memory[];
  __shared__ float buffer[4][32];
  __shared__ float4 mine;  // maximum, Σ exp, distance, beaten
  const int64_t row = blockIdx.x / kBlocks, t = a.target[row];
  const int rank = int(blockIdx.x % kBlocks);
  const int64_t first = int64_t(rank) * part;
  const int cols = int(max(int64_t(0), min(a.cols - first, int64_t(part))));
  const T* row_x = static_cast<const T*>(a.x) + row * a.stride_x;
  const T* x = row_x + first;
  T* dx = a.dx ? static_cast<T*>(a.dx) + row * a.stride_dx + first : nullptr;
  if (t == a.ignore_index) {
    if (rank == 0 && threadIdx.x == 0) {
      a.loss[row] = 0.0f;
      if (judges) a.z[row] = a.accuracy[row] = 0.0f;
    }
    if (dx) put_zeros<T>(dx, cols);
    return;
  }

  const Span<T> span(x, cols);
  T* in = reinterpret_cast<T*>(memory) + int(reinterpret_cast<uintptr_t>(x) / sizeof(T) % kVector<T>);
  const int chunks = (cols + S - 1) / S, edge = span.edge();
#pragma unroll
  for (int c = 0; c < kAhead; ++c) {
    fetch(in, x, span, c);
    __pipeline_commit();
  }
  if (edge >= 0) in[edge] = x[edge];
  const bool is_class = t >= 0 && t < a.cols;
  const float raw_t = is_class ? to_float(row_x[t]) : NAN;
  const float x_t = caps ? capped<T>(raw_t, a.softcap) : raw_t;
  const float w_t = a.weight && is_class ? a.weight[t] : 1.0f;
  auto weight = [&](int col) { return a.weight ? a.weight[first + col] : 1.0f; };
  const int from = alignment(in);

  // Σ exp(x - top), and Σ w (reference - x), the part of smoothing's Σ w (lse - x). Each column of a unit has its sum.
  // top is finite even if all of the part is -inf. beaten: a logit is greater than the target's, or equal and before
  // it.
  const float reference = fabsf(x_t) < INFINITY ? x_t : 0.0f;
  float top = -FLT_MAX, sums[U] = {}, distances[U] = {};
  bool beaten = false;
  for (int c = 0; c < chunks; ++c) {
    __pipeline_wait_prior(kAhead - 1);
    __syncthreads();
    float v[kUnits][U], higher = top;
    by((c + 1) * S <= cols ? from : 0, [&](auto on) {
      each_unit<T>(c * S, cols, [&](int col, int left, int u) {
        load_unit<on>(in + col, left, v[u]);
        if constexpr (MODE != kPlain) {
#pragma unroll
          for (int j = 0; j < U; ++j) {
            if (j >= left) continue;
            if (judges) beaten |= first + col + j < t ? !(v[u][j] < raw_t) : !(v[u][j] <= raw_t);
            if (caps) v[u][j] = capped<T>(v[u][j], a.softcap);
            if (smooths) distances[j] += weight(col + j) * (reference - v[u][j]);
          }
        }
#pragma unroll
        for (int j = 0; j < U; ++j) higher = fmaxf(higher, v[u][j]);
      });
    });
    const float less = exp_of(top - higher);
    top = higher;
#pragma unroll
    for (int j = 0; j < U; ++j) {
      sums[j] *= less;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) sums[j] += exp_of(v[u][j] - top);
    }
    fetch(in, x, span, c + kAhead);
    __pipeline_commit();
  }
  float sum = 0.0f, distance = 0.0f;
#pragma unroll
  for (int j = 0; j < U; ++j) {
    sum += sums[j];
    distance += distances[j];
  }
  const float top_of_part = row_max<kThreads>(top, buffer[0]);
  const float sum_of_part = row_sum<kThreads>(sum * exp_of(top - top_of_part), buffer[1]);
  if (smooths) distance = row_sum<kThreads>(distance, buffer[2]);
  if (judges) beaten = row_max<kThreads>(beaten ? 1.0f : 0.0f, buffer[3]) > 0.0f;
  if (threadIdx.x == 0) mine = {top_of_part, sum_of_part, distance, beaten ? 1.0f : 0.0f};
  arrive_cluster();
  wait_cluster();
  // Every warp reads what the blocks have, a lane each; a sum over kBlocks lanes has the same order in every lane.
  const float4 parts = load_from(&mine, int(threadIdx.x % kBlocks));
  arrive_cluster();  // no block exits before the others have read its sums
  float maximum = parts.x, beaten_by = parts.w;
#pragma unroll
  for (int offset = kBlocks / 2; offset > 0; offset /= 2) {
    maximum = fmaxf(maximum, __shfl_xor_sync(0xFFFFFFFFu, maximum, offset));
    if (judges) beaten_by = fmaxf(beaten_by, __shfl_xor_sync(0xFFFFFFFFu, beaten_by, offset));
  }
  float total = parts.y * exp_of(parts.x - maximum);
  distance = parts.z;
#pragma unroll
  for (int offset = kBlocks / 2; offset > 0; offset /= 2) {
    total += __shfl_xor_sync(0xFFFFFFFFu, total, offset);
    if (smooths) distance += __shfl_xor_sync(0xFFFFFFFFu, distance, offset);
  }

  const float w_sum = a.weight ? *a.weight_sum : float(a.cols);
  const float log_total = logf(total), lse = maximum + log_total, each = a.label_smoothing / float(a.cols);
  if (rank == 0 && threadIdx.x == 0) {
    float loss = w_t * (1.0f - a.label_smoothing) * ((maximum - x_t) + log_total);
    if (smooths) loss += each * (distance + w_sum * ((maximum - reference) + log_total));
    if (a.z_loss != 0.0f) loss += a.z_loss * lse * lse;
    a.loss[row] = is_class ? loss : NAN;
    if (judges) {
      a.z[row] = is_class ? a.z_loss * lse * lse : NAN;
      a.accuracy[row] = is_class ? float(beaten_by == 0.0f) : NAN;
    }
  }
  if (dx) {
    float denominator = 1.0f;
    if (a.parts) {
      denominator = 0.0f;
#pragma unroll
      for (int k = 0; k < kLossParts; k += 32) denominator += a.parts[k + threadIdx.x % 32];
      denominator = row_sum<32>(denominator, nullptr);
    }
    const float scale = (is_class ? a.dloss ? a.dloss[row] : 1.0f : NAN) / denominator;
    const float one_hot = w_t * (1.0f - a.label_smoothing) * scale, uniform = each * scale;
    const float factor = (one_hot + uniform * w_sum + 2.0f * scale * a.z_loss * lse) / total;
    const int to = alignment(dx);
    const int t_col = is_class && t >= first && t < first + cols ? int(t - first) : -1;
    for (int c = chunks - 1; c >= 0; --c) {
      by((c + 1) * S <= cols ? from : 0, to, [&](auto from, auto to) {
        each_unit<T>(c * S, cols, [&](int col, int left, int) {
          float g[U];
          load_unit<from>(in + col, left, g);
#pragma unroll
          for (int j = 0; j < U; ++j) {
            const float slope = caps ? cap_slope(g[j], a.softcap) : 1.0f;
            if (caps) g[j] = capped<T>(g[j], a.softcap);
            g[j] = exp_of(g[j] - maximum) * factor;
            if (smooths && j < left) g[j] -= uniform * weight(col + j);
            if (caps) g[j] *= slope;
          }
          store_unit<to>(dx + col, left, g);
        });
      });
    }
    if (t_col >= 0 && t_col / U % kThreads == int(threadIdx.x)) {  // this thread wrote that column, without one_hot
      float g = exp_of(x_t - maximum) * factor - one_hot;
      if (smooths) g -= uniform * w_t;
      dx[t_col] = from_float<T>(caps ? g * cap_slope(raw_t, a.softcap) : g);
    }
  }
  wait_cluster();
}

namespace {

template <class T>
void forward(const CrossEntropyForward& a, Place place) {
  const int64_t part = ((a.cols + kBlocks - 1) / kBlocks + kPart - 1) / kPart * kPart;
  const int64_t bytes = part * int64_t(sizeof(T));
  if (a.cols * int64_t(sizeof(T)) > kClusterRowBytes)
    throw std::invalid_argument("logits: expected rows of at most " + std::to_string(kClusterRowBytes) +
                                " bytes, which a cluster holds, got rows of " +
                                std::to_string(a.cols * int64_t(sizeof(T))) + "; use backend=\"triton\"");
  const auto kernel = a.softcap > 0.0f || a.accuracy ? cross_entropy_kernel<T, kAll>
                      : a.label_smoothing > 0.0f     ? cross_entropy_kernel<T, kSmooths>
                                                     : cross_entropy_kernel<T, kPlain>;
  launch(kernel, grid_size(a.rows * kBlocks), kThreads, size_t(bytes + kPad), place.stream, a, int(part));
}

}  // namespace

}  // namespace sm90

void cross_entropy_fwd_sm90(const CrossEntropyForward& args, DType dtype, Place place) {
  if (args.rows == 0) return;
  const OnDevice here(place.device);
  if (dtype == DType::f32) return sm90::forward<float>(args, place);
  dtype == DType::bf16 ? sm90::forward<__nv_bfloat16>(args, place) : sm90::forward<__half>(args, place);
}

}  // namespace fastlm::cuda
