// attention against a cache (flash-decoding, Dao et al. 2023). The maths: fastlm/ops/attention.py.
//
// Memory bounds it, so there are no matrix instructions. A block has up to R rows, which are pairs of a query and one
// of the heads that share a key head, and a share of the keys. LANES lanes of a warp hold a key, 16 bytes each, and
// each such slot keeps its own maximum, sum and values; they are joined at the end. With several shares the blocks
// leave their parts, and a second kernel adds them in order.
#include "attention_cache.h"
#include "attention_tile.cuh"

namespace fastlm::cuda {

constexpr int kCacheWarps = 4, kCacheThreads = 32 * kCacheWarps, kMostSplits = 128;

template <class T, int D>
struct CacheShape {
  static constexpr int VEC = kVector<T> > D / 32 ? kVector<T> : D / 32;  // elements of a row for each lane
  static constexpr int LANES = D / VEC, SLOTS = 32 / LANES;              // keys that a warp reads at a time
};

// Elements [col, col + N) of a row of d, 0 from d on.
template <int N, class T>
__device__ __forceinline__ void load_part(const T* row, int col, int d, bool wide, float (&to)[N]) {
  if (wide && col < d) return load<N>(row + col, to);
#pragma unroll
  for (int j = 0; j < N; ++j) to[j] = col + j < d ? to_float(row[col + j]) : 0.0f;
}

// Two softmax sums over the same row, joined. The factors of both; `maximum` becomes the larger one.
template <class T>
__device__ __forceinline__ float2 join(float& maximum, float other) {
  const float top = fmaxf(maximum, other), least = top == -kInf ? 0.0f : top;
  const float2 factors{power<T>(maximum - least), power<T>(other - least)};
  maximum = top;
  return factors;
}

template <class T>
__device__ __forceinline__ float lse_of(float maximum, float total) {
  if (total == 0.0f) return -kInf;
  return sizeof(T) == 4 ? maximum + logf(total) : (maximum + log2f(total)) * kLn2;
}

template <class T, int D, int R>
__global__ void __launch_bounds__(kCacheThreads) attention_cache_kernel(const AttentionCache a, const int tiles) {
  using S = CacheShape<T, D>;
  constexpr int VEC = S::VEC, LANES = S::LANES, SLOTS = S::SLOTS, U = R == 1 ? 4 : 2;  // U keys of a slot in flight
  __shared__ float values[kCacheWarps][R][D], maxima[kCacheWarps][R], sums[kCacheWarps][R];
  const int split = blockIdx.x % a.splits, tile = blockIdx.x / a.splits % tiles, kv_heads = a.heads / a.group;
  const int kv_head = blockIdx.x / a.splits / tiles % kv_heads, sequence = blockIdx.x / a.splits / tiles / kv_heads;
  const int warp = threadIdx.x / 32, slot = threadIdx.x % 32 / LANES, col = threadIdx.x % LANES * VEC;

  int length = a.lengths[sequence], start = 0, queries = a.sq;
  const bool lost = length < 0 || length > a.sk;
  if (lost) length = 0;
  if (a.cu_q) {
    if (__syncthreads_or(Axis{a.cu_q, a.sq}.wrong<kCacheThreads>(a.sequences))) return;
    start = a.cu_q[sequence], queries = a.cu_q[sequence + 1] - start;
    if (queries > a.longest) return;
  }
  const int64_t b = a.cu_q ? 0 : sequence;
  if (tile * R >= queries * a.group) return;

  const Slice<T> k_rows(a.k, sequence, kv_head), v_rows(a.v, sequence, kv_head);
  float q[R][VEC], acc[R][VEC], maximum[R], total[R];
  int lo[R], hi[R], centre[R], first = a.sk, last = 0;
  const float* bias[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int row = min(tile * R + r, queries * a.group - 1);  // rows past the last one repeat it, and are not stored
    const int i = row / a.group, head = kv_head * a.group + row % a.group;
    load_part(Slice<T>(a.q, b, head).data + (start + i) * a.q.row, col, a.d, a.q.wide, q[r]);
    centre[r] = i + length - queries;
    lo[r] = a.left < 0 ? 0 : min(max(centre[r] - a.left, 0), length);
    hi[r] = a.right < 0 ? length : max(min(centre[r] + a.right + 1, length), 0);
    bias[r] = a.bias + int64_t(head) * (2 * a.far + 1) + a.far;
    first = min(first, lo[r]), last = max(last, hi[r]);
    maximum[r] = -kInf, total[r] = 0.0f;
#pragma unroll
    for (int j = 0; j < VEC; ++j) acc[r][j] = 0.0f;
  }
  const int share = (max(last - first, 0) + a.splits - 1) / a.splits;
  first += split * share, last = min(first + share, last);

  for (int key0 = first; key0 < last; key0 += kCacheWarps * SLOTS * U) {
    float k[U][VEC], v[U][VEC];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int key = key0 + (u * kCacheWarps + warp) * SLOTS + slot;
      const int within = key < last ? a.d : 0;  // no column of keys that are not there
      load_part(k_rows.data + key * k_rows.stride, col, within, k_rows.wide, k[u]);
      load_part(v_rows.data + key * v_rows.stride, col, within, v_rows.wide, v[u]);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float s[U], top = maximum[r];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        s[u] = 0.0f;
#pragma unroll
        for (int j = 0; j < VEC; ++j) s[u] = fmaf(q[r][j], k[u][j], s[u]);
#pragma unroll
        for (int offset = 1; offset < LANES; offset *= 2) s[u] += __shfl_xor_sync(0xFFFFFFFFu, s[u], offset);
        s[u] *= a.scale;
        if (a.softcap > 0.0f) s[u] = a.softcap * tanhf(s[u] / a.softcap);
        s[u] *= kUnit<T>;
        const int key = key0 + (u * kCacheWarps + warp) * SLOTS + slot;
        if (a.bias) s[u] += bias[r][min(max(key - centre[r], -a.far), a.far_right)];
        if (key >= last || key < lo[r] || key >= hi[r]) s[u] = -kInf;
        top = fmaxf(top, s[u]);
      }
      const float rescale = join<T>(maximum[r], top).x, least = top == -kInf ? 0.0f : top;
      total[r] *= rescale;
#pragma unroll
      for (int j = 0; j < VEC; ++j) acc[r][j] *= rescale;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const float p = power<T>(s[u] - least);
        total[r] += p;
#pragma unroll
        for (int j = 0; j < VEC; ++j) acc[r][j] = fmaf(p, v[u][j], acc[r][j]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int offset = LANES; offset < 32; offset *= 2) {
      const float2 factor = join<T>(maximum[r], __shfl_xor_sync(0xFFFFFFFFu, maximum[r], offset));
      total[r] = total[r] * factor.x + __shfl_xor_sync(0xFFFFFFFFu, total[r], offset) * factor.y;
#pragma unroll
      for (int j = 0; j < VEC; ++j)
        acc[r][j] = acc[r][j] * factor.x + __shfl_xor_sync(0xFFFFFFFFu, acc[r][j], offset) * factor.y;
    }
    if (slot == 0) {
      if (col == 0) maxima[warp][r] = maximum[r], sums[warp][r] = total[r];
#pragma unroll
      for (int j = 0; j < VEC; ++j) values[warp][r][col + j] = acc[r][j];
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < R * D; e += kCacheThreads) {
    const int r = e / D, c = e % D, row = tile * R + r;
    if (c >= a.d || row >= queries * a.group) continue;
    float top = maxima[0][r], sum = sums[0][r], value = values[0][r][c];
    for (int w = 1; w < kCacheWarps; ++w) {
      const float2 factor = join<T>(top, maxima[w][r]);
      sum = sum * factor.x + sums[w][r] * factor.y;
      value = value * factor.x + values[w][r][c] * factor.y;
    }
    if (lost) sum = kNaN;
    const int head = kv_head * a.group + row % a.group, i = start + row / a.group;
    const int64_t out_row = (b * a.sq + i) * a.heads + head;
    if (a.splits > 1) {
      const int64_t at = split * ((a.cu_q ? 1 : a.sequences) * int64_t(a.sq) * a.heads) + out_row;
      a.parts[at * a.d + c] = value;
      if (c == 0) a.maxima[at] = top, a.sums[at] = sum;
    } else {
      static_cast<T*>(a.out)[out_row * a.d + c] = from_float<T>(sum == 0.0f ? 0.0f : value / sum);
      if (c == 0) a.lse[(b * a.heads + head) * a.sq + i] = lse_of<T>(top, sum);
    }
  }
}

// A block joins the parts of one row of out.
template <class T>
__global__ void __launch_bounds__(kCacheThreads) attention_cache_sum_kernel(const AttentionCache a) {
  __shared__ float weight[kMostSplits], buffer[2][32];
  const int64_t row = blockIdx.x, rows = gridDim.x, at = threadIdx.x * rows + row;
  const bool mine = threadIdx.x < a.splits;
  const float maximum = mine ? a.maxima[at] : -kInf, sum = mine ? a.sums[at] : 0.0f;
  const float top = row_max<kCacheThreads>(maximum, buffer[0]), least = top == -kInf ? 0.0f : top;
  const float factor = power<T>(maximum - least);
  weight[threadIdx.x] = factor;
  const float total = row_sum<kCacheThreads>(sum * factor, buffer[1]);
  __syncthreads();
  const int parts = total == total ? a.splits : 0;  // there are none of rows of no sequence, whose sums are NaN
  for (int c = threadIdx.x; c < a.d; c += kCacheThreads) {
    float value = 0.0f;
#pragma unroll 4
    for (int s = 0; s < parts; ++s) value = fmaf(weight[s], a.parts[(s * rows + row) * a.d + c], value);
    static_cast<T*>(a.out)[row * a.d + c] = from_float<T>(total == 0.0f ? 0.0f : value / total);
  }
  if (threadIdx.x == 0) {
    const int64_t token = row / a.heads, head = row % a.heads;
    a.lse[(token / a.sq * a.heads + head) * a.sq + token % a.sq] = lse_of<T>(top, total);
  }
}

namespace {

constexpr int kMostRows = 4;  // of a tile

int rows_of_tile(int rows) { return rows == 1 ? 1 : kMostRows; }

template <class T, int D, int R>
void cached(const AttentionCache& a, Place place) {
  const int64_t tiles = blocks_of(a.longest * a.group, R), blocks = tiles * a.sequences * (a.heads / a.group);
  launch(attention_cache_kernel<T, D, R>, grid_size(blocks * a.splits), kCacheThreads, 0, place.stream, a, int(tiles));
  const int64_t rows = int64_t(a.cu_q ? 1 : a.sequences) * a.sq * a.heads;
  if (a.splits > 1) launch(attention_cache_sum_kernel<T>, grid_size(rows), kCacheThreads, 0, place.stream, a);
}

template <class T, int D>
void cached(const AttentionCache& a, Place place) {
  rows_of_tile(a.longest * a.group) == 1 ? cached<T, D, 1>(a, place) : cached<T, D, kMostRows>(a, place);
}

template <class T>
void cached(AttentionCache& a, Place place) {
  for (Rows* x : {&a.q, &a.k, &a.v}) x->wide = is_wide(*x, a.d, sizeof(T));
  if (a.d <= 64) return cached<T, 64>(a, place);
  if (a.d <= 128) return cached<T, 128>(a, place);
  cached<T, 256>(a, place);
}

}  // namespace

void attention_cache(AttentionCache a, DType dtype, Place place) {
  if (a.sq == 0 || a.sequences == 0 || a.longest == 0) return;
  const OnDevice here(place.device);
  if (dtype == DType::f32) return cached<float>(a, place);
  dtype == DType::bf16 ? cached<__nv_bfloat16>(a, place) : cached<__half>(a, place);
}

int64_t attention_cache_splits(int sequences, int kv_heads, int rows, int sk, Place place) {
  const int64_t blocks = std::max<int64_t>(1, blocks_of(rows, rows_of_tile(rows)) * sequences * kv_heads);
  const int64_t wanted = 8 * int64_t(multiprocessors(place.device)) / blocks;
  return std::max<int64_t>(1, std::min<int64_t>({wanted, sk / 128, kMostSplits}));
}

}  // namespace fastlm::cuda
