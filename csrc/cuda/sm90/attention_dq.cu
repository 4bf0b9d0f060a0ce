// attention, backward, the gradient of queries on sm_90a: a block computes 128 queries of one head and goes through
// blocks of 64 keys. The maths: fastlm/ops/attention.py. The gradient of a bias table is sm_80's alone:
// ../attention_dq.cu.
//
// What TMA brings of k and v behind a sequence or under a mask is set to 0 by a warp of the first warpgroup, as in
// forward.
#include "../attention_dropout.cuh"
#include "attention.h"
#include "attention_tiles.h"
#include "tensor_map.h"

namespace fastlm::cuda {

namespace sm90 {

constexpr int kStages = 4, kBlock = 64;  // blocks in shared memory at a time, keys of each

struct QueriesArgs {
  CUtensorMap q, k, v, dout;
  AttentionBackward backward;
};

// full: k and v are there. landed: they are, but some of their rows are still to be set to 0. free: each warp has
// multiplied with them.
template <class T, int D>
struct QueriesShared {
  T q[kGroups][kRows * D], dout[kGroups][kRows * D], k[kStages][kBlock * D], v[kStages][kBlock * D];
  RowSight<kTile> sight;
  RowDropout<kTile> dropout;
  Plan plan;
  Bytes bytes;
  uint64_t rows_full, full[kStages], landed[kStages], free[kStages];
  int buffer[3 * kThreads / 32];
};

// Whether rows of a block may be no key that any query sees, and not 0. Behind the end of a tensor TMA brings 0.
__device__ __forceinline__ bool has_other_rows(const Attention& a, const Plan& plan, int step) {
  return step >= plan.plain() && (a.key_mask || (a.cu_k && plan.column(step, kBlock) + kBlock > plan.hi));
}

// One thread: all loads.
template <class T, int D>
__device__ __forceinline__ void bring(const QueriesArgs& args, QueriesShared<T, D>& shared, int head, int row0,
                                      int sequence) {
  const Attention& a = args.backward.attention;
  const Plan& plan = shared.plan;
  const int kv_head = head / a.group;
  arrive_expecting(&shared.rows_full, 2 * kTile * D * int(sizeof(T)));
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int row = row0 + kRows * group;
    load_tile<D, kRows>(shared.q[group], args.q, head, row, sequence, &shared.rows_full);
    load_tile<D, kRows>(shared.dout[group], args.dout, head, row, sequence, &shared.rows_full);
  }
#pragma unroll 1
  for (int step = 0; step < plan.count; ++step) {
    const int stage = step % kStages, col0 = plan.column(step, kBlock);
    wait(&shared.free[stage], (step / kStages & 1) ^ 1);
    uint64_t* const there = has_other_rows(a, plan, step) ? &shared.landed[stage] : &shared.full[stage];
    arrive_expecting(there, 2 * kBlock * D * int(sizeof(T)));
    load_tile<D, kBlock>(shared.k[stage], args.k, kv_head, col0, sequence, there);
    load_tile<D, kBlock>(shared.v[stage], args.v, kv_head, col0, sequence, there);
  }
}

// One warp: sets rows that are no keys to 0.
template <class T, int D>
__device__ __forceinline__ void clean(const Attention& a, const uint8_t* mask, QueriesShared<T, D>& shared) {
  const Plan& plan = shared.plan;
  uint32_t parities = 0;  // a bit for each stage
#pragma unroll 1
  for (int step = 0; step < plan.count; ++step) {
    if (!has_other_rows(a, plan, step)) continue;
    const int stage = step % kStages, col0 = plan.column(step, kBlock);
    wait(&shared.landed[stage], parities >> stage & 1);
    parities ^= 1u << stage;
    auto stays = [&](int row) { return col0 + row < plan.hi && (!mask || mask[col0 + row]); };
    clean_tile<D, kBlock>(shared.k[stage], stays);
    clean_tile<D, kBlock>(shared.v[stage], stays);
    fence_async();
    release(&shared.full[stage]);
  }
}

// A warpgroup: its 64 queries. It starts s and dp of a block before dq of the one before, which the tensor cores
// multiply while it computes p.
template <bool EXTRAS, class T, int D>
__device__ __forceinline__ void compute(const AttentionBackward& f, const uint8_t* mask, QueriesShared<T, D>& shared,
                                        int head, int64_t b, int row0, int last_row) {
  constexpr int N = kBlock, NT = N / 8;
  const Attention& a = f.attention;
  const Plan& plan = shared.plan;
  const bool drops = EXTRAS && a.dropout.threshold, biased = EXTRAS && a.bias, capped = EXTRAS && a.softcap > 0.0f;
  const int group = threadIdx.x / kWarpgroup - 1, warp = threadIdx.x % kWarpgroup / 32;
  const int warp_row = kRows * group + 16 * warp, g = threadIdx.x % 32 / 4;
  const float* bias = biased ? a.bias + int64_t(head) * (2 * a.far + 1) : nullptr;
  const bool straddles = a.cu_q && plan.first != plan.last;

  float dq[1][D / 8][4], s[1][NT][4], dp[1][NT][4], less[2], delta[2];
  uint32_t left[NT / 2][4] = {};
  clear(dq);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row0 + warp_row + 8 * h + g;
    const int64_t at = (b * a.heads + head) * a.sq + row;
    const float lse = row <= last_row ? f.lse[at] : 0.0f;
    less[h] = lse == -kInf ? 0.0f : -kUnit<T> * lse;  // a query without keys
    delta[h] = row <= last_row ? f.delta[at] : 0.0f;
  }
  // Turns scores into p, with a softcap times its slope. kind: std::false_type for a plain block.
  auto soften = [&](int step, auto kind) {
    constexpr bool masked = decltype(kind)::value;
    const int col0 = plan.column(step, N);
    float factor = a.scale * kUnit<T>, shift = 0.0f;
    if (capped) factor = cap_scores<T>(s, factor, a.softcap);
    if (masked) {
      const RealColumns<NT> columns(mask, col0, plan.hi);
      factor = finish_scores(s, factor, shared.sight, warp_row, col0, columns, bias, a.far, 1);
    } else if (biased) {
      shift = bias[plan.before(step) ? 0 : 2 * a.far];
    }
    each<1, NT>([&](int m, int n, int e) {
      const float slope = capped ? cap_slope(s[m][n][e], a.softcap * kUnit<T>) : 1.0f;
      s[m][n][e] = power<T>(fmaf(s[m][n][e], factor, less[e / 2] + shift));
      if (capped) s[m][n][e] *= slope;
    });
  };

