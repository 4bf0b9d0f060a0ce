// attention, backward, the gradients of keys and values on sm_90a: a block computes 128 keys of one key head and goes
// through the queries of all heads that share it. The maths: fastlm/ops/attention.py; sm_80's: ../attention_dkdv.cu.
//
// Keys are the rows: the products give pᵀ and dsᵀ in registers as the left sides of dv = pᵀ do and dk = dsᵀ q. A warp
// of the first warpgroup brings lse and delta, and sets rows of q and dout behind the last sequence to 0.
#include "../attention_dropout.cuh"
#include "attention.h"
#include "attention_tiles.h"
#include "tensor_map.h"

namespace fastlm::cuda {

namespace sm90 {

constexpr int kStages = 4, kQueries = 64;  // blocks in shared memory at a time, queries of each

// Whether keys and values stay in registers, and products of a block start before dk of the one before. At 128 columns
// dk and dv take 128 registers, which leaves too few for either.
template <int D>
constexpr bool kRoomy = D == 64;

struct KeysArgs {
  CUtensorMap q, k, v, dout;
  AttentionBackward backward;
};

// less: -lse in the unit of scores. full: q, dout, less and delta are there. landed: q and dout are, but some of their
// rows are still to be set to 0. free: each warp has multiplied with them.
template <class T, int D, int N>
struct KeysShared {
  T k[kGroups][kRows * D], v[kGroups][kRows * D], q[kStages][N * D], dout[kStages][N * D];
  float less[kStages][N], delta[kStages][N];
  RowSight<kTile> sight;
  Plan plan;
  Bytes bytes;
  uint64_t rows_full, full[kStages], landed[kStages], free[kStages];
};

// Calls f(stage, parity, head, block) for the blocks of queries, head by head. One loop: in an inner one, products that
// are under way from one turn to the next would be waited for at its end.
template <class F>
__device__ __forceinline__ void each_block(const Attention& a, const Plan& plan, int kv_head, F f) {
  const int count = plan.count;
  int head = kv_head * a.group, at = 0;
#pragma unroll 1
  for (int step = 0; step < count * a.group; ++step) {
    f(step % kStages, step / kStages & 1, head, at);
    if (++at == count) at = 0, ++head;
  }
}

// Whether the last sequence ends within a block. Behind the end of a tensor TMA brings 0.
template <int N>
__device__ __forceinline__ bool ends_within(const Attention& a, const Plan& plan, int col0) {
  return a.cu_q && col0 + N > plan.hi;
}

// One thread: all loads by TMA.
template <class T, int D, int N>
__device__ __forceinline__ void bring(const KeysArgs& args, KeysShared<T, D, N>& shared, int kv_head, int row0,
                                      int sequence) {
  const Attention& a = args.backward.attention;
  const Plan& plan = shared.plan;
  arrive_expecting(&shared.rows_full, 2 * kTile * D * int(sizeof(T)));
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int row = row0 + kRows * group;
    load_tile<D, kRows>(shared.k[group], args.k, kv_head, row, sequence, &shared.rows_full);
    load_tile<D, kRows>(shared.v[group], args.v, kv_head, row, sequence, &shared.rows_full);
  }
  each_block(a, plan, kv_head, [&](int stage, uint32_t parity, int head, int at) {
    const int col0 = plan.column(at, N);
    uint64_t* there = &shared.full[stage];
    wait(&shared.free[stage], parity ^ 1);
    if (ends_within<N>(a, plan, col0)) arrive(there), there = &shared.landed[stage];
    arrive_expecting(there, 2 * N * D * int(sizeof(T)));
    load_tile<D, N>(shared.q[stage], args.q, head, col0, sequence, there);
    load_tile<D, N>(shared.dout[stage], args.dout, head, col0, sequence, there);
  });
}

// One warp: less and delta, and zeros.
template <class T, int D, int N>
__device__ __forceinline__ void assist(const AttentionBackward& f, KeysShared<T, D, N>& shared, int kv_head,
                                       int64_t b) {
  const Attention& a = f.attention;
  const Plan& plan = shared.plan;
  uint32_t parities = 0;  // of `landed`, a bit for each stage
  each_block(a, plan, kv_head, [&](int stage, uint32_t parity, int head, int at) {
    const int col0 = plan.column(at, N);
    const int64_t from = (b * a.heads + head) * a.sq;
    wait(&shared.free[stage], parity ^ 1);
    for (int i = threadIdx.x % 32; i < N; i += 32) {
      const bool real = col0 + i < plan.hi;
      const float lse = real ? f.lse[from + col0 + i] : 0.0f;
      shared.less[stage][i] = lse == -kInf ? 0.0f : -kUnit<T> * lse;  // -inf: a query without keys
      shared.delta[stage][i] = real ? f.delta[from + col0 + i] : 0.0f;
    }
    if (ends_within<N>(a, plan, col0)) {
      wait(&shared.landed[stage], parities >> stage & 1);
      parities ^= 1u << stage;
      auto stays = [&](int row) { return col0 + row < plan.hi; };
      clean_tile<D, N>(shared.q[stage], stays);
      clean_tile<D, N>(shared.dout[stage], stays);
      fence_async();
    }
    release(&shared.full[stage]);
  });
}

// A warpgroup: writes the gradients of its 64 keys.
template <bool EXTRAS, class T, int D, int N>
__device__ __forceinline__ void store_gradients(const AttentionBackward& f, const uint8_t* mask,
                                                KeysShared<T, D, N>& shared, int kv_head, int64_t b, int row0,
                                                int last_row, float (&dk)[1][D / 8][4], float (&dv)[1][D / 8][4]) {
  const Attention& a = f.attention;
  const Plan& plan = shared.plan;
  const int group = threadIdx.x / kWarpgroup - 1, warp = threadIdx.x % kWarpgroup / 32;
  const int warp_row = kRows * group + 16 * warp, g = threadIdx.x % 32 / 4;
  float factor_k[1][2], factor_v[1][2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row0 + warp_row + 8 * h + g;
    const bool is_real = !mask || (row <= last_row && mask[row]);
    const bool lost = row < plan.known.lo || row >= plan.known.hi;  // a key of no sequence
    factor_k[0][h] = lost ? kNaN : a.scale;
    factor_v[0][h] = lost ? kNaN : EXTRAS && a.dropout.threshold ? a.dropout.scale : 1.0f;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {  // not by a factor of 0: 0 times infinity is NaN
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        if (!is_real) dk[0][n][e] = dv[0][n][e] = 0.0f;
      }
    }
  }
  // The gradients pass through the group's k and v: all of its warps have multiplied with them.
  meet(kTogether + group, kWarpgroup);
  const int first = row0 + warp_row, kv_heads = a.heads / a.group;
  const int64_t stride = int64_t(f.parts) * kv_heads * a.d;
  const int64_t offset = (b * a.sk + first) * stride + int64_t(kv_head) * a.d;
  store_rows<T, D>(static_cast<T*>(f.dk) + offset, stride, last_row + 1 - first, a.d, f.wide, dk, factor_k,
                   shared.k[group] + 16 * warp * D, 0);
  store_rows<T, D>(static_cast<T*>(f.dv) + offset, stride, last_row + 1 - first, a.d, f.wide, dv, factor_v,
                   shared.v[group] + 16 * warp * D, 0);
}

