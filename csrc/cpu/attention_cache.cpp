// attention of few queries against a cache, split over the keys (flash-decoding, Dao et al. 2023). The maths:
// fastlm/ops/attention.py.
//
// Memory bounds it: each key and value is used for the few rows of q that share its head. So a task is CHUNK keys of a
// sequence with all of their heads, which lie side by side in a cache (B, S_max, Hkv, D), and reads each of them once.
// It leaves the maximum, the sum and the sum of values of its keys; a second pass adds those of a sequence in order.
// CHUNK depends on nothing, so the bits do not depend on the number of threads.
#include <atomic>
#include <vector>

#include "attention_tile.h"
#include "math.h"
#include "parallel.h"

namespace fastlm::cpu {
namespace {

using Floats = std::unique_ptr<float[], Free>;

constexpr int64_t CHUNK = 64;       // keys of a task: 0.4 MB of a float32 cache with 12 heads of 64
constexpr int64_t BLOCK = 4;        // keys that are read together
constexpr int64_t WORTH = 1 << 15;  // elements of k that are worth a thread: 0.25 MB of k and v in float32
constexpr int64_t MOST_ROWS = 16;   // rows of q for each key head; the tiles of attention_fwd.cpp take more

struct Task {
  int64_t b, begin, end;  // keys [begin, end) of sequence b
};

// What a task leaves for each row of q: Σ p v, d floats, and its maximum and Σ p.
struct Parts {
  int64_t rows, d;  // rows of q for each task
  Floats values, max, sum;

  Parts(int64_t tasks, int64_t rows, int64_t d)
      : rows(rows),
        d(d),
        values(scratch<float>(tasks * rows * d)),
        max(scratch<float>(tasks * rows)),
        sum(scratch<float>(tasks * rows)) {}
};

// The bias of every head by relative position -far..far: element head (2 far + 1) + far + relative.
struct Bias {
  int64_t far, far_right;
  Floats by_head;

  explicit Bias(const Attention& a) : far(a.table ? a.starts[a.one_way - 1] : 0), far_right(a.bidirectional ? far : 0) {
    if (!a.table) return;
    by_head = scratch<float>(a.heads * (2 * far + 1));
    for (int64_t relative = -far; relative <= far_right; ++relative) {
      const float* row = a.table + bucket_of(a, relative) * a.heads;
      for (int64_t h = 0; h < a.heads; ++h) by_head[h * (2 * far + 1) + far + relative] = row[h];
    }
  }

  // For n keys, the first at a relative position.
  void write(int64_t head, int64_t relative, int64_t n, float* bias) const {
    const float* at = by_head.get() + head * (2 * far + 1) + far;
    for (int64_t j = 0; j < n; ++j) bias[j] = at[std::clamp(relative + j, -far, far_right)];
  }
};

// Eight numbers. The compiler's own vectors of a loop over d, whose length it does not know, are half as fast.
typedef float Lanes __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef float Quad __attribute__((vector_size(16)));

constexpr int64_t STEP = 16;  // elements of a row that are multiplied together

// Lays out STEP elements of q for `multiply`. Of bfloat16 that is the even ones, then the odd ones.
FASTLM_INLINE void arrange(const float* q, float* x) { std::copy_n(q, STEP, x); }
FASTLM_INLINE void arrange(const bfloat16* q, float* x) {
  for (int i = 0; i < 8; ++i) x[i] = load(q + 2 * i), x[8 + i] = load(q + 2 * i + 1);
}

FASTLM_INLINE void multiply(const float* q, const float* k, Lanes& sum0, Lanes& sum1) {
  Lanes x0, x1, y0, y1;
  std::memcpy(&x0, q, sizeof x0);
  std::memcpy(&x1, q + 8, sizeof x1);
  std::memcpy(&y0, k, sizeof y0);
  std::memcpy(&y1, k + 8, sizeof y1);
  sum0 += x0 * y0;
  sum1 += x1 * y1;
}
// A word of two bfloat16 becomes two floats without a shuffle: shifted, the even one; masked, the odd one.
FASTLM_INLINE void multiply(const float* q, const bfloat16* k, Lanes& sum0, Lanes& sum1) {
  Lanes x0, x1;
  Words words;
  std::memcpy(&x0, q, sizeof x0);
  std::memcpy(&x1, q + 8, sizeof x1);
  std::memcpy(&words, k, sizeof words);
  const Words even = words << 16, odd = words & 0xFFFF0000u;
  sum0 += x0 * (Lanes)even;
  sum1 += x1 * (Lanes)odd;
}

// sums (N, 4): products of a row of q with N keys, four parts of each.
template <int N, class T>
FASTLM_INLINE void dot_keys(const float* q, const T* k, int64_t stride, int64_t d, float* sums) {
  Lanes sum0[N] = {}, sum1[N] = {};
  const int64_t whole = d / STEP * STEP;
  for (int64_t c = 0; c < whole; c += STEP) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) multiply(q + c, k + n * stride + c, sum0[n], sum1[n]);
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const Lanes sum = sum0[n] + sum1[n];
    Quad half[2];
    std::memcpy(half, &sum, sizeof half);
    const Quad total = half[0] + half[1];
    std::memcpy(sums + 4 * n, &total, sizeof total);
    for (int64_t c = whole; c < d; ++c) sums[4 * n] += q[c] * load(k + n * stride + c);
  }
}

