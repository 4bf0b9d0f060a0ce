// attention, backward: the probabilities are computed again from lse. The maths: fastlm/ops/attention.py.
//
// A task is a sequence and a query head. Five products give all three gradients, and no two tasks write to the same
// element. A task goes through its query blocks and sums dk and dv of its head in float. Heads that share keys and
// values write partials, which are summed in the order of the heads. The bias table's gradient is summed over the
// sequences in the same way.
#include "attention_bwd.h"

#include <atomic>

#include "attention_units.h"

namespace fastlm::cpu {
namespace {

// The buffers of one thread. ld: a row of d floats, rounded up for gemm.
struct Scratch {
  Floats k, v, dk, dv, bias, dbias, q, qt, dout, dout_t, out_t, dq, scores, dscores, slope;
  float lse[QUERIES], delta[QUERIES];

  Scratch(int64_t max_sq, int64_t max_sk, int64_t ld)
      : k(scratch<float>(max_sk * ld)),
        v(scratch<float>(max_sk * ld)),
        dk(scratch<float>(max_sk * ld)),
        dv(scratch<float>(max_sk * ld)),
        bias(scratch<float>(max_sq + max_sk + QUERIES)),
        dbias(scratch<float>(max_sq + max_sk + QUERIES)),
        q(scratch<float>(QUERIES * ld)),
        qt(scratch<float>(ld * QUERIES)),
        dout(scratch<float>(QUERIES * ld)),
        dout_t(scratch<float>(ld * QUERIES)),
        out_t(scratch<float>(ld * QUERIES)),
        dq(scratch<float>(QUERIES * ld)),
        scores(scratch<float>(KEYS * QUERIES)),
        dscores(scratch<float>(KEYS * QUERIES)),
        slope(scratch<float>(KEYS * QUERIES)) {}
};

// delta_i = dout_i·out_i - dlse_i, summed in gemm's order. If out is close to one v, delta then has the same rounding
// as dout·v, and ds = p (dout·v - delta) is as small as it should be. lse_out: 0 for a query without keys, whose scores
// are -inf.
FASTLM_CLONES void query_sums(const float* dout_t, const float* out_t, int64_t count, int64_t d, const float* lse,
                              const float* dlse, float* lse_out, float* delta) {
  std::fill_n(delta, QUERIES, 0.0f);
  for (int64_t c = 0; c < d; ++c) {
#pragma omp simd
    for (int64_t i = 0; i < QUERIES; ++i) delta[i] += dout_t[c * QUERIES + i] * out_t[c * QUERIES + i];
  }
  for (int64_t i = 0; i < QUERIES; ++i) {
    const bool keys = i < count && lse[i] != -INF;
    if (dlse && keys) delta[i] -= dlse[i];
    lse_out[i] = keys ? lse[i] : 0.0f;
  }
}

// From scores s and dout·v: scores becomes z p, dscores becomes ds = p (z dout·v - delta), p = exp(s - lse).
// z is 0 or 1; dropout's scale is in dout.
template <bool DROPOUT>
FASTLM_INLINE void gradient_row(float* scores, float* dscores, int64_t lanes, const float* lse, const float* delta,
                                const uint32_t* word, int64_t key, uint32_t threshold) {
#pragma omp simd
  for (int64_t i = 0; i < lanes; ++i) {
    const float p = fast_exp(scores[i] - lse[i]);
    const bool keep = !DROPOUT || kept(word[i], key, threshold);
    scores[i] = keep ? p : 0.0f;
    dscores[i] = p * ((keep ? dscores[i] : 0.0f) - delta[i]);
  }
}

FASTLM_CLONES void gradient_tile(float* scores, float* dscores, int64_t n, int64_t lanes, int64_t j0, int64_t i0,
                                 const float* lse, const float* delta, int64_t sequence_head, Key key,
                                 uint32_t threshold) {
  Lanes words;
  for (int64_t j = j0; j < j0 + n; ++j) {
    float *s = scores + (j - j0) * QUERIES, *ds = dscores + (j - j0) * QUERIES;
    if (threshold == 0) {
      gradient_row<false>(s, ds, lanes, lse, delta, nullptr, j, 0);
    } else {
      if (j == j0 || j % 16 == 0) draw(j / 16, i0, sequence_head, key, lanes, words);
      gradient_row<true>(s, ds, lanes, lse, delta, words.word[j % 16 / 4], j, threshold);
    }
  }
}

// dscores times the derivative of the softcap.
FASTLM_CLONES void multiply(float* dscores, const float* slope, int64_t n, int64_t lanes) {
  for (int64_t j = 0; j < n; ++j) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) dscores[j * QUERIES + i] *= slope[j * QUERIES + i];
  }
}

