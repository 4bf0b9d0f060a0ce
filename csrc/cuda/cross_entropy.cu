// cross_entropy: the loss of a row and its gradient in one kernel. The maths: fastlm/ops/cross_entropy.py.
//
// A block of threads processes a row. It copies the row to shared memory in kSlots chunks, asynchronously and 16 bytes
// at a time, so the row needs no registers while it is loaded. Σ exp is computed with a running maximum as chunks
// arrive. The gradient then overwrites the row in shared memory and is written out 16 bytes at a time. A row of up to
// kSlots chunks, 192 KB on sm_90, is read once and written once: two rows of 50257 classes in bfloat16 fit a
// multiprocessor, and one loads while the other computes. With the row in registers, 1024 threads of 64 registers would
// leave no room for a second block. The gradient goes backward through a longer row: the last chunks are still in
// shared memory, the others are read again, from the second-level cache.
//
// Rows of an odd vocabulary start at any address, but 16-byte accesses need aligned ones. So a row is placed in shared
// memory at the same distance from a 16-byte boundary as in global memory. Threads select columns by their number: the
// sums, and so the bits, do not depend on strides. Only edges of less than 16 bytes, at both ends of a chunk, are
// copied element by element.
#include <cuda_pipeline.h>

#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "cross_entropy.h"
#include "cross_entropy_rows.cuh"
#include "launch.h"
#include "rows.cuh"

namespace fastlm::cuda {

constexpr int kSlots = 4;  // chunks of a row in shared memory at once
constexpr int kUnits = 8;  // 4-byte units of a row that a thread takes at a time

template <class T>
constexpr int kUnit = 4 / int(sizeof(T));  // columns of a unit
template <class T, int THREADS>
constexpr int kBatch = kUnits * THREADS * kUnit<T>;  // columns that a block takes at a time

// ---- 16-byte accesses to a part of a row that starts anywhere

// Elements from the 16-byte boundary at or before p to p.
template <class T>
__device__ __forceinline__ int past(const T* p) {
  return int(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kVector<T>);
}

// n elements from p on: `head` elements before a 16-byte boundary, then `packs` of 16 bytes, then the rest.
template <class T>
struct Split {
  int head;
  int64_t packs, n;

  __device__ __forceinline__ Split(const T* p, int64_t n) : n(n) {
    head = (kVector<T> - past(p)) % kVector<T>;
    if (head > n) head = int(n);
    packs = (n - head) / kVector<T>;
  }
  // The element of head and rest that thread `lane` of 2·kVector copies; -1: none.
  __device__ __forceinline__ int64_t edge(int lane) const {
    const int64_t body = packs * kVector<T>;
    return lane >= n - body ? -1 : lane < head ? lane : lane + body;
  }
};

// Starts to copy n elements. `to` and `from` are at the same distance from a 16-byte boundary. The warp of the given
// number copies the edges, so that the edges of several chunks wait for memory at the same time.
template <class T, int THREADS>
__device__ __forceinline__ void fetch(T* to, const T* from, int n, int warp) {
  const Split<T> split(from, n);
#pragma unroll 4
  for (int k = threadIdx.x; k < int(split.packs); k += THREADS) {
    const int at = split.head + k * kVector<T>;
    __pipeline_memcpy_async(to + at, from + at, 16);
  }
  const int edge = int(split.edge((threadIdx.x - 32u * warp) % THREADS));
  if (edge >= 0) to[edge] = from[edge];
}

template <class T, int THREADS>
__device__ __forceinline__ void put(T* to, const T* from, int n) {
  const Split<T> split(to, n);
#pragma unroll 4
  for (int k = threadIdx.x; k < int(split.packs); k += THREADS) {
    const int at = split.head + k * kVector<T>;
    *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(from + at);
  }
  const int edge = int(split.edge(threadIdx.x));
  if (edge >= 0) to[edge] = from[edge];
}

template <class T, int THREADS>
__device__ __forceinline__ void put_zeros(T* to, int64_t n) {
  const Split<T> split(to, n);
  for (int64_t k = threadIdx.x; k < split.packs; k += THREADS) {
    *reinterpret_cast<uint4*>(to + split.head + k * kVector<T>) = uint4{0, 0, 0, 0};
  }
  const int64_t edge = split.edge(threadIdx.x);
  if (edge >= 0) to[edge] = from_float<T>(0.0f);
}

// ---- a chunk in shared memory

// Columns from `at` on as float; those past `left` are -inf. With ON4, units are aligned to 4 bytes; else values are
// read one by one.
template <bool ON4, class T>
__device__ __forceinline__ void load_unit(const T* at, int left, float (&x)[kUnit<T>]) {
  if (ON4 && left >= kUnit<T>) {
    load(at, x);
    return;
  }
#pragma unroll
  for (int j = 0; j < kUnit<T>; ++j) x[j] = j < left ? to_float(at[j]) : -INFINITY;
}

template <bool ON4, class T>
__device__ __forceinline__ void store_unit(T* at, int left, const float (&x)[kUnit<T>]) {
  if (ON4 && left >= kUnit<T>) {
    store(at, x);
    return;
  }
#pragma unroll
  for (int j = 0; j < kUnit<T>; ++j) {
    if (j < left) at[j] = from_float<T>(x[j]);
  }
}

// Calls of(column, columns left in the chunk, unit of the batch) for a thread's units of a batch that starts at column
// `begin` of a chunk of `cols`. `left` is a constant if the batch is complete.
template <class T, int THREADS, class F>
__device__ __forceinline__ void each_unit(int begin, int cols, F of) {
  const int first = begin + int(threadIdx.x) * kUnit<T>;
  if (begin + kBatch<T, THREADS> <= cols) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) of(first + u * THREADS * kUnit<T>, kUnit<T>, u);
  } else {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) of(first + u * THREADS * kUnit<T>, cols - (first + u * THREADS * kUnit<T>), u);
  }
}