// A warpgroup: its 64 keys. At 64 columns it starts s and dp of a block before dk of the one before, which the tensor
// cores multiply while it computes p.
template <bool EXTRAS, class T, int D, int N>
__device__ __forceinline__ void compute(const AttentionBackward& f, const uint8_t* mask, KeysShared<T, D, N>& shared,
                                        int kv_head, int64_t b, int row0, int last_row) {
  constexpr int NT = N / 8;
  const Attention& a = f.attention;
  const Plan& plan = shared.plan;
  const bool drops = EXTRAS && a.dropout.threshold, biased = EXTRAS && a.bias, capped = EXTRAS && a.softcap > 0.0f;
  const int group = threadIdx.x / kWarpgroup - 1, warp = threadIdx.x % kWarpgroup / 32;
  const int warp_row = kRows * group + 16 * warp, t = threadIdx.x % 4;

  float dk[1][D / 8][4], dv[1][D / 8][4], s[1][NT][4], dp[1][NT][4];
  uint32_t left[NT / 2][4], right[NT / 2][4] = {};  // of dv and dk
  clear(dk);
  clear(dv);
  wait(&shared.rows_full, 0);
  const LeftTile<D, T, kRoomy<D>> k(shared.k[group]), v(shared.v[group]);
  int before = -1;  // the stage of the block before
  each_block(a, plan, kv_head, [&](int stage, uint32_t parity, int head, int at) {
    const int col0 = plan.column(at, N);
    const bool plain = at < plan.plain();
    const float* bias = biased ? a.bias + int64_t(head) * (2 * a.far + 1) : nullptr;
    KeptQueries<1, NT> stays;
    // Turns scores into p. kind: std::false_type for a plain block.
    auto soften = [&](auto kind) {
      constexpr bool masked = decltype(kind)::value;
      float factor = a.scale * kUnit<T>, shift = 0.0f;
      if (capped) factor = cap_scores<T>(s, factor, a.softcap);
      if (masked) {
        const RealColumns<NT> columns(nullptr, col0, plan.hi);
        factor = finish_scores(s, factor, shared.sight, warp_row, col0, columns, bias, a.far, -1);
      } else if (biased) {  // before a key's diagonal, keys are after the query
        shift = bias[plan.before(at) ? 2 * a.far : 0];
      }
      each<1, NT>([&](int m, int n, int e) {
        const float less = shared.less[stage][8 * n + 2 * t + e % 2];
        s[m][n][e] = power<T>(fmaf(s[m][n][e], factor, biased ? less + shift : less));
      });
      if (drops) {
        stays.draw(shared.bytes, a.cu_q, [&](int i) {
          const int query = col0 + i;
          if (!a.cu_q) return Draw{row0 + warp_row, query, int(b) * a.heads + head};
          const int of = !masked ? plan.first : query < plan.hi ? f.sequence[query] : plan.last;
          return Draw{row0 + warp_row - a.cu_k[of], query - a.cu_q[of], of * a.heads + head};
        });
        float kept[1][NT][4];
        each<1, NT>([&](int m, int n, int e) { kept[m][n][e] = stays.has(m, n, e) ? s[m][n][e] : 0.0f; });
        round_to<T>(left, kept[0]);
      } else {
        round_to<T>(left, s[0]);
      }
    };

    wait(&shared.full[stage], parity);
    k.start_product(s[0], shared.q[stage]);
    v.start_product(dp[0], shared.dout[stage]);
    if (kRoomy<D>) start_accumulate(dk[0], right, shared.q[before < 0 ? stage : before]);  // at first 0 times q
    products_wait<kRoomy<D> ? 2 : 1>();
    settle(s[0]);
    // Both branches have the whole of it: ptxas moves the exponentials behind the wait if both are in one basic block.
    plain ? soften(std::false_type()) : soften(std::true_type());
    products_wait<kRoomy<D> ? 1 : 0>();
    settle(dp[0]);
    start_accumulate(dv[0], left, shared.dout[stage]);
    each<1, NT>([&](int m, int n, int e) {
      const int col = 8 * n + 2 * t + e % 2;
      const float p = s[m][n][e];
      if (drops) dp[m][n][e] = stays.has(m, n, e) ? dp[m][n][e] * a.dropout.scale : 0.0f;
      dp[m][n][e] = p * (dp[m][n][e] - shared.delta[stage][col]);
      // The capped score, from p: kept in registers, it would spill. Where p is 0, so is ds.
      if (capped) dp[m][n][e] *= cap_slope(logarithm<T>(p) - shared.less[stage][col], a.softcap * kUnit<T>);
    });
    if (kRoomy<D>) {
      products_wait<1>();
      settle(dp[0]);
      if (before >= 0) release(&shared.free[before]);
      round_to<T>(right, dp[0]);
      before = stage;
    } else {
      round_to<T>(right, dp[0]);
      start_accumulate(dk[0], right, shared.q[stage]);
      products_wait<0>();
      release(&shared.free[stage]);
    }
  });
  if (before >= 0) start_accumulate(dk[0], right, shared.q[before]);
  products_wait<0>();
  settle(dv[0]);
  settle(dk[0]);
  store_gradients<EXTRAS>(f, mask, shared, kv_head, b, row0, last_row, dk, dv);
}

