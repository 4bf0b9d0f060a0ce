// attention, backward, the gradients of keys and values: a block computes a tile of keys of one key head and goes
// through the queries of all heads that share it. The maths: fastlm/ops/attention.py.
//
// Keys are the rows: the products give pᵀ and dsᵀ as the left sides of dv = pᵀ do and dk = dsᵀ q, and the probabilities
// stay in a warp's registers. They are computed again from lse. No two blocks add to the same element, so every run
// gives the same bits. With dq in a separate pass, that takes seven products; atomic additions would need five.
#include "attention_dropout.cuh"

namespace fastlm::cuda {

// SPLIT warps share the same rows. Each has a part of the gradients' columns; each computes all scores.
template <class T, int D>
struct KeysShape : Shape<D <= 64 ? 2 : 1, D <= 128 ? 4 : 2, D <= 64 ? 4 : 8, 2, D <= 64 ? 2 : 1> {};
template <int D>
struct KeysShape<float, D> : Shape<1, D <= 64 ? 4 : 2, 4, D <= 128 ? 2 : 1, 2> {};

template <class T, int D>
struct KeysShared {
  using S = KeysShape<T, D>;
  static constexpr int SPLIT = D <= 128 ? 1 : 2, M = S::M / SPLIT, STAGES = S::STAGES;
  T k[M * D], v[M * D], q[STAGES][S::N * D], dout[STAGES][S::N * D];
  float lse[STAGES][S::N], delta[STAGES][S::N];
  RowSight<M> sight;
  Plan plan;  // in shared memory, to save registers
  Bytes bytes;
};

template <class T, int D, bool EXTRAS>
__global__ void __launch_bounds__(KeysShape<T, D>::THREADS, KeysShape<T, D>::BLOCKS)
    attention_dkdv_kernel(const AttentionBackward f) {
  using S = KeysShape<T, D>;
  using Shared = KeysShared<T, D>;
  constexpr int MT = S::MT, NT = S::NT, M = Shared::M, N = S::N, DT = D / 8 / Shared::SPLIT;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const Attention& a = f.attention;
  const bool drops = EXTRAS && a.dropout.threshold, biased = EXTRAS && a.bias, capped = EXTRAS && a.softcap > 0.0f;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int warp_row = warp / Shared::SPLIT * 16 * MT;
  const int chunk0 = warp % Shared::SPLIT * (Tile<T, D>::kChunks / Shared::SPLIT);

  const int tiles = (a.sk + M - 1) / M, kv_heads = a.heads / a.group, kv_head = blockIdx.x / tiles % kv_heads;
  const int64_t b = blockIdx.x / tiles / kv_heads;
  const int row0 = blockIdx.x % tiles * M, last_row = min(row0 + M, a.sk) - 1;
  const uint8_t* mask = a.key_mask ? a.key_mask + b * a.sk : nullptr;
  load_rows<T, D, M, S::THREADS>(shared.k, Slice<T>(a.k, b, kv_head), row0, last_row + 1, mask, a.d);
  load_rows<T, D, M, S::THREADS>(shared.v, Slice<T>(a.v, b, kv_head), row0, last_row + 1, mask, a.d);

  const Sight sight{{a.cu_k, a.sk}, {a.cu_q, a.sq}, a.right, a.left, a.far_right, a.far, 0, a.sq};
  // A masked key affects only its row, which is set to 0 at the end. Without a real key there is nothing to do.
  const int own = row0 + threadIdx.x;
  const bool real = __syncthreads_or(!mask || (threadIdx.x < M && own <= last_row && mask[own]));
  if (threadIdx.x == 0) {
    shared.plan = make_plan<N>(sight, a.sequences, row0, last_row, true, biased);
    if (!real) shared.plan.count = 0;
    if (drops) shared.bytes = Bytes(a.dropout);
  }
  __syncthreads();
  const Plan& plan = shared.plan;
  if (threadIdx.x < M) {
    const int row = min(own, last_row);
    shared.sight.set(threadIdx.x, sight, row, a.cu_k ? find_sequence(a.cu_k, row, plan.first, plan.last) : 0);
  }

  const int count = plan.count * a.group;
  auto fetch = [&](int stage, int head, int at) {
    const int col0 = plan.column(at, N);
    load_rows<T, D, N, S::THREADS>(shared.q[stage], Slice<T>(a.q, b, head), col0, plan.hi, nullptr, a.d);
    load_rows<T, D, N, S::THREADS>(shared.dout[stage], Slice<T>(f.dout, b, head), col0, plan.hi, nullptr, a.d);
    for (int i = threadIdx.x; i < 2 * N; i += S::THREADS) {
      const float* from = i < N ? f.lse : f.delta;
      const int col = col0 + i % N;
      copy_async4((i < N ? shared.lse : shared.delta)[stage] + i % N,
                  from + (col < plan.hi ? (b * a.heads + head) * a.sq + col : 0), col < plan.hi ? 4 : 0);
    }
  };
  if (count > 0) fetch(0, kv_head * a.group, 0);
  copies_arrive();
  __syncthreads();

  if (sizeof(T) == 4 && drops) {  // as in dq, v includes dropout's scale
    for (int i = threadIdx.x; i < M * D; i += S::THREADS)
      shared.v[i] = from_float<T>(to_float(shared.v[i]) * a.dropout.scale);
    __syncthreads();
  }
  const Left<T, D, MT, false> k(shared.k + warp_row * D), v(shared.v + warp_row * D);
  float dk[MT][DT][4], dv[MT][DT][4];
  clear(dk);
  clear(dv);

  int head = kv_head * a.group, at = 0, next_head = head, next = 0;
  for (int step = 0; step < count; ++step, head = next_head, at = next) {
    const int stage = step % S::STAGES;
    if (step > 0) next_stage<S::STAGES>([&] { fetch(stage, head, at); });
    next = at + 1 < plan.count ? at + 1 : 0;
    next_head = head + (next == 0);
    if (S::STAGES > 1 && step + 1 < count) fetch((step + 1) % S::STAGES, next_head, next);
    const int col0 = plan.column(at, N);
    const bool plain = at < plan.plain();
    const float* bias = biased ? a.bias + int64_t(head) * (2 * a.far + 1) : nullptr;
    float s[MT][NT][4], dp[MT][NT][4], factor = a.scale * kUnit<T>, shift = 0.0f;
    product(s, k, shared.q[stage]);
    if (capped) factor = cap_scores<T>(s, factor, a.softcap);
    if (!plain) {
      const RealColumns<NT> columns(nullptr, col0, plan.hi);
      factor = finish_scores(s, factor, shared.sight, warp_row, col0, columns, bias, a.far, -1);
    } else if (biased) {  // before a key's diagonal, keys are after the query
      shift = bias[plan.before(at) ? 2 * a.far : 0];
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float lse = shared.lse[stage][8 * n + 2 * t + e];
        const float less = lse == -kInf ? 0.0f : fmaf(-kUnit<T>, lse, shift);  // a query without keys
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) s[m][n][2 * h + e] = power<T>(fmaf(s[m][n][2 * h + e], factor, less));
        }
      }
    }
    KeptQueries<MT, NT> stays;
    if (drops) {  // before dp is computed, since a draw takes registers
      stays.draw(shared.bytes, a.cu_q, [&](int i) {
        const int query = col0 + i;
        if (!a.cu_q) return Draw{row0 + warp_row, query, int(b) * a.heads + head};
        const int of = plain ? plan.first : query < plan.hi ? f.sequence[query] : plan.last;
        return Draw{row0 + warp_row - a.cu_k[of], query - a.cu_q[of], of * a.heads + head};
      });
    }
    product(dp, v, shared.dout[stage]);
    if (drops) {
      float kept[MT][NT][4];
      each<MT, NT>([&](int m, int n, int e) {
        kept[m][n][e] = stays.has(m, n, e) ? s[m][n][e] : 0.0f;
        dp[m][n][e] = stays.has(m, n, e) ? dp[m][n][e] * (sizeof(T) == 4 ? 1.0f : a.dropout.scale) : 0.0f;
      });
      accumulate<T, D>(dv, kept, shared.dout[stage], chunk0);
    } else {
      accumulate<T, D>(dv, s, shared.dout[stage], chunk0);
    }
    const float* delta = shared.delta[stage];
    each<MT, NT>([&](int m, int n, int e) {
      const int col = 8 * n + 2 * t + e % 2;
      float ds = s[m][n][e] * (dp[m][n][e] - delta[col]);
      // The capped score, from p: kept in registers, it would spill. Where p is 0, so is ds.
      if (capped) ds *= cap_slope(logarithm<T>(s[m][n][e]) + kUnit<T> * shared.lse[stage][col], a.softcap * kUnit<T>);
      s[m][n][e] = ds;
    });
    accumulate<T, D>(dk, s, shared.q[stage], chunk0);
  }

  float factor_k[MT][2], factor_v[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + warp_row + 16 * m + 8 * h + g;
      const bool is_real = !mask || (row <= last_row && mask[row]);
      const bool lost = row < plan.known.lo || row >= plan.known.hi;  // a key of no sequence
      factor_k[m][h] = lost ? kNaN : a.scale;
      factor_v[m][h] = lost ? kNaN : drops ? a.dropout.scale : 1.0f;
#pragma unroll
      for (int n = 0; n < DT; ++n) {  // not by a factor of 0: 0 times infinity is NaN
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!is_real) dk[m][n][2 * h + e] = dv[m][n][2 * h + e] = 0.0f;
        }
      }
    }
  }
  __syncthreads();  // warps that share rows have finished with them
  const int first = row0 + warp_row;
  const int64_t stride = int64_t(f.parts) * kv_heads * a.d;
  const int64_t offset = (b * a.sk + first) * stride + int64_t(kv_head) * a.d;
  store_rows<T, D>(static_cast<T*>(f.dk) + offset, stride, last_row + 1 - first, a.d, f.wide, dk, factor_k,
                   shared.k + warp_row * D, chunk0);
  store_rows<T, D>(static_cast<T*>(f.dv) + offset, stride, last_row + 1 - first, a.d, f.wide, dv, factor_v,
                   shared.v + warp_row * D, chunk0);
}

namespace {

template <class T, int D, bool EXTRAS>
void run(const AttentionBackward& f, Place place) {
  using Shared = KeysShared<T, D>;
  static_assert(sizeof(Shared) <= kMostShared);
  const Attention& a = f.attention;
  const int64_t batch = a.cu_q ? 1 : a.sequences;
  launch(attention_dkdv_kernel<T, D, EXTRAS>, grid_size(blocks_of(a.sk, Shared::M) * (a.heads / a.group) * batch),
         KeysShape<T, D>::THREADS, sizeof(Shared), place.stream, f);
}

}  // namespace

void attention_dkdv(const AttentionBackward& f, DType dtype, Place place) {
  choose(f.attention, dtype, [&](auto type, auto d, auto extras) {
    run<decltype(type), decltype(d)::value, decltype(extras)::value>(f, place);
  });
}

}  // namespace fastlm::cuda