// dbias, by relative position as in expand_bias; its rows overlap from key to key.
FASTLM_CLONES void add_dbias(const float* dscores, int64_t n, int64_t count, float* dbias) {
  for (int64_t j = 0; j < n; ++j) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) dbias[i - j] += dscores[j * QUERIES + i];
  }
}

// dst (rows, kv_heads, d) = partial (rows, kv_heads, group, d) summed over the group.
template <class T>
FASTLM_CLONES void sum_group(const float* partial, int64_t begin, int64_t end, int64_t group, int64_t d, T* dst) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < d; ++c) {
      float sum = 0.0f;
      for (int64_t g = 0; g < group; ++g) sum += partial[(r * group + g) * d + c];
      store(dst + r * d + c, sum);
    }
  }
}

template <class T>
void backward_task(const Attention& a, const Buckets& buckets, const AttentionBackward& g, const Sequence& s,
                   int64_t head, Key key, Scratch& x) {
  const int64_t d = a.d, ld = round_up(d, kGemmLanes), group = a.heads / a.kv_heads, kv_head = head / group;
  const T* q = rows_of<T>(a.q, a.q_stride, s.b, a.cu_q, head);
  const T* k = rows_of<T>(a.k, a.k_stride, s.b, a.cu_k, kv_head);
  const T* v = rows_of<T>(a.v, a.v_stride, s.b, a.cu_k, kv_head);
  const T* dout = rows_of<T>(g.dout, g.dout_stride, s.b, a.cu_q, head);
  const int64_t row = a.heads * d, at = s.row_q * row + head * d;
  const T* out = static_cast<const T*>(g.out) + at;
  T* dq = static_cast<T*>(g.dq) + at;
  const float unscale = a.dropout.scale > 0.0f ? 1.0f / a.dropout.scale : 0.0f;  // out includes the scale; dout will
  const int64_t lse_at = s.b * a.lse_sequence + (a.cu_q ? s.row_q : 0) + head * a.lse_head;

  const int64_t keys = s.last - s.first;
  const uint8_t* mask = s.mask ? s.mask + s.first : nullptr;
  load_rows(k + s.first * a.k_stride.row, a.k_stride.row, keys, d, 1.0f, mask, x.k.get() + s.first * ld, ld, keys);
  load_rows(v + s.first * a.v_stride.row, a.v_stride.row, keys, d, 1.0f, mask, x.v.get() + s.first * ld, ld, keys);
  std::fill_n(x.dk.get(), s.sk * ld, 0.0f);
  std::fill_n(x.dv.get(), s.sk * ld, 0.0f);
  if (a.table) expand_bias(a, buckets, s, head, x.bias.get());
  if (g.dtable) std::fill_n(x.dbias.get(), bias_size(s), 0.0f);

  for (int64_t i0 = 0; i0 < s.sq; i0 += QUERIES) {
    const int64_t count = std::min(QUERIES, s.sq - i0), lanes = round_up(count, kGemmLanes);
    load_rows(q + i0 * a.q_stride.row, a.q_stride.row, count, d, 1.0f, nullptr, x.q.get(), ld, lanes);
    load_rows(dout + i0 * g.dout_stride.row, g.dout_stride.row, count, d, a.dropout.scale, nullptr, x.dout.get(), ld,
              lanes);
    transpose(x.q.get(), ld, lanes, ld, x.qt.get(), QUERIES);
    transpose(x.dout.get(), ld, lanes, ld, x.dout_t.get(), QUERIES);
    // dq holds out here; it is not in use yet.
    load_rows(out + i0 * row, row, count, d, unscale, nullptr, x.dq.get(), ld, lanes);
    transpose(x.dq.get(), ld, lanes, ld, x.out_t.get(), QUERIES);
    query_sums(x.dout_t.get(), x.out_t.get(), count, d, g.lse + lse_at + i0, g.dlse ? g.dlse + lse_at + i0 : nullptr,
               x.lse, x.delta);
    std::fill_n(x.dq.get(), QUERIES * ld, 0.0f);

    const int64_t lo = s.lo(a, i0), hi = s.hi(a, i0, count);
    for (int64_t j0 = lo; j0 < hi; j0 += KEYS) {
      const int64_t n = std::min(KEYS, hi - j0);
      float *p = x.scores.get(), *ds = x.dscores.get();
      score_tile(a, s, i0, count, lanes, j0, n, x.k.get() + j0 * ld, ld, x.qt.get(), a.table ? x.bias.get() : nullptr,
                 p, x.slope.get());
      gemm(A::plain, n, lanes, d, 1.0f, x.v.get() + j0 * ld, ld, x.dout_t.get(), QUERIES, ds, QUERIES);
      gradient_tile(p, ds, n, lanes, j0, i0, x.lse, x.delta, s.b * a.heads + head, key, uint32_t(a.dropout.threshold));
      if (g.dtable) add_dbias(ds, n, count, x.dbias.get() + i0 - j0 + s.sk - 1);
      if (a.softcap > 0.0f) multiply(ds, x.slope.get(), n, lanes);
      gemm_add(A::plain, n, ld, count, p, QUERIES, x.dout.get(), ld, x.dv.get() + j0 * ld, ld);
      gemm_add(A::plain, n, ld, count, ds, QUERIES, x.q.get(), ld, x.dk.get() + j0 * ld, ld);
      gemm_add(A::transposed, count, ld, n, ds, QUERIES, x.k.get() + j0 * ld, ld, x.dq.get(), ld);
    }
    write_rows(x.dq.get(), ld, count, d, a.scale, dq + i0 * row, row);
  }

  const auto write = [&](const float* from, float scale, T* to) { write_rows(from, ld, s.sk, d, scale, to, row); };
  write_key_gradients<T>(a, g, s, head, {x.dk.get(), x.dv.get(), ld, 1.0f}, write);
  if (g.dtable) add_table(a, buckets, g, s, head, x.dbias.get());
}