template <class T, int D, bool EXTRAS>
__global__ void __launch_bounds__(kThreads, 1) attention_dkdv_kernel(const __grid_constant__ KeysArgs args) {
  constexpr int N = kQueries;
  extern __shared__ __align__(1024) unsigned char memory[];
  static_assert(sizeof(KeysShared<T, D, N>) <= kMostBytes);
  auto& shared = *reinterpret_cast<KeysShared<T, D, N>*>(memory);
  const AttentionBackward& f = args.backward;
  const Attention& a = f.attention;
  if (threadIdx.x == 0) {
    prefetch(args.q), prefetch(args.k), prefetch(args.v), prefetch(args.dout);
    init(&shared.rows_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      init(&shared.full[stage], 2);  // the thread that starts the loads, and the warp that assists
      init(&shared.landed[stage], 1);
      init(&shared.free[stage], 4 * kGroups);  // each warp
    }
    fence_init();
  }

  const int tiles = (a.sk + kTile - 1) / kTile, kv_heads = a.heads / a.group, kv_head = blockIdx.x / tiles % kv_heads;
  const int64_t b = blockIdx.x / tiles / kv_heads;
  const int row0 = blockIdx.x % tiles * kTile, last_row = min(row0 + kTile, a.sk) - 1;
  const uint8_t* mask = a.key_mask ? a.key_mask + b * a.sk : nullptr;
  const Sight sight{{a.cu_k, a.sk}, {a.cu_q, a.sq}, a.right, a.left, a.far_right, a.far, 0, a.sq};
  // A masked key affects only its row, which is set to 0 at the end. Without a real key there is nothing to do.
  const int own = row0 + threadIdx.x;
  const bool real = __syncthreads_or(!mask || (threadIdx.x < kTile && own <= last_row && mask[own]));
  if (threadIdx.x == 0) {
    shared.plan = make_plan<N>(sight, a.sequences, row0, last_row, true, EXTRAS && a.bias);
    if (!real) shared.plan.count = 0;
    if (EXTRAS && a.dropout.threshold) shared.bytes = Bytes(a.dropout);
  }
  __syncthreads();
  if (threadIdx.x < kTile) {
    const int row = min(own, last_row);
    const int of = a.cu_k ? find_sequence(a.cu_k, row, shared.plan.first, shared.plan.last) : 0;
    shared.sight.set(threadIdx.x, sight, row, of);
  }
  __syncthreads();

  if (threadIdx.x < kWarpgroup) {
    give_registers<kFew>();
    if (threadIdx.x == 0) bring(args, shared, kv_head, row0, int(b));
    if (threadIdx.x / 32 == 1) assist(f, shared, kv_head, b);
  } else {
    take_registers<kMany>();
    compute<EXTRAS>(f, mask, shared, kv_head, b, row0, last_row);
  }
}