  wait(&shared.rows_full, 0);
  const LeftTile<D, T, D == 64 || !EXTRAS> q(shared.q[group]);  // dropout or a bias would spill at 128 columns
  const LeftTile<D, T, true> dout(shared.dout[group]);
#pragma unroll 1
  for (int step = 0; step < plan.count; ++step) {
    const int stage = step % kStages, before = max(step - 1, 0) % kStages;
    wait(&shared.full[stage], step / kStages & 1);
    q.start_product(s[0], shared.k[stage]);
    dout.start_product(dp[0], shared.v[stage]);
    start_accumulate(dq[0], left, shared.k[before]);  // at first 0 times k
    products_wait<2>();
    settle(s[0]);
    const bool plain = step < plan.plain();
    // Both branches have the whole of it: ptxas moves the exponentials behind the wait if both are in one basic block.
    plain ? soften(step, std::false_type()) : soften(step, std::true_type());
    products_wait<1>();
    settle(dp[0]);
    if (drops) {
      const bool across = straddles && !plain;
      KeptKeys<1, NT>(shared.bytes, shared.dropout, warp_row, plan.column(step, N), across).apply(dp, a.dropout.scale);
    }
    each<1, NT>([&](int m, int n, int e) { s[m][n][e] *= dp[m][n][e] - delta[e / 2]; });
    products_wait<0>();
    settle(s[0]);
    if (step > 0) release(&shared.free[before]);
    round_to<T>(left, s[0]);
  }
  if (plan.count > 0) {
    start_accumulate(dq[0], left, shared.k[(plan.count - 1) % kStages]);
    products_wait<0>();
    settle(dq[0]);
  }

