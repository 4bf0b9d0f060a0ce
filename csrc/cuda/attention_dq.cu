// attention, backward, the gradients of queries and of the bias table: a block computes a tile of queries of one head
// and goes through blocks of keys, as in forward. The maths: fastlm/ops/attention.py.
//
// The gradient of the table is summed by relative position first. Far from the diagonal all positions are in one
// bucket, and each thread sums its elements of ds. Near the diagonal, a block of ds is written to shared memory; each
// thread then sums the elements of one relative position, in order. A tile gives a partial sum; attention_dtable sums
// those by bucket.
#include <cstddef>

#include "attention_dropout.cuh"

namespace fastlm::cuda {

template <class T, int D>
struct QueriesShape : Shape<D <= 64 ? 2 : 1, D <= 128 ? 4 : 2, D <= 128 ? 4 : 2, 2, D == 128 ? 3 : 2> {};
template <int D>
struct QueriesShape<float, D> : Shape<1, D <= 64 ? 4 : 2, D <= 64 ? 4 : 2, D <= 128 ? 2 : 1, 2> {};

template <class T, int D>
struct QueriesShared {
  using S = QueriesShape<T, D>;
  T q[S::M * D], dout[S::M * D], k[S::STAGES][S::N * D], v[S::STAGES][S::N * D];
  RowSight<S::M> sight;
  RowDropout<S::M> dropout;
  Plan plan;  // in shared memory, to save registers
  Bytes bytes;
  int buffer[3 * S::WARPS];
  float ds[S::M][S::N + 1];  // the last member, since it is allocated only with a dtable
};

// Adds the sums of ds over the near relative positions of a block, from column col0 on, to the tile's partial sums. One
// thread sums each position, so no two add to the same sum.
template <class S>
__device__ __forceinline__ void add_near(const float (&ds)[S::M][S::N + 1], const RowSight<S::M>& sight, bool straight,
                                         int col0, int far, int far_right, float* partial) {
  const int diagonal = sight.diagonal[0];
  for (int at = threadIdx.x + 1; at < far + far_right; at += S::THREADS) {
    const int rel = at - far;
    int from = 0, to = S::M;
    if (straight) {  // rows of one sequence, whose diagonals rise by one
      from = max(from, col0 - rel - diagonal), to = min(to, col0 + S::N - rel - diagonal);
      if (from >= to) continue;
    }
    float sum = 0.0f;
    for (int i = from; i < to; ++i) {
      const int col = rel + sight.diagonal[i] - col0;
      if (unsigned(col) < unsigned(S::N)) sum += ds[i][col];
    }
    partial[at] += sum;
  }
}

template <class T, int D, bool EXTRAS>
__global__ void __launch_bounds__(QueriesShape<T, D>::THREADS, QueriesShape<T, D>::BLOCKS)
    attention_dq_kernel(const AttentionBackward f) {
  using S = QueriesShape<T, D>;
  constexpr int MT = S::MT, NT = S::NT, M = S::M, N = S::N;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<QueriesShared<T, D>*>(memory);
  const Attention& a = f.attention;
  const bool drops = EXTRAS && a.dropout.threshold, biased = EXTRAS && a.bias, capped = EXTRAS && a.softcap > 0.0f;
  const bool summed = EXTRAS && f.partial;
  const int warp_row = threadIdx.x / 32 * 16 * MT, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  const int tiles = (a.sq + M - 1) / M, head = blockIdx.x / tiles % a.heads;
  const int tile = a.right >= 0 ? tiles - 1 - int(blockIdx.x % tiles) : int(blockIdx.x % tiles);
  const int64_t b = blockIdx.x / tiles / a.heads;
  const int row0 = tile * M, last_row = min(row0 + M, a.sq) - 1;
  const uint8_t* mask = a.key_mask ? a.key_mask + b * a.sk : nullptr;
  const Slice<T> k_rows(a.k, b, head / a.group), v_rows(a.v, b, head / a.group);
  load_rows<T, D, M, S::THREADS>(shared.q, Slice<T>(a.q, b, head), row0, last_row + 1, nullptr, a.d);
  load_rows<T, D, M, S::THREADS>(shared.dout, Slice<T>(f.dout, b, head), row0, last_row + 1, nullptr, a.d);

  RealKeys real{0, a.sk, false};
  if (mask) real = real_keys<S::WARPS>(mask, a.sk, shared.buffer);
  const Sight sight{{a.cu_q, a.sq}, {a.cu_k, a.sk}, a.left, a.right, a.far, a.far_right, real.first, real.end};
  if (threadIdx.x == 0) {
    shared.plan = make_plan<N>(sight, a.sequences, row0, last_row, !real.holes, biased);
    if (drops) shared.bytes = Bytes(a.dropout);
  }
  __syncthreads();
  const Plan& plan = shared.plan;
  if (threadIdx.x < M) set_query(shared.sight, shared.dropout, sight, plan, int(b), head, a.heads, row0, last_row);
  const bool straddles = a.cu_q && plan.first != plan.last;

  auto fetch = [&](int step) {
    const int col0 = plan.column(step, N);
    load_rows<T, D, N, S::THREADS>(shared.k[step % S::STAGES], k_rows, col0, plan.hi, mask, a.d);
    load_rows<T, D, N, S::THREADS>(shared.v[step % S::STAGES], v_rows, col0, plan.hi, mask, a.d);
  };
  if (plan.count > 0) fetch(0);
  float less[MT][2], delta[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + warp_row + 16 * m + 8 * h + g;
      const int64_t at = (b * a.heads + head) * a.sq + row;
      const float lse = row <= last_row ? f.lse[at] : 0.0f;
      less[m][h] = lse == -kInf ? 0.0f : -kUnit<T> * lse;  // a query without keys
      delta[m][h] = row <= last_row ? f.delta[at] : 0.0f;
    }
  }
  float* partial = nullptr;
  if (summed) {
    partial = f.partial + ((b * tiles + tile) * a.heads + head) * (a.far + a.far_right + 1);
    for (int at = threadIdx.x + 1; at < a.far + a.far_right; at += S::THREADS) partial[at] = 0.0f;
  }
  copies_arrive();
  __syncthreads();