namespace {

template <class T, int D, bool EXTRAS>
void run(const AttentionBackward& f, DType dtype, Place place) {
  constexpr int N = kQueries;
  const Attention& a = f.attention;
  const int batch = a.cu_q ? 1 : a.sequences, kv_heads = a.heads / a.group;
  const KeysArgs args{tensor_map("q", a.q, {a.d, a.heads, a.sq, batch}, dtype, N),
                      tensor_map("k", a.k, {a.d, kv_heads, a.sk, batch}, dtype, kRows),
                      tensor_map("v", a.v, {a.d, kv_heads, a.sk, batch}, dtype, kRows),
                      tensor_map("dout", f.dout, {a.d, a.heads, a.sq, batch}, dtype, N), f};
  launch(attention_dkdv_kernel<T, D, EXTRAS>, grid_size(blocks_of(a.sk, kTile) * kv_heads * batch), kThreads,
         sizeof(KeysShared<T, D, N>), place.stream, args);
}

}  // namespace

void attention_dkdv(const AttentionBackward& f, DType dtype, Place place) {
  choose_kernel(f.attention, dtype, [&](auto type, auto d, auto extras) {
    run<decltype(type), decltype(d)::value, decltype(extras)::value>(f, dtype, place);
  });
}

}  // namespace sm90

}  // namespace fastlm::cuda
