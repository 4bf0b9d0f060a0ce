// Shared by the kernels of attention: the blocks that a tile visits, loads and stores of rows, masks, bias, dropout
// bits.
//
// A block of threads computes a tile of rows (queries or keys) and visits blocks of columns of the other kind. Rows and
// columns are counted along a token axis: over all packed sequences, or over one padded sequence. Row i and column j of
// one sequence are on its diagonal if j = i + end of the columns - end of the rows: bottom-right alignment. A row sees
// a range of columns [lo, hi). Both ends never fall from one row to the next, also across sequences, so the first and
// the last row of a tile bound the ranges of all its rows.
//
// Scores of 16-bit inputs are multiplied by log2 e together with the scale, so that 2^x needs no multiplication. Scores
// of float32 are not, since lse is rounded when it is stored.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention.h"
#include "launch.h"
#include "mma.cuh"

namespace fastlm::cuda {

constexpr float kInf = __builtin_huge_valf(), kNaN = __builtin_nanf("");
constexpr float kLn2 = 0.69314718055994531f;

template <class T>
constexpr float kUnit = sizeof(T) == 2 ? 1.4426950408889634f : 1.0f;  // of the scores

// 2^x; for float32 e^x.
template <class T>
__device__ __forceinline__ float power(float x) {
  if constexpr (sizeof(T) == 4) return expf(x);
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The inverse of power.
template <class T>
__device__ __forceinline__ float logarithm(float x) {
  if constexpr (sizeof(T) == 4) return logf(x);
  return __log2f(x);
}

// 16·MT rows for each of WARPS warps; blocks of 8·NT columns, STAGES of them in shared memory at a time. The compiler
// limits registers so that BLOCKS blocks fit a multiprocessor.
template <int MT_, int NT_, int WARPS_, int STAGES_, int BLOCKS_>
struct Shape {
  static constexpr int MT = MT_, NT = NT_, WARPS = WARPS_, STAGES = STAGES_, BLOCKS = BLOCKS_;
  static constexpr int M = 16 * MT * WARPS, N = 8 * NT, THREADS = 32 * WARPS;
};

constexpr size_t kMostShared = 99 * 1024;  // of a block, on sm_86, sm_89 and sm_120

// ---- sequences and ranges

struct Range {
  int lo, hi;
};

// Queries or keys: cu_seqlens of packed sequences, or null, and the number of rows. No launch can refuse wrong
// cu_seqlens. Bounds are cut to the tensor, so that no access leaves it; the results are NaN (see
// attention_fwd_kernel).
struct Axis {
  const int32_t* cu;
  int size;

  __device__ __forceinline__ int start(int s) const { return cu ? min(max(cu[s], 0), size) : 0; }
  __device__ __forceinline__ int end(int s) const { return cu ? min(max(cu[s + 1], start(s)), size) : size; }

  // From the first row of the first sequence to the end of the last one.
  __device__ __forceinline__ Range all(int sequences) const {
    return cu ? Range{cu[0], cu[sequences]} : Range{0, size};
  }

  // Whether cu_seqlens fall or leave the tensor, in the part that this thread reads.
  template <int THREADS>
  __device__ __forceinline__ bool wrong(int sequences) const {
    bool found = false;
    for (int s = threadIdx.x; cu && s < sequences; s += THREADS)
      found |= cu[s] < 0 || cu[s] > cu[s + 1] || cu[s + 1] > size;
    return found;
  }
};

// The last sequence s in first..last with cu[s] <= row. There must be one.
__device__ __forceinline__ int find_sequence(const int32_t* cu, int row, int first, int last) {
  while (first < last) {
    const int middle = last - (last - first) / 2;
    if (cu[middle] <= row) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

// How rows see columns. before, after: of the window, -1: no limit. first, end: all real columns are in [first, end).
// The bias is constant from near_before columns before the diagonal on, and from near_after columns after it on.
struct Sight {
  Axis rows, cols;
  int before, after, near_before, near_after, first, end;

  __device__ __forceinline__ int diagonal(int row, int s) const { return row + cols.end(s) - rows.end(s); }

  __device__ __forceinline__ Range range(int row, int s) const {
    const int start = max(cols.start(s), first), stop = min(cols.end(s), end), centre = diagonal(row, s);
    Range r{start, stop};
    if (before >= 0) r.lo = min(max(start, centre - before), stop);
    if (after >= 0) r.hi = max(min(stop, centre + after + 1), start);
    return r;
  }
};

// The blocks that a tile visits: those of [begin, hi), N columns each. In up to two runs, [a0, a1) and [b0, b1) with
// a1 <= b0, every row sees every column and, with a bias, is far from the diagonal. These plain blocks are visited
// first.
struct Plan {
  Range known;      // the rows of all sequences
  int first, last;  // sequences of the first and the last row
  int origin, begin, hi, count, a0, a1, b0, b1;

  __device__ __forceinline__ int plain() const { return a1 - a0 + b1 - b0; }
  __device__ __forceinline__ bool before(int t) const { return t < a1 - a0; }  // a plain one: in the first run
  __device__ __forceinline__ int block(int t) const {
    if (t < plain()) return t < a1 - a0 ? a0 + t : b0 + t - (a1 - a0);
    t -= plain();
    if (t >= a0) t += a1 - a0;
    return t < b0 ? t : t + b1 - b0;
  }
  __device__ __forceinline__ int column(int t, int n) const { return begin + block(t) * n; }
};

// The plan for rows row0..last_row. plain: whether there may be plain blocks.
template <int N>
__device__ __forceinline__ Plan make_plan(const Sight& sight, int sequences, int row0, int last_row, bool plain,
                                          bool bias) {
  Plan p;
  p.known = sight.rows.all(sequences);
  p.first = p.last = 0;
  if (sight.rows.cu) {
    p.first = find_sequence(sight.rows.cu, row0, 0, sequences - 1);
    p.last = find_sequence(sight.rows.cu, last_row, p.first, sequences - 1);
  }
  const Range a = sight.range(row0, p.first), b = sight.range(last_row, p.last);
  // Blocks start at a multiple of 16 in the first sequence, since dropout draws for sixteen keys at a time.
  p.origin = sight.cols.start(p.first);
  p.begin = p.origin + (a.lo - p.origin) / 16 * 16;
  p.hi = b.hi;
  p.count = max(0, b.hi - p.begin + N - 1) / N;
  const int hi = plain ? a.hi : b.lo;  // all rows see [b.lo, hi)
  auto run = [&](int from, int to, int& first, int& last) {
    first = (max(from, p.begin) - p.begin + N - 1) / N;
    last = max(first, (max(to, p.begin) - p.begin) / N);
  };
  if (bias) {
    run(b.lo, min(hi, sight.diagonal(row0, p.first) - sight.near_before + 1), p.a0, p.a1);
    run(max(b.lo, sight.diagonal(last_row, p.last) + sight.near_after), hi, p.b0, p.b1);
  } else {
    run(b.lo, hi, p.a0, p.a1);
    p.b0 = p.b1 = p.a1;
  }
  return p;
}

// Each row of a tile sees columns [lo, lo + width); column `diagonal` is on its diagonal.
template <int M>
struct RowSight {
  int lo[M], width[M], diagonal[M];

  __device__ __forceinline__ void set(int i, const Sight& sight, int row, int s) {
    const Range r = sight.range(row, s);
    lo[i] = r.lo, width[i] = max(0, r.hi - r.lo), diagonal[i] = sight.diagonal(row, s);
  }
};

// The range of the real keys of mask (sk,), for all threads of a block; buffer: 3·WARPS of shared memory.
struct RealKeys {
  int first, end;
  bool holes;
};

template <int WARPS>
__device__ __forceinline__ RealKeys real_keys(const uint8_t* mask, int sk, int* buffer) {
  int first = sk, end = 0, count = 0;
  for (int key = threadIdx.x; key < sk; key += 32 * WARPS) {
    if (!mask[key]) continue;
    first = min(first, key), end = key + 1, ++count;
  }
  first = __reduce_min_sync(0xFFFFFFFFu, first);
  end = __reduce_max_sync(0xFFFFFFFFu, end);
  count = __reduce_add_sync(0xFFFFFFFFu, count);
  if (threadIdx.x % 32 == 0) {
    int* mine = buffer + 3 * (threadIdx.x / 32);
    mine[0] = first, mine[1] = end, mine[2] = count;
  }
  __syncthreads();
  count = 0;
  for (int w = 0; w < WARPS; ++w) {
    first = min(first, buffer[3 * w]), end = max(end, buffer[3 * w + 1]), count += buffer[3 * w + 2];
  }
  first = min(first, end);
  return {first, end, count < end - first};
}

// ---- rows in and out

// The rows of a sequence and a head.
template <class T>
struct Slice {
  const T* data;
  int64_t stride;
  bool wide;

  __device__ __forceinline__ Slice(const Rows& x, int64_t sequence, int64_t head)
      : data(static_cast<const T*>(x.data) + sequence * x.sequence + head * x.head), stride(x.row), wide(x.wide) {}
};

// tile (ROWS, D) = the rows of x from row0 on; 0 from row `end` and column d on, and where the mask, if given, is 0.
template <class T, int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_rows(T* tile, const Slice<T>& x, int row0, int end, const uint8_t* mask, int d) {
  using At = Tile<T, D>;
  constexpr int kStep = THREADS / At::kChunks;  // rows between a thread's chunks, all of the same number
  static_assert(THREADS % At::kChunks == 0);
  const int chunk = threadIdx.x % At::kChunks, cols = min(At::kChunk, d - chunk * At::kChunk);
  int r = threadIdx.x / At::kChunks;
  const T* from = x.data + (row0 + r) * x.stride + chunk * At::kChunk;
  auto real = [&] { return cols > 0 && row0 + r < end && (!mask || mask[row0 + r]); };
  if (x.wide) {
#pragma unroll
    for (; r < ROWS; r += kStep, from += kStep * x.stride) copy_async16(tile + At::at(r, chunk), from, real() ? 16 : 0);
    return;
  }
#pragma unroll 1
  for (; r < ROWS; r += kStep, from += kStep * x.stride) {
    const int n = real() ? cols : 0;
    Pack<T, At::kChunk> pack;
#pragma unroll
    for (int k = 0; k < At::kChunk; ++k) pack.item[k] = k < n ? from[k] : from_float<T>(0.0f);
    *reinterpret_cast<Pack<T, At::kChunk>*>(tile + At::at(r, chunk)) = pack;
  }
}

// out = factor times the fragment acc (16·MT, 8·DT), columns from `chunk0` chunks on, for the warp's first `rows` rows,
// `stride` apart. The data passes through `tile`, the warp's rows of a tile that is no longer read.
template <class T, int D, int MT, int DT>
__device__ __forceinline__ void store_rows(T* out, int64_t stride, int rows, int d, bool wide,
                                           const float (&acc)[MT][DT][4], const float (&factor)[MT][2], T* tile,
                                           int chunk0) {
  using At = Tile<T, D>;
  constexpr int kChunks = 8 * DT / At::kChunk;
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int n = 0; n < DT; ++n) {
        const int col = column<T>(n);
        const Pack<T, 2> pair{from_float<T>(acc[m][n][2 * h] * factor[m][h]),
                              from_float<T>(acc[m][n][2 * h + 1] * factor[m][h])};
        T* to = tile + At::at(16 * m + 8 * h + lane / 4, chunk0 + col / At::kChunk) + col % At::kChunk;
        *reinterpret_cast<Pack<T, 2>*>(to) = pair;
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * MT * kChunks; i += 32) {
    const int r = i / kChunks, chunk = chunk0 + i % kChunks, n = d - chunk * At::kChunk;
    if (r >= rows || n <= 0) continue;
    const auto pack = *reinterpret_cast<const Pack<T, At::kChunk>*>(tile + At::at(r, chunk));
    T* to = out + r * stride + chunk * At::kChunk;
    if (wide) {
      *reinterpret_cast<Pack<T, At::kChunk>*>(to) = pack;
    } else {
#pragma unroll
      for (int k = 0; k < At::kChunk; ++k) {
        if (k < n) to[k] = pack.item[k];
      }
    }
  }
}

// Between two steps: waits for the loads of the next block. With one stage, they start only here, after all warps have
// finished with the previous block.
template <int STAGES, class F>
__device__ __forceinline__ void next_stage(F fetch) {
  if (STAGES == 1) {
    __syncthreads();
    fetch();
  }
  copies_arrive();
  __syncthreads();
}

// ---- softcap

// c tanh(x/c), for scores x and the softcap c in their unit.
template <class T>
__device__ __forceinline__ float cap(float x, float c) {
  if constexpr (sizeof(T) == 4) return c * tanhf(x / c);
  return c - __fdividef(2.0f * c, 1.0f + power<T>(x * (2.0f * 1.4426950408889634f / c)));
}

// Its derivative where it is y; 0 for a masked score, where y is -inf.
__device__ __forceinline__ float cap_slope(float y, float c) {
  const float t = y * (1.0f / c);
  return fmaxf(1.0f - t * t, 0.0f);
}

// Scores times `factor`, capped. Returns the factor that is still to be applied.
template <class T, int MT, int NT>
__device__ __forceinline__ float cap_scores(float (&s)[MT][NT][4], float factor, float softcap) {
  each<MT, NT>([&](int m, int n, int e) { s[m][n][e] = cap<T>(s[m][n][e] * factor, softcap * kUnit<T>); });
  return 1.0f;
}

// ---- masks and bias

// Bits of N columns from col0 on: set for those below `end` that are real in the columns' mask (null: all are real).
template <int NT>
struct RealColumns {
  uint32_t bits[(NT + 3) / 4];

  __device__ __forceinline__ RealColumns(const uint8_t* mask, int col0, int end) {
#pragma unroll
    for (int w = 0; w < (NT + 3) / 4; ++w) {
      const int col = col0 + 32 * w + threadIdx.x % 32;
      bits[w] = mask ? __ballot_sync(0xFFFFFFFFu, col < end && mask[col]) : 0xFFFFFFFFu;
    }
  }
  __device__ __forceinline__ bool has(int n, int e) const {
    return bits[n / 4] >> (8 * (n % 4) + 2 * (threadIdx.x % 4) + e) & 1;
  }
};

// Adds bias (2 far + 1,), if given, to scores, and sets -inf where a row does not see a column. row0: the warp's first
// row in `sight`. sign: 1 if columns are keys, -1 if rows are. Returns the factor that is still to be applied: if the
// factor is positive and there is no bias, it is left to an FMA that rounds once; else 1.
template <int MT, int NT, int M>
__device__ __forceinline__ float finish_scores(float (&s)[MT][NT][4], float factor, const RowSight<M>& sight, int row0,
                                               int col0, const RealColumns<NT>& real, const float* bias, int far,
                                               int sign) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + 16 * m + 8 * h + g;
      const int lo = sight.lo[row], diagonal = sight.diagonal[row];
      const unsigned width = unsigned(sight.width[row]);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = col0 + 8 * n + 2 * t + e;
          float x = s[m][n][2 * h + e];
          if (bias) x = fmaf(x, factor, bias[min(max(sign * (col - diagonal), -far), far) + far]);
          if (!bias && factor <= 0.0f) x *= factor;
          s[m][n][2 * h + e] = unsigned(col - lo) < width && real.has(n, e) ? x : -kInf;
        }
      }
    }
  }
  return bias || factor <= 0.0f ? 1.0f : factor;
}