  const Left<T, D, MT, false> q(shared.q + warp_row * D), dout(shared.dout + warp_row * D);
  const float* bias = biased ? a.bias + int64_t(head) * (2 * a.far + 1) : nullptr;
  float dq[MT][D / 8][4], sum_left = 0.0f, sum_right = 0.0f;
  clear(dq);

  for (int step = 0; step < plan.count; ++step) {
    if (step > 0) next_stage<S::STAGES>([&] { fetch(step); });
    if (S::STAGES > 1 && step + 1 < plan.count) fetch(step + 1);
    const int col0 = plan.column(step, N), stage = step % S::STAGES;
    const bool plain = step < plan.plain();
    float s[MT][NT][4], dp[MT][NT][4], factor = a.scale * kUnit<T>, shift = 0.0f;
    product(s, q, shared.k[stage]);
    if (capped) factor = cap_scores<T>(s, factor, a.softcap);
    if (!plain) {
      const RealColumns<NT> columns(mask, col0, plan.hi);
      factor = finish_scores(s, factor, shared.sight, warp_row, col0, columns, bias, a.far, 1);
    } else if (biased) {
      shift = bias[plan.before(step) ? 0 : 2 * a.far];
    }
    product(dp, dout, shared.v[stage], drops ? a.dropout.scale : 1.0f);
    if (drops)
      KeptKeys<MT, NT>(shared.bytes, shared.dropout, warp_row, col0, straddles && !plain)
          .apply(dp, sizeof(T) == 4 ? 1.0f : a.dropout.scale);
    each<MT, NT>([&](int m, int n, int e) {
      const float slope = capped ? cap_slope(s[m][n][e], a.softcap * kUnit<T>) : 1.0f;
      s[m][n][e] = power<T>(fmaf(s[m][n][e], factor, less[m][e / 2] + shift)) * (dp[m][n][e] - delta[m][e / 2]);
      if (capped) s[m][n][e] *= slope;
    });
    accumulate<T, D>(dq, s, shared.k[stage], 0);
    if (!summed) continue;

    if (plain) {
      float total = 0.0f;
      each<MT, NT>([&](int m, int n, int e) { total += s[m][n][e]; });
      (plan.before(step) ? sum_left : sum_right) += total;
    } else {
      each<MT, NT>([&](int m, int n, int e) {
        const int row = warp_row + 16 * m + 8 * (e / 2) + g, col = 8 * n + 2 * t + e % 2;
        const int rel = col0 + col - shared.sight.diagonal[row];
        sum_left += rel <= -a.far ? s[m][n][e] : 0.0f;
        sum_right += rel >= a.far_right ? s[m][n][e] : 0.0f;
        shared.ds[row][col] = s[m][n][e];
      });
      __syncthreads();
      add_near<S>(shared.ds, shared.sight, plan.first == plan.last, col0, a.far, a.far_right, partial);
      __syncthreads();
    }
  }

  float scale[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m) scale[m][0] = scale[m][1] = a.scale;
  const int first = row0 + warp_row;
  const int64_t stride = int64_t(f.parts) * a.heads * a.d;
  T* out = static_cast<T*>(f.dq) + (b * a.sq + first) * stride + int64_t(head) * a.d;
  store_rows<T, D>(out, stride, last_row + 1 - first, a.d, f.wide, dq, scale, shared.q + warp_row * D, 0);
  if (summed) {  // a row past the end has neither dout nor delta
    float* sums = &shared.ds[0][0];
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      sum_left += __shfl_xor_sync(0xFFFFFFFFu, sum_left, lanes);
      sum_right += __shfl_xor_sync(0xFFFFFFFFu, sum_right, lanes);
    }
    if (threadIdx.x % 32 == 0) {
      sums[threadIdx.x / 32] = sum_left;
      sums[S::WARPS + threadIdx.x / 32] = sum_right;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < S::WARPS; ++w) sum_left += sums[w], sum_right += sums[S::WARPS + w];
      partial[0] = sum_left;
      partial[a.far + a.far_right] = sum_right;
    }
  }
}

namespace {

template <class T, int D, bool EXTRAS>
void run(const AttentionBackward& f, Place place) {
  using S = QueriesShape<T, D>;
  using Shared = QueriesShared<T, D>;
  static_assert(sizeof(Shared) <= kMostShared);
  const Attention& a = f.attention;
  const int64_t batch = a.cu_q ? 1 : a.sequences;
  launch(attention_dq_kernel<T, D, EXTRAS>, grid_size(blocks_of(a.sq, S::M) * a.heads * batch), S::THREADS,
         f.partial ? sizeof(Shared) : offsetof(Shared, ds), place.stream, f);
}

}  // namespace

void attention_dq(const AttentionBackward& f, DType dtype, Place place) {
  choose(f.attention, dtype, [&](auto type, auto d, auto extras) {
    run<decltype(type), decltype(d)::value, decltype(extras)::value>(f, place);
  });
}

int64_t attention_tiles(const Attention& a, DType dtype) {
  int64_t tiles = 0;
  choose(a, dtype, [&](auto type, auto d, auto) {
    tiles = blocks_of(a.sq, QueriesShape<decltype(type), decltype(d)::value>::M) * (a.cu_q ? 1 : a.sequences);
  });
  return tiles;
}

}  // namespace fastlm::cuda