// A thread's part in float: attention_units.h has the other one.
template <class T>
class FloatBackward {
 public:
  FloatBackward(const Attention& a, const Buckets& buckets, int64_t max_sq, int64_t max_sk, int64_t)
      : a_(a), buckets_(buckets), scratch_(max_sq, max_sk, round_up(a.d, kGemmLanes)) {}
  void task(const AttentionBackward& g, const Sequence& s, int64_t head, Key key) {
    backward_task<T>(a_, buckets_, g, s, head, key, scratch_);
  }

 private:
  const Attention& a_;
  const Buckets& buckets_;
  Scratch scratch_;
};

template <class T, class Worker>
void backward(const Attention& a, const AttentionBackward& g, int threads) {
  const int64_t max_sq = longest(a.cu_q, a.batch, a.sq), max_sk = longest(a.cu_k, a.batch, a.sk);
  threads = worthwhile(a, threads);
  const int64_t tasks = a.batch * a.heads;
  const Key key = a.dropout.threshold ? dropout_key(a.dropout.rng, a.dropout.site) : Key{0, 0};
  const Buckets buckets(a, max_sq, max_sk);
  std::atomic<int64_t> next{0};
  const int64_t pieces = std::min<int64_t>(threads, tasks);
  parallel_for(pieces, 1, threads, [&](int64_t, int64_t) {  // one piece per thread
    Worker worker(a, buckets, max_sq, max_sk, pieces);
    for (int64_t task; (task = next++) < tasks;) {
      worker.task(g, Sequence(a, task / a.heads), task % a.heads, key);
    }
  });

  if (a.kv_heads < a.heads) {
    const int64_t group = a.heads / a.kv_heads, rows = a.rows_k() * a.kv_heads;
    parallel_for(rows, 1024, threads, [&](int64_t begin, int64_t end) {
      sum_group(g.partial, begin, end, group, a.d, static_cast<T*>(g.dk));
      sum_group(g.partial + rows * group * a.d, begin, end, group, a.d, static_cast<T*>(g.dv));
    });
  }
  if (g.dtable) {
    const int64_t size = a.buckets() * a.heads;
    std::fill_n(g.dtable, size, 0.0f);
    for (int64_t b = 0; b < a.batch; ++b) {
      for (int64_t i = 0; i < size; ++i) g.dtable[i] += g.dtable_partial[b * size + i];
    }
  }
}

}  // namespace

void attention_bwd(const Attention& args, const AttentionBackward& grads, DType dtype, int threads) {
  const auto run = dtype == DType::f32 ? backward<float, FloatBackward<float>>
                   : units()           ? backward<bfloat16, UnitBackward>
                                       : backward<bfloat16, FloatBackward<bfloat16>>;
  run(args, grads, threads);
}

}  // namespace fastlm::cpu