  const float scale[1][2] = {{a.scale, a.scale}};
  // The gradient passes through the group's q: all of its warps have multiplied with it.
  meet(kTogether + group, kWarpgroup);
  const int first = row0 + warp_row;
  const int64_t stride = int64_t(f.parts) * a.heads * a.d;
  T* out = static_cast<T*>(f.dq) + (b * a.sq + first) * stride + int64_t(head) * a.d;
  store_rows<T, D>(out, stride, last_row + 1 - first, a.d, f.wide, dq, scale, shared.q[group] + 16 * warp * D, 0);
}

template <class T, int D, bool EXTRAS>
__global__ void __launch_bounds__(kThreads, 1) attention_dq_kernel(const __grid_constant__ QueriesArgs args) {
  extern __shared__ __align__(1024) unsigned char memory[];
  static_assert(sizeof(QueriesShared<T, D>) <= kMostBytes);
  auto& shared = *reinterpret_cast<QueriesShared<T, D>*>(memory);
  const AttentionBackward& f = args.backward;
  const Attention& a = f.attention;
  if (threadIdx.x == 0) {
    prefetch(args.q), prefetch(args.k), prefetch(args.v), prefetch(args.dout);
    init(&shared.rows_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      init(&shared.full[stage], 1), init(&shared.landed[stage], 1);
      init(&shared.free[stage], 4 * kGroups);  // each warp
    }
    fence_init();
  }

  const int tiles = (a.sq + kTile - 1) / kTile, head = blockIdx.x / tiles % a.heads;
  const int tile = a.right >= 0 ? tiles - 1 - int(blockIdx.x % tiles) : int(blockIdx.x % tiles);
  const int64_t b = blockIdx.x / tiles / a.heads;
  const int row0 = tile * kTile, last_row = min(row0 + kTile, a.sq) - 1;
  const uint8_t* mask = a.key_mask ? a.key_mask + b * a.sk : nullptr;
  RealKeys real{0, a.sk, false};
  if (mask) real = real_keys<kThreads / 32>(mask, a.sk, shared.buffer);
  const Sight sight{{a.cu_q, a.sq}, {a.cu_k, a.sk}, a.left, a.right, a.far, a.far_right, real.first, real.end};
  if (threadIdx.x == 0) {
    shared.plan = make_plan<kBlock>(sight, a.sequences, row0, last_row, !real.holes, EXTRAS && a.bias);
    if (EXTRAS && a.dropout.threshold) shared.bytes = Bytes(a.dropout);
  }
  __syncthreads();
  if (threadIdx.x < kTile)
    set_query(shared.sight, shared.dropout, sight, shared.plan, int(b), head, a.heads, row0, last_row);
  __syncthreads();

  if (threadIdx.x < kWarpgroup) {
    give_registers<kFew>();
    if (threadIdx.x == 0) bring(args, shared, head, row0, int(b));
    if (threadIdx.x / 32 == 1) clean(a, mask, shared);
  } else {
    take_registers<kMany>();
    compute<EXTRAS>(f, mask, shared, head, b, row0, last_row);
  }
}

namespace {

template <class T, int D, bool EXTRAS>
void run(const AttentionBackward& f, DType dtype, Place place) {
  const Attention& a = f.attention;
  const int batch = a.cu_q ? 1 : a.sequences, kv_heads = a.heads / a.group;
  const QueriesArgs args{tensor_map("q", a.q, {a.d, a.heads, a.sq, batch}, dtype, kRows),
                         tensor_map("k", a.k, {a.d, kv_heads, a.sk, batch}, dtype, kBlock),
                         tensor_map("v", a.v, {a.d, kv_heads, a.sk, batch}, dtype, kBlock),
                         tensor_map("dout", f.dout, {a.d, a.heads, a.sq, batch}, dtype, kRows), f};
  launch(attention_dq_kernel<T, D, EXTRAS>, grid_size(blocks_of(a.sq, kTile) * a.heads * batch), kThreads,
         sizeof(QueriesShared<T, D>), place.stream, args);
}

}  // namespace

void attention_dq(const AttentionBackward& f, DType dtype, Place place) {
  choose_kernel(f.attention, dtype, [&](auto type, auto d, auto extras) {
    run<decltype(type), decltype(d)::value, decltype(extras)::value>(f, dtype, place);
  });
}

}  // namespace sm90

}  // namespace fastlm::cuda