// y (n) = the sums of x (n, 4); n is a multiple of 4. The compiler turns the 4 x 4 blocks into shuffles.
FASTLM_CLONES void add_quads(const float* x, int64_t n, float* y) {
  for (int64_t j = 0; j < n; j += 4) {
    float t[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) t[c][i] = x[4 * (j + i) + c];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) y[j + i] = (t[0][i] + t[1][i]) + (t[2][i] + t[3][i]);
  }
}

// values += Σ p v over N keys, one after the other.
template <int N, class T>
FASTLM_INLINE void add_values(const float* p, const T* v, int64_t stride, int64_t d, float* values) {
#pragma omp simd
  for (int64_t c = 0; c < d; ++c) {
    float sum = values[c];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum += p[n] * load(v + n * stride + c);
    values[c] = sum;
  }
}

// The order in which blocks of keys and heads are visited: heads inside keys where a key's heads lie side by side.
struct Order {
  int64_t outer, inner;            // numbers of turns
  int64_t outer_keys, inner_keys;  // how far a turn moves
  int64_t outer_heads, inner_heads;

  Order(const Strides& stride, int64_t n, int64_t heads) {
    const bool keys_first = stride.head <= stride.row;
    outer = keys_first ? n / BLOCK : heads, inner = keys_first ? heads : n / BLOCK;
    outer_keys = keys_first ? BLOCK : 0, inner_keys = BLOCK - outer_keys;
    outer_heads = keys_first ? 0 : 1, inner_heads = 1 - outer_heads;
  }
};

// One head of the next block of keys, from memory to the cache. The processor's own prefetchers lose the thread where
// rows of a block are read in turn: with this a core reads as fast as a plain loop over the same bytes, float32, or at
// 0.87 of it, bfloat16; without it at 0.98 and 0.6 (LOG.md, 2026-11-30).
template <class T>
FASTLM_INLINE void prefetch(const T* x, int64_t stride, int64_t d) {
  for (int64_t n = BLOCK; n < 2 * BLOCK; ++n) {
    for (int64_t c = 0; c < d; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + n * stride + c);
  }
}

// scores (kv_heads, rows, CHUNK, 4) = q (kv_heads, rows, d) k (n, kv_heads, d)ᵀ, four parts of each score.
template <class T>
FASTLM_CLONES void score_keys(const T* k, const Strides& stride, const float* q, int64_t kv_heads, int64_t rows,
                              int64_t d, int64_t n, float* scores) {
  const Order order(stride, n, kv_heads);
  for (int64_t o = 0; o < order.outer; ++o) {
    for (int64_t i = 0; i < order.inner; ++i) {
      const int64_t j = o * order.outer_keys + i * order.inner_keys, h = o * order.outer_heads + i * order.inner_heads;
      const T* x = k + j * stride.row + h * stride.head;
      if (j + 2 * BLOCK <= n) prefetch(x, stride.row, d);
      for (int64_t r = h * rows; r < (h + 1) * rows; ++r) {
        dot_keys<BLOCK>(q + r * d, x, stride.row, d, scores + 4 * (r * CHUNK + j));
      }
    }
  }
  for (int64_t j = n / BLOCK * BLOCK; j < n; ++j) {
    for (int64_t r = 0; r < kv_heads * rows; ++r) {
      const T* x = k + j * stride.row + r / rows * stride.head;
      dot_keys<1>(q + r * d, x, stride.row, d, scores + 4 * (r * CHUNK + j));
    }
  }
}

