// attention, backward: delta, the conversion of the bias table to relative positions and back, and the order of the
// launches. The two passes that take most of the time are in attention_dkdv.cu and attention_dq.cu. The maths:
// fastlm/ops/attention.py.
#include "attention_tile.cuh"

namespace fastlm::cuda {

// ---- delta = dout·out - dlse

// Lanes per row. float32 has one, which sums in the order of the products dout·v: if out equals one v, ds is exactly 0.
template <class T>
constexpr int kDeltaLanes = sizeof(T) == 4 ? 1 : 8;
constexpr int kDeltaThreads = 128;

template <class T>
__global__ void __launch_bounds__(kDeltaThreads, 8) attention_delta_kernel(const AttentionBackward f) {
  constexpr int V = kVector<T>, kLanes = kDeltaLanes<T>, kRows = kDeltaThreads / kLanes;
  const Attention& a = f.attention;
  const int blocks = (a.sq + kRows - 1) / kRows, head = blockIdx.x / blocks % a.heads;
  const int row = blockIdx.x % blocks * kRows + threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t b = blockIdx.x / blocks / a.heads, at = (b * a.heads + head) * a.sq + row;
  float sum = 0.0f;
  if (row < a.sq) {
    const Slice<T> dout(f.dout, b, head);
    const T* x = dout.data + row * dout.stride;
    const T* y = static_cast<const T*>(f.out) + ((b * a.sq + row) * a.heads + head) * a.d;
    for (int first = 0; first < a.d; first += 64) {  // product_float's parts
      float part = 0.0f;
      for (int col = first + lane * V; col < min(first + 64, a.d); col += kLanes * V) {
        if (dout.wide && f.wide) {
          float u[V], v[V];
          load(x + col, u);
          load(y + col, v);
#pragma unroll
          for (int k = 0; k < V; ++k) part = fmaf(u[k], v[k], part);
        } else {
          for (int k = 0; k < V && col + k < a.d; ++k) part = fmaf(to_float(x[col + k]), to_float(y[col + k]), part);
        }
      }
      sum += part;
    }
  }
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
  if (row >= a.sq || lane > 0) return;
  f.delta[at] = sum - (f.dlse ? f.dlse[at] : 0.0f);
  if (f.sequence && head == 0) f.sequence[row] = find_sequence(a.cu_q, row, 0, a.sequences - 1);
}

template <class T>
static void delta(const AttentionBackward& f, Place place) {
  const Attention& a = f.attention;
  const int64_t blocks = blocks_of(a.sq, kDeltaThreads / kDeltaLanes<T>) * a.heads * (a.cu_q ? 1 : a.sequences);
  launch(attention_delta_kernel<T>, grid_size(blocks), kDeltaThreads, 0, place.stream, f);
}

// Declared in sm90/attention.h, whose backward calls it too.
void attention_delta(AttentionBackward& f, DType dtype, Place place) {
  Attention& a = f.attention;
  const size_t item = dtype == DType::f32 ? 4 : 2;
  for (Rows* x : {&a.q, &a.k, &a.v, &f.dout}) x->wide = is_wide(*x, a.d, item);
  f.wide = a.d * item % 16 == 0;
  for (const void* x : {f.out, (const void*)f.dq, (const void*)f.dk, (const void*)f.dv})
    f.wide = f.wide && is_wide(x, 0, item);
  if (dtype == DType::f32) {
    delta<float>(f, place);
  } else {
    dtype == DType::bf16 ? delta<__nv_bfloat16>(f, place) : delta<__half>(f, place);
  }
}

void attention_bwd(AttentionBackward f, DType dtype, Place place) {
  const OnDevice here(place.device);
  attention_delta(f, dtype, place);
  if (f.attention.sk > 0) attention_dkdv(f, dtype, place);
  attention_dq(f, dtype, place);
}

// ---- the bias table
//
// The buckets of one direction cover consecutive ranges of distances. A launch takes at most kMost of them, in its
// parameters.

struct Buckets {
  static constexpr int kMost = 64;
  int first, count, one_way, far;
  bool bidirectional;
  int start[kMost + 1];  // the distances of bucket first + i are those from start[i] to start[i + 1]
};

template <class F>
static void for_buckets(const std::vector<int>& starts, bool bidirectional, F f) {
  const int one_way = int(starts.size()), far = starts.back();
  for (int first = 0; first < one_way; first += Buckets::kMost) {
    Buckets part{first, std::min(Buckets::kMost, one_way - first), one_way, far, bidirectional, {}};
    for (int i = 0; i <= part.count; ++i) part.start[i] = first + i < one_way ? starts[first + i] : far + 1;
    f(part);
  }
}

constexpr int kTableThreads = 128;

// bias (heads, 2 far + 1) = unit times table (buckets, heads), for the buckets of `part`.
__global__ void attention_bias_kernel(const float* table, float* bias, int heads, float unit, const Buckets part) {
  const int i = blockIdx.x * kTableThreads + threadIdx.x, head = blockIdx.y, rel = i - part.far;
  const int distance = part.bidirectional ? abs(rel) : max(-rel, 0);
  if (i > 2 * part.far || distance < part.start[0] || distance >= part.start[part.count]) return;
  int k = 0;
  while (distance >= part.start[k + 1]) ++k;
  const int bucket = part.first + k + (part.bidirectional && rel > 0 ? part.one_way : 0);
  bias[int64_t(head) * (2 * part.far + 1) + i] = unit * table[int64_t(bucket) * heads + head];
}

void attention_bias(const float* table, float* bias, const std::vector<int>& starts, int heads, bool bidirectional,
                    DType dtype, Place place) {
  const OnDevice here(place.device);
  const float unit = dtype == DType::f32 ? kUnit<float> : kUnit<__half>;
  for_buckets(starts, bidirectional, [&](const Buckets& part) {
    const dim3 grid(unsigned(blocks_of(2 * part.far + 1, kTableThreads)), unsigned(heads));
    launch(attention_bias_kernel, grid, kTableThreads, 0, place.stream, table, bias, heads, unit, part);
  });
}

// dtable (buckets, heads) = the sums of partial (tiles, heads, width) over the relative positions of each bucket. A
// block sums one bucket of one direction and one head.
__global__ void attention_dtable_kernel(const float* partial, float* dtable, int64_t tiles, int heads, int width,
                                        const Buckets part) {
  __shared__ float buffer[32];
  const int k = blockIdx.x % part.count, head = blockIdx.y;
  const bool after = blockIdx.x >= part.count;
  // The positions' columns in a row of partial sums, which starts at -far.
  int from = part.far + (after ? max(part.start[k], 1) : 1 - part.start[k + 1]);
  int count = part.start[k + 1] - (after ? max(part.start[k], 1) : part.start[k]);
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < tiles * count; i += kTableThreads)
    sum += partial[(i / count * heads + head) * width + from + i % count];
  sum = row_sum<kTableThreads>(sum, buffer);
  if (threadIdx.x == 0) dtable[int64_t(part.first + k + (after ? part.one_way : 0)) * heads + head] = sum;
}

void attention_dtable(const float* partial, float* dtable, int64_t tiles, const std::vector<int>& starts, int heads,
                      bool bidirectional, Place place) {
  const OnDevice here(place.device);
  for_buckets(starts, bidirectional, [&](const Buckets& part) {
    const dim3 grid(unsigned(part.count * (bidirectional ? 2 : 1)), unsigned(heads));
    launch(attention_dtable_kernel, grid, kTableThreads, 0, place.stream, partial, dtable, tiles, heads,
           (bidirectional ? 2 : 1) * part.far + 1, part);
  });
}

}  // namespace fastlm::cuda