// Calls of(true_type) or of(false_type), so that the choice is made once instead of for every unit.
template <class F>
__device__ __forceinline__ void by(bool choice, F of) {
  if (choice) {
    of(std::true_type{});
  } else {
    of(std::false_type{});
  }
}

// Σ of kLossParts parts, returned to every thread.
__device__ __forceinline__ float sum_parts(const float* parts) {
  const int lane = threadIdx.x % 32;
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kLossParts; k += 32) sum += parts[k + lane];
  return row_sum<32>(sum, nullptr);
}

// ---- rows

// kAll may use 128 registers: with 64 it would spill.
template <class T, int MODE, int THREADS>
__global__ void __launch_bounds__(THREADS, (MODE == kAll ? 512 : 1024) / THREADS)
    cross_entropy_fwd_kernel(const CrossEntropyForward a) {
  constexpr int U = kUnit<T>, kStep = kBatch<T, THREADS>;
  const bool smooths = MODE == kSmooths || (MODE == kAll && a.label_smoothing > 0.0f);
  const bool caps = MODE == kAll && a.softcap > 0.0f, judges = MODE == kAll && a.accuracy;
  extern __shared__ uint4 memory[];
  __shared__ float buffer[MODE == kAll ? 4 : 3][32];
  const int64_t row = blockIdx.x, t = a.target[row];
  const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
  T* dx = a.dx ? static_cast<T*>(a.dx) + row * a.stride_dx : nullptr;
  if (t == a.ignore_index) {
    if (threadIdx.x == 0) {
      a.loss[row] = 0.0f;
      if (judges) a.z[row] = a.accuracy[row] = 0.0f;
    }
    if (dx) put_zeros<T, THREADS>(dx, a.cols);
    return;
  }

  const int chunks = int((a.cols + a.chunk - 1) / a.chunk), offset = past(x);
  const bool on4 = U == 1 || offset % U == 0;
  auto width = [&](int k) { return int(min(a.cols - int64_t(k) * a.chunk, int64_t(a.chunk))); };
  auto slot = [&](int k) { return reinterpret_cast<T*>(memory) + k % kSlots * int64_t(a.chunk + kVector<T>) + offset; };
  auto fetch_chunk = [&](int k) { fetch<T, THREADS>(slot(k), x + int64_t(k) * a.chunk, width(k), k % kSlots); };
  for (int k = 0; k < kSlots; ++k) {
    if (k < chunks) fetch_chunk(k);
    __pipeline_commit();
  }
  const bool is_class = t >= 0 && t < a.cols;
  const float raw_t = is_class ? to_float(x[t]) : NAN;
  const float x_t = caps ? capped<T>(raw_t, a.softcap) : raw_t;
  const float w_t = a.weight && is_class ? a.weight[t] : 1.0f;
  const float w_sum = a.weight ? *a.weight_sum : float(a.cols);
  const float denominator = a.parts ? sum_parts(a.parts) : 1.0f;
  const float dloss = a.dloss ? a.dloss[row] : 1.0f;
  auto weight = [&](int64_t col) { return a.weight ? a.weight[col] : 1.0f; };

  // Σ exp(x - top), and Σ w (reference - x), the part of smoothing's Σ w (lse - x). Each column of a unit has its sum,
  // so the order is that of the columns, wherever the chunk is. top is finite even if all of a row is -inf.
  const float reference = fabsf(x_t) < INFINITY ? x_t : 0.0f;
  // beaten: a logit is greater than the target's, or equal and before it.
  float top = -FLT_MAX, sums[U] = {}, distances[U] = {};
  bool beaten = false;
  for (int k = 0; k < chunks; ++k) {
    __pipeline_wait_prior(kSlots - 1);
    __syncthreads();
    const T* in = slot(k);
    const int cols = width(k);
    for (int begin = 0; begin < cols; begin += kStep) {
      float v[kUnits][U], higher = top;
      by(on4, [&](auto on4) {
        each_unit<T, THREADS>(begin, cols, [&](int col, int left, int u) {
          load_unit<on4>(in + col, left, v[u]);
          if constexpr (MODE == kAll) {
#pragma unroll
            for (int j = 0; j < U; ++j) {
              if (j >= left) continue;
              const bool before = int64_t(k) * a.chunk + col + j < t;
              beaten |= before ? !(v[u][j] < raw_t) : !(v[u][j] <= raw_t);
              if (caps) v[u][j] = capped<T>(v[u][j], a.softcap);
            }
          }
#pragma unroll
          for (int j = 0; j < U; ++j) higher = fmaxf(higher, v[u][j]);
          if (smooths) {
#pragma unroll
            for (int j = 0; j < U; ++j) {
              if (j < left) distances[j] += weight(int64_t(k) * a.chunk + col + j) * (reference - v[u][j]);
            }
          }
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
    }
    if (k + kSlots < chunks) {
      __syncthreads();
      fetch_chunk(k + kSlots);
    }
    __pipeline_commit();
  }
  float sum = 0.0f, distance = 0.0f;
#pragma unroll
  for (int j = 0; j < U; ++j) {
    sum += sums[j];
    distance += distances[j];
  }
  const float maximum = row_max<THREADS>(top, buffer[0]);
  const float total = row_sum<THREADS>(sum * exp_of(top - maximum), buffer[1]);
  if (smooths) distance = row_sum<THREADS>(distance, buffer[2]);
  if (judges) beaten = row_max<THREADS>(beaten ? 1.0f : 0.0f, buffer[MODE == kAll ? 3 : 0]) > 0.0f;

  const float log_total = logf(total), lse = maximum + log_total, each = a.label_smoothing / float(a.cols);
  if (threadIdx.x == 0) {
    float loss = w_t * (1.0f - a.label_smoothing) * ((maximum - x_t) + log_total);
    if (smooths) loss += each * (distance + w_sum * ((maximum - reference) + log_total));
    if (a.z_loss != 0.0f) loss += a.z_loss * lse * lse;
    a.loss[row] = is_class ? loss : NAN;
    if (judges) {
      a.z[row] = is_class ? a.z_loss * lse * lse : NAN;
      a.accuracy[row] = is_class ? float(!beaten) : NAN;
    }
  }
  if (!dx) return;

  const float scale = (is_class ? dloss : NAN) / denominator;
  const float one_hot = w_t * (1.0f - a.label_smoothing) * scale, uniform = each * scale;
  const float factor = (one_hot + uniform * w_sum + 2.0f * scale * a.z_loss * lse) / total;
  // If the rows of x and dx are aligned differently, every thread writes its columns to dx directly.
  const bool alike = past(dx) == offset;
  const int t_chunk = is_class ? int(t / a.chunk) : -1, t_col = is_class ? int(t % a.chunk) : 0;
  for (int k = chunks - 1; k >= 0; --k) {
    if (k < chunks - kSlots) {
      __pipeline_wait_prior(kSlots - 1);
      __syncthreads();
    }
    T* in = slot(k);
    T* out = dx + int64_t(k) * a.chunk;
    const int cols = width(k);
    auto gradients = [&](auto on4, T* to) {
      for (int begin = 0; begin < cols; begin += kStep) {
        each_unit<T, THREADS>(begin, cols, [&](int col, int left, int) {
          float g[U];
          load_unit<on4>(in + col, left, g);
#pragma unroll
          for (int j = 0; j < U; ++j) {
            const float slope = caps ? cap_slope(g[j], a.softcap) : 1.0f;
            if (caps) g[j] = capped<T>(g[j], a.softcap);
            g[j] = exp_of(g[j] - maximum) * factor;
            if (smooths && j < left) g[j] -= uniform * weight(int64_t(k) * a.chunk + col + j);
            if (caps) g[j] *= slope;
          }
          store_unit<on4>(to + col, left, g);
        });
      }
      if (k == t_chunk && t_col / U % THREADS == int(threadIdx.x)) {  // this thread wrote that column, without one_hot
        float g = exp_of(x_t - maximum) * factor - one_hot;
        if (smooths) g -= uniform * w_t;
        to[t_col] = from_float<T>(caps ? g * cap_slope(raw_t, a.softcap) : g);
      }
    };
    if (alike) {
      by(on4, [&](auto on4) { gradients(on4, in); });
    } else {
      gradients(std::false_type{}, out);
    }
    if (alike) {
      __syncthreads();
      put<T, THREADS>(out, in, cols);
    }
    if (k >= kSlots) {
      __syncthreads();
      fetch_chunk(k - kSlots);
    }
    __pipeline_commit();
  }
}

// ---- a gradient times dloss

constexpr int kScale = 256;     // threads
constexpr int kScalePacks = 4;  // 16-byte accesses of a thread in a tile

// Few blocks loop over tiles: dloss is usually 1, and then each block only has to check that. `alike`: the rows of y
// have the alignment of the rows of x.
template <class T>
__global__ void __launch_bounds__(kScale) cross_entropy_bwd_kernel(const CrossEntropyBackward a, bool alike) {
  constexpr int V = kVector<T>, kTile = kScale * kScalePacks * V;
  float dloss = a.dloss[0];
  if (!a.per_row && a.y == a.x && dloss == 1.0f) return;
  const int64_t tiles = (a.cols + kTile - 1) / kTile;
  for (int64_t at = blockIdx.x; at < a.rows * tiles; at += gridDim.x) {
    const int64_t row = at / tiles, tile = at % tiles;
    const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
    T* y = static_cast<T*>(a.y) + row * a.stride_y;
    if (a.per_row) dloss = a.dloss[row];
    const Split<T> split(x, a.cols);
    float v[kScalePacks][V];
#pragma unroll
    for (int k = 0; k < kScalePacks; ++k) {
      const int64_t pack = (tile * kScalePacks + k) * kScale + threadIdx.x;
      if (pack < split.packs) load(x + split.head + pack * V, v[k]);
    }
#pragma unroll
    for (int k = 0; k < kScalePacks; ++k) {
      const int64_t pack = (tile * kScalePacks + k) * kScale + threadIdx.x;
      if (pack >= split.packs) continue;
      T* to = y + split.head + pack * V;
#pragma unroll
      for (int j = 0; j < V; ++j) v[k][j] *= dloss;
      if (alike) {
        store(to, v[k]);
      } else {
        for (int j = 0; j < V; ++j) to[j] = from_float<T>(v[k][j]);
      }
    }
    const int64_t edge = tile == 0 ? split.edge(threadIdx.x) : -1;
    if (edge >= 0) y[edge] = from_float<T>(to_float(x[edge]) * dloss);
  }
}

// ---- sums over the rows

constexpr int kSum = 1024;  // threads

// A block's share of [0, n); its threads take the indices in turn.
template <class F>
__device__ __forceinline__ float sum_share(int64_t n, F of) {
  __shared__ float buffer[32];
  const int64_t share = (n + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * share;
  const int64_t end = min(begin + share, n);
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kSum) sum += of(i);
  return row_sum<kSum>(sum, buffer);
}

__global__ void __launch_bounds__(kSum) cross_entropy_count_kernel(const TargetCount a) {
  const float sum = sum_share(a.rows, [&](int64_t i) {
    const int64_t t = a.target[i];
    const bool counts = t >= 0 && t < a.cols && t != a.ignore_index;
    return !counts ? 0.0f : a.weight ? a.weight[t] : 1.0f;
  });
  if (threadIdx.x == 0) a.parts[blockIdx.x] = sum;
}

// out[block] = Σ x over a block's share, divided by Σ parts unless that is null.
__global__ void __launch_bounds__(kSum)
    cross_entropy_sum_kernel(const float* x, int64_t n, const float* parts, float* out) {
  const float sum = sum_share(n, [&](int64_t i) { return x[i]; });
  const float denominator = parts ? sum_parts(parts) : 1.0f;
  if (threadIdx.x == 0) out[blockIdx.x] = sum / denominator;
}

// ---- what is launched

namespace {

template <class T, int THREADS>
void forward(CrossEntropyForward a, Place place) {
  constexpr int64_t kPad = 16, kStep = kBatch<T, THREADS>, kStepBytes = kStep * sizeof(T);
  const int64_t batches = (a.cols + kStep - 1) / kStep;
  const int64_t most = (shared_memory(place.device) / kSlots - kPad) / kStepBytes;
  a.chunk = int(kStep * std::min<int64_t>((batches + kSlots - 1) / kSlots, most));
  const int64_t whole =
      std::min<int64_t>(kSlots, a.cols / a.chunk);  // chunks in shared memory, and what a last one has
  const int64_t rest = whole == kSlots ? 0 : (a.cols % a.chunk) * int64_t(sizeof(T)) + kPad;
  const size_t shared = whole * (a.chunk * sizeof(T) + kPad) + (rest + 15) / 16 * 16;
  const auto kernel = a.softcap > 0.0f || a.accuracy ? cross_entropy_fwd_kernel<T, kAll, THREADS>
                      : a.label_smoothing > 0.0f     ? cross_entropy_fwd_kernel<T, kSmooths, THREADS>
                                                     : cross_entropy_fwd_kernel<T, kPlain, THREADS>;
  launch(kernel, grid_size(a.rows), THREADS, shared, place.stream, a);
}

// A row of few batches gets one warp or four; their batches are 1 and 4 KB, and a batch of 512 threads is 16 KB.
template <class T>
void forward(const CrossEntropyForward& a, Place place) {
  const int64_t bytes = a.cols * int64_t(sizeof(T));
  if (bytes <= 2048) return forward<T, 32>(a, place);
  if (bytes <= 16384) return forward<T, 128>(a, place);
  forward<T, 512>(a, place);
}

template <class T>
void backward(CrossEntropyBackward a, Place place) {
  if (!a.per_row && a.stride_x == a.cols && a.stride_y == a.cols) {
    a.cols *= a.rows;
    a.rows = 1;
  }
  constexpr int kTile = kScale * kScalePacks * kVector<T>;
  const bool alike = (reinterpret_cast<uintptr_t>(a.x) - reinterpret_cast<uintptr_t>(a.y)) % 16 == 0 &&
                     (a.rows == 1 || (a.stride_x - a.stride_y) % kVector<T> == 0);
  const int64_t tiles = a.rows * ((a.cols + kTile - 1) / kTile);
  const auto kernel = cross_entropy_bwd_kernel<T>;
  const int64_t blocks = std::min<int64_t>(tiles, resident_blocks(kernel, kScale, 0, place.device));
  launch(kernel, unsigned(blocks), kScale, 0, place.stream, a, alike);
}

}  // namespace

void cross_entropy_fwd(const CrossEntropyForward& args, DType dtype, Place place) {
  if (args.rows == 0) return;
  const OnDevice here(place.device);
  if (dtype == DType::f32) return forward<float>(args, place);
  dtype == DType::bf16 ? forward<__nv_bfloat16>(args, place) : forward<__half>(args, place);
}

void cross_entropy_bwd(const CrossEntropyBackward& args, DType dtype, Place place) {
  if (args.rows == 0 || args.cols == 0) return;
  const OnDevice here(place.device);
  if (dtype == DType::f32) return backward<float>(args, place);
  dtype == DType::bf16 ? backward<__nv_bfloat16>(args, place) : backward<__half>(args, place);
}

void cross_entropy_count(const TargetCount& args, Place place) {
  const OnDevice here(place.device);
  launch(cross_entropy_count_kernel, kLossParts, kSum, 0, place.stream, args);
}

void cross_entropy_sum(const LossSum& args, Place place) {
  const OnDevice here(place.device);
  if (args.rows <= 16 * kSum) {
    launch(cross_entropy_sum_kernel, 1, kSum, 0, place.stream, args.loss, args.rows, args.parts, args.out);
    return;
  }
  const float* none = nullptr;
  launch(cross_entropy_sum_kernel, kLossParts, kSum, 0, place.stream, args.loss, args.rows, none, args.scratch);
  const float* scratch = args.scratch;
  launch(cross_entropy_sum_kernel, 1, kSum, 0, place.stream, scratch, int64_t(kLossParts), args.parts, args.out);
}

}  // namespace fastlm::cuda