// values (kv_heads, rows, d) = p (kv_heads, rows, CHUNK) v (n, kv_heads, d).
template <class T>
FASTLM_CLONES void sum_values(const T* v, const Strides& stride, const float* p, int64_t kv_heads, int64_t rows,
                              int64_t d, int64_t n, float* values) {
  std::fill_n(values, kv_heads * rows * d, 0.0f);
  const Order order(stride, n, kv_heads);
  for (int64_t o = 0; o < order.outer; ++o) {
    for (int64_t i = 0; i < order.inner; ++i) {
      const int64_t j = o * order.outer_keys + i * order.inner_keys, h = o * order.outer_heads + i * order.inner_heads;
      const T* x = v + j * stride.row + h * stride.head;
      if (j + 2 * BLOCK <= n) prefetch(x, stride.row, d);
      for (int64_t r = h * rows; r < (h + 1) * rows; ++r) {
        add_values<BLOCK>(p + r * CHUNK + j, x, stride.row, d, values + r * d);
      }
    }
  }
  for (int64_t j = n / BLOCK * BLOCK; j < n; ++j) {
    for (int64_t r = 0; r < kv_heads * rows; ++r) {
      add_values<1>(p + r * CHUNK + j, v + j * stride.row + r / rows * stride.head, stride.row, d, values + r * d);
    }
  }
}

// Turns the products of one row into exp(score - max), 0 outside of the keys [begin, end) that it sees.
FASTLM_CLONES void softmax_row(float* s, int64_t n, int64_t begin, int64_t end, float scale, float softcap,
                               const float* bias, float& max, float& sum) {
  float top = -INF, total = 0.0f;
  for (int64_t j = 0; j < begin; ++j) s[j] = 0.0f;
  for (int64_t j = end; j < n; ++j) s[j] = 0.0f;
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) s[j] *= scale;
  if (softcap > 0.0f) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) s[j] = softcap * fast_tanh(s[j] / softcap);
  }
  if (bias) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) s[j] += bias[j];
  }
#pragma omp simd reduction(max : top)
  for (int64_t j = begin; j < end; ++j) top = s[j] > top ? s[j] : top;
  const float shift = top == -INF ? 0.0f : top;  // all scores are -inf: exp(-inf - 0) = 0
#pragma omp simd reduction(+ : total)
  for (int64_t j = begin; j < end; ++j) {
    s[j] = fast_exp(s[j] - shift);
    total += s[j];
  }
  max = top, sum = total;
}

// One row's result from its `count` parts, which are `stride` rows apart.
template <class T>
FASTLM_CLONES void combine(const float* values, const float* max, const float* sum, int64_t count, int64_t stride,
                           int64_t d, float* total, T* out, float& lse) {
  float top = -INF, weight = 0.0f;
  for (int64_t t = 0; t < count; ++t) top = max[t * stride] > top ? max[t * stride] : top;
  std::fill_n(total, d, 0.0f);
  for (int64_t t = 0; t < count; ++t) {
    const float factor = sum[t * stride] == 0.0f ? 0.0f : fast_exp(max[t * stride] - top);
    weight += factor * sum[t * stride];
    const float* x = values + t * stride * d;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) total[c] += factor * x[c];
  }
  const float inverse = weight == 0.0f ? 0.0f : 1.0f / weight;
#pragma omp simd
  for (int64_t c = 0; c < d; ++c) store(out + c, total[c] * inverse);
  lse = weight == 0.0f ? -INF : top + std::log(weight);
}

// The buffers of one thread, for at most `rows` rows of q.
struct Scratch {
  Floats q, parts, p, bias;

  Scratch(int64_t rows, int64_t d)
      : q(scratch<float>(rows * d)),
        parts(scratch<float>(rows * CHUNK * 4)),
        p(scratch<float>(rows * CHUNK)),
        bias(scratch<float>(CHUNK)) {}
};

