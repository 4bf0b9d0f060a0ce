// attention, forward: the online softmax over tiles of scores. The maths: fastlm/ops/attention.py.
//
// A task is a sequence, a head and a run of query blocks. It converts the head's keys and values to float once, then
// goes through them for each block of queries. The output of a block stays transposed, (d, QUERIES), until it is
// complete.
#include <atomic>

#include "attention_units.h"

namespace fastlm::cpu {
namespace {

// The buffers of one thread. ld: a row of d floats, rounded up for gemm.
struct Scratch {
  Floats k, v, bias, q, qt, ot, scores;
  float max[QUERIES], sum[QUERIES], rescale[QUERIES];

  Scratch(int64_t max_sq, int64_t max_sk, int64_t ld)
      : k(scratch<float>(max_sk * ld)),
        v(scratch<float>(max_sk * ld)),
        bias(scratch<float>(max_sq + max_sk + QUERIES)),
        q(scratch<float>(QUERIES * ld)),
        qt(scratch<float>(ld * QUERIES)),
        ot(scratch<float>(ld * QUERIES)),
        scores(scratch<float>(KEYS * QUERIES)) {}
};

// Turns scores into exp(score - max) with the maximum so far, and adds them to `sum`. `rescale` is the factor for the
// sums of the earlier tiles. Returns whether any factor is not 1.
FASTLM_CLONES bool softmax_tile(float* scores, int64_t n, int64_t lanes, float* max, float* sum, float* rescale) {
  int changed = 0;
  for (int64_t l = 0; l < lanes; l += 16) {
    float* s = scores + l;
    float top[16], total[16];
#pragma omp simd
    for (int64_t i = 0; i < 16; ++i) top[i] = max[l + i];
    for (int64_t j = 0; j < n; ++j) {
#pragma omp simd
      for (int64_t i = 0; i < 16; ++i) top[i] = s[j * QUERIES + i] > top[i] ? s[j * QUERIES + i] : top[i];
    }
#pragma omp simd reduction(| : changed)
    for (int64_t i = 0; i < 16; ++i) {
      const float old = max[l + i];
      changed |= top[i] != old;
      max[l + i] = top[i];
      top[i] = top[i] == -INF ? 0.0f : top[i];  // a query that has seen no key yet: exp(-inf - 0) = 0
      rescale[l + i] = fast_exp(old - top[i]);
      total[i] = 0.0f;
    }
    for (int64_t j = 0; j < n; ++j) {
#pragma omp simd
      for (int64_t i = 0; i < 16; ++i) {
        const float e = fast_exp(s[j * QUERIES + i] - top[i]);
        s[j * QUERIES + i] = e;
        total[i] += e;
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < 16; ++i) sum[l + i] = sum[l + i] * rescale[l + i] + total[i];
  }
  return changed;
}

// x (d, QUERIES) times one factor per lane.
FASTLM_CLONES void scale_lanes(float* x, int64_t d, int64_t lanes, const float* factor) {
  for (int64_t c = 0; c < d; ++c) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) x[c * QUERIES + i] *= factor[i];
  }
}

// Sets to zero the dropped elements of keys [j0, j0 + n).
FASTLM_CLONES void drop_tile(float* scores, int64_t n, int64_t lanes, int64_t j0, int64_t i0, int64_t sequence_head,
                             Key key, uint32_t threshold) {
  Lanes words;
  for (int64_t j = j0; j < j0 + n; ++j) {
    if (j == j0 || j % 16 == 0) draw(j / 16, i0, sequence_head, key, lanes, words);
    const uint32_t* word = words.word[j % 16 / 4];
    float* row = scores + (j - j0) * QUERIES;
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) row[i] = kept(word[i], j, threshold) ? row[i] : 0.0f;
  }
}