// ---- what is launched

inline bool is_wide(const Rows& x, int d, size_t item) {
  return is_wide(x.data, x.row, item) && is_wide(x.data, x.head, item) && is_wide(x.data, x.sequence, item) &&
         d * item % 16 == 0;
}

inline int64_t blocks_of(int64_t rows, int size) { return (rows + size - 1) / size; }

// f(T, D, EXTRAS) for the class of the head dimension. EXTRAS: the kernel supports dropout, a bias and a softcap. Only
// heads of 64 and 128 in bfloat16, in which most models are trained, have kernels without; these take fewer registers.
template <class F>
void choose(const Attention& a, DType dtype, F f) {
  auto extras = [&](auto type, auto d) {
    constexpr int D = decltype(d)::value;
    if constexpr (std::is_same_v<decltype(type), __nv_bfloat16> && (D == 64 || D == 128)) {
      if (!a.bias && !a.dropout.threshold && a.softcap <= 0.0f) return f(type, d, std::false_type());
    }
    f(type, d, std::true_type());
  };
  auto width = [&](auto type) {
    if constexpr (sizeof(type) == 2) {
      if (a.d <= 32) return extras(type, std::integral_constant<int, 32>());
    }
    if (a.d <= 64) return extras(type, std::integral_constant<int, 64>());
    if (a.d <= 128) return extras(type, std::integral_constant<int, 128>());
    extras(type, std::integral_constant<int, 256>());
  };
  if (dtype == DType::f32) return width(float());
  dtype == DType::bf16 ? width(__nv_bfloat16()) : width(__half());
}

}  // namespace fastlm::cuda