// Rows of q are ordered (key head, query, head of the group).
template <class T>
void run_task(const Attention& a, const Bias& bias, const Task& task, Scratch& x, float* values, float* max,
              float* sum) {
  const Sequence s(a, task.b);
  const int64_t group = a.heads / a.kv_heads, rows = s.sq * group, n = task.end - task.begin;
  const T* k = rows_of<T>(a.k, a.k_stride, s.b, nullptr, 0) + task.begin * a.k_stride.row;
  const T* v = rows_of<T>(a.v, a.v_stride, s.b, nullptr, 0) + task.begin * a.v_stride.row;
  for (int64_t r = 0; r < a.heads * s.sq; ++r) {
    const int64_t head = r / rows * group + r % group, i = r % rows / group;
    const T* q = rows_of<T>(a.q, a.q_stride, s.b, a.cu_q, head) + i * a.q_stride.row;
    float* row = x.q.get() + r * a.d;
    int64_t c = 0;
    for (; c + STEP <= a.d; c += STEP) arrange(q + c, row + c);
    for (; c < a.d; ++c) row[c] = load(q + c);
  }
  score_keys(k, a.k_stride, x.q.get(), a.kv_heads, rows, a.d, n, x.parts.get());
  for (int64_t r = 0; r < a.heads * s.sq; ++r) {
    const int64_t head = r / rows * group + r % group, i = r % rows / group;
    const int64_t begin = std::clamp<int64_t>(s.lo(a, i) - task.begin, 0, n);
    const int64_t end = std::clamp<int64_t>(s.hi(a, i, 1) - task.begin, begin, n);
    float* p = x.p.get() + r * CHUNK;
    add_quads(x.parts.get() + r * CHUNK * 4, round_up(n, 4), p);
    if (a.table) bias.write(head, task.begin - i - s.offset, n, x.bias.get());
    softmax_row(p, n, begin, end, a.scale, a.softcap, a.table ? x.bias.get() : nullptr, max[r], sum[r]);
  }
  sum_values(v, a.v_stride, x.p.get(), a.kv_heads, rows, a.d, n, values);
}

template <class T>
void decode(const Attention& a, int64_t max_sq, T* out, float* lse, int threads) {
  const int64_t rows = a.heads * max_sq;
  if (rows == 0 || a.batch == 0) return;
  std::vector<Task> tasks;
  std::vector<int64_t> first(a.batch + 1);
  int64_t keys = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const Sequence s(a, b);
    const int64_t lo = s.lo(a, 0), hi = s.sq ? s.hi(a, 0, s.sq) : lo;
    for (int64_t j = lo / CHUNK * CHUNK; j < hi; j += CHUNK) {
      tasks.push_back({b, std::max(j, lo), std::min(j + CHUNK, hi)});
    }
    keys += std::max<int64_t>(0, hi - lo);
    first[b + 1] = int64_t(tasks.size());
  }
  threads = int(std::clamp<int64_t>(keys * a.kv_heads * a.d / WORTH, 1, std::max(threads, 1)));
  const int64_t count = int64_t(tasks.size());
  const Parts parts(count, rows, a.d);
  const Bias bias(a);
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(threads, count), 1, threads, [&](int64_t, int64_t) {  // one piece per thread
    Scratch x(rows, a.d);
    for (int64_t t; (t = next++) < count;) {
      run_task<T>(a, bias, tasks[t], x, parts.values.get() + t * rows * a.d, parts.max.get() + t * rows,
                  parts.sum.get() + t * rows);
    }
  });
  parallel_for(a.batch * a.heads, 16, threads, [&](int64_t begin, int64_t end) {
    const Floats total = scratch<float>(a.d);
    for (int64_t item = begin; item < end; ++item) {
      const Sequence s(a, item / a.heads);
      const int64_t head = item % a.heads, group = a.heads / a.kv_heads;
      for (int64_t i = 0; i < s.sq; ++i) {
        const int64_t r = head / group * (s.sq * group) + i * group + head % group, at = first[s.b] * rows + r;
        float* row_lse = lse + s.b * a.lse_sequence + (a.cu_q ? s.row_q : 0) + head * a.lse_head + i;
        combine(parts.values.get() + at * a.d, parts.max.get() + at, parts.sum.get() + at, first[s.b + 1] - first[s.b],
                rows, a.d, total.get(), out + ((s.row_q + i) * a.heads + head) * a.d, *row_lse);
      }
    }
  });
}

}  // namespace

void attention_cache(const Attention& args, void* out, float* lse, DType dtype, int threads) {
  const int64_t max_sq = longest(args.cu_q, args.batch, args.sq);
  if (max_sq * (args.heads / args.kv_heads) > MOST_ROWS) {
    attention_fwd(args, out, lse, dtype, threads);
  } else if (dtype == DType::f32) {
    decode(args, max_sq, static_cast<float*>(out), lse, threads);
  } else {
    decode(args, max_sq, static_cast<bfloat16*>(out), lse, threads);
  }
}

}  // namespace fastlm::cpu