template <class T>
void forward_task(const Attention& a, const Buckets& buckets, const Sequence& s, int64_t head, int64_t begin,
                  int64_t end, Key key, T* out, float* lse, Scratch& x) {
  const int64_t d = a.d, ld = round_up(d, kGemmLanes), kv_head = head / (a.heads / a.kv_heads);
  const T* q = rows_of<T>(a.q, a.q_stride, s.b, a.cu_q, head);
  const T* k = rows_of<T>(a.k, a.k_stride, s.b, a.cu_k, kv_head);
  const T* v = rows_of<T>(a.v, a.v_stride, s.b, a.cu_k, kv_head);
  const int64_t row = a.heads * d;
  out += s.row_q * row + head * d;
  lse += s.b * a.lse_sequence + (a.cu_q ? s.row_q : 0) + head * a.lse_head;
  const int64_t first = s.lo(a, begin), keys = std::max<int64_t>(0, s.hi(a, begin, end - begin) - first);
  const uint8_t* mask = s.mask ? s.mask + first : nullptr;
  load_rows(k + first * a.k_stride.row, a.k_stride.row, keys, d, 1.0f, mask, x.k.get(), ld, keys);
  load_rows(v + first * a.v_stride.row, a.v_stride.row, keys, d, 1.0f, mask, x.v.get(), ld, keys);
  if (a.table) expand_bias(a, buckets, s, head, x.bias.get());

  for (int64_t i0 = begin; i0 < end; i0 += QUERIES) {
    const int64_t count = std::min(QUERIES, end - i0), lanes = round_up(count, kGemmLanes);
    load_rows(q + i0 * a.q_stride.row, a.q_stride.row, count, d, 1.0f, nullptr, x.q.get(), ld, lanes);
    transpose(x.q.get(), ld, lanes, ld, x.qt.get(), QUERIES);
    std::fill_n(x.ot.get(), ld * QUERIES, 0.0f);
    std::fill_n(x.max, QUERIES, -INF);
    std::fill_n(x.sum, QUERIES, 0.0f);

    const int64_t lo = s.lo(a, i0), hi = s.hi(a, i0, count);
    for (int64_t j0 = lo; j0 < hi; j0 += KEYS) {
      const int64_t n = std::min(KEYS, hi - j0);
      float* scores = x.scores.get();
      score_tile(a, s, i0, count, lanes, j0, n, x.k.get() + (j0 - first) * ld, ld, x.qt.get(),
                 a.table ? x.bias.get() : nullptr, scores);
      const bool changed = softmax_tile(scores, n, lanes, x.max, x.sum, x.rescale);
      if (changed && j0 > lo) scale_lanes(x.ot.get(), d, lanes, x.rescale);
      if (a.dropout.threshold) {
        drop_tile(scores, n, lanes, j0, i0, s.b * a.heads + head, key, uint32_t(a.dropout.threshold));
      }
      gemm_add(A::transposed, d, lanes, n, x.v.get() + (j0 - first) * ld, ld, scores, QUERIES, x.ot.get(), QUERIES);
    }
    float* inverse = x.rescale;
    for (int64_t i = 0; i < lanes; ++i) inverse[i] = x.sum[i] == 0.0f ? 0.0f : a.dropout.scale / x.sum[i];
    scale_lanes(x.ot.get(), d, lanes, inverse);
    transpose(x.ot.get(), QUERIES, ld, lanes, x.q.get(), ld);
    write_rows(x.q.get(), ld, count, d, 1.0f, out + i0 * row, row);
    for (int64_t i = 0; i < count; ++i) lse[i0 + i] = x.sum[i] == 0.0f ? -INF : x.max[i] + std::log(x.sum[i]);
  }
}

// A thread's part in float: attention_units.h has the other one.
template <class T>
class FloatForward {
 public:
  FloatForward(const Attention& a, const Buckets& buckets, int64_t max_sq, int64_t max_sk)
      : a_(a), buckets_(buckets), scratch_(max_sq, max_sk, round_up(a.d, kGemmLanes)) {}
  void task(const Sequence& s, int64_t head, int64_t begin, int64_t end, Key key, T* out, float* lse) {
    forward_task(a_, buckets_, s, head, begin, end, key, out, lse, scratch_);
  }

 private:
  const Attention& a_;
  const Buckets& buckets_;
  Scratch scratch_;
};

template <class T, class Worker>
void forward(const Attention& a, void* out, float* lse, int threads) {
  const int64_t max_sq = longest(a.cu_q, a.batch, a.sq), max_sk = longest(a.cu_k, a.batch, a.sk);
  threads = worthwhile(a, threads);
  const int64_t blocks = round_up(max_sq, QUERIES) / QUERIES, heads = a.batch * a.heads;
  if (blocks == 0 || heads == 0) return;
  // If there are few heads, each is cut into runs of query blocks, about four tasks per thread. Runs change no bit.
  const int64_t runs = std::clamp<int64_t>((4 * threads + heads - 1) / heads, 1, blocks);
  const int64_t run = round_up(blocks, runs) / runs * QUERIES;
  const Key key = a.dropout.threshold ? dropout_key(a.dropout.rng, a.dropout.site) : Key{0, 0};
  const Buckets buckets(a, max_sq, max_sk);
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(threads, heads * runs), 1, threads, [&](int64_t, int64_t) {  // one piece per thread
    Worker worker(a, buckets, max_sq, max_sk);
    for (int64_t task; (task = next++) < heads * runs;) {
      const Sequence s(a, task / runs / a.heads);
      const int64_t begin = task % runs * run, end = std::min(begin + run, s.sq);
      if (begin < end) worker.task(s, task / runs % a.heads, begin, end, key, static_cast<T*>(out), lse);
    }
  });
}

}  // namespace

void attention_fwd(const Attention& args, void* out, float* lse, DType dtype, int threads) {
  const auto run = dtype == DType::f32 ? forward<float, FloatForward<float>>
                   : units()           ? forward<bfloat16, UnitForward>
                                       : forward<bfloat16, FloatForward<bfloat16>>;
  run(args, out, lse, threads);
}

}  // namespace fastlm::cpu
