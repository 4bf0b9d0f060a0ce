// attention, forward, on sm_90a: a block computes 128 queries of one head. The maths: fastlm/ops/attention.py.
//
// Three warpgroups. The first brings q, k and v by TMA: blocks of 128 keys into a ring of two stages. Each of the
// others has 64 queries; scores, probabilities and output stay in its registers. It starts q kᵀ of the next block
// before p v of the current one, so that the tensor cores multiply while it computes the softmax of the next block.
// The two take turns at starting products: one multiplies while the other is at its softmax (the schedule of
// FlashAttention-3, Shah et al. 2024).
//
// A box of TMA does not end with a sequence, nor does it know a mask. What it brings of k beyond them is masked in the
// scores. Of v it is set to 0 in shared memory by a warp of the first warpgroup, since 0 NaN is NaN.
//
// Barriers of a stage: k_full and v_full (the block is there), k_free and v_free (each warp has multiplied with it),
// v_landed (v is there, but some of its rows are still to be set to 0).
#include "../attention_dropout.cuh"
#include "attention.h"
#include "attention_tiles.h"
#include "tensor_map.h"

namespace fastlm::cuda {

namespace sm90 {

constexpr int kStages = 2;

// Keys of a block. With 128, dropout or a bias would spill at 128 columns.
template <int D, bool EXTRAS>
constexpr int kKeys = D == 128 && EXTRAS ? 64 : 128;

struct ForwardArgs {
  CUtensorMap q, k, v;
  AttentionForward forward;
};

template <class T, int D, int N>
struct ForwardShared {
  T q[kGroups][kRows * D], k[kStages][N * D], v[kStages][N * D];
  RowSight<kTile> sight;
  RowDropout<kTile> dropout;
  Plan plan;
  Bytes bytes;
  uint64_t q_full, k_full[kStages], v_full[kStages], v_landed[kStages], k_free[kStages], v_free[kStages];
  int buffer[3 * kThreads / 32];
};

// Whether rows of v of this step may be no key that any query sees, and not 0. Behind the end of a tensor TMA brings 0.
template <int N>
__device__ __forceinline__ bool has_other_rows(const Attention& a, const Plan& plan, int step) {
  return step >= plan.plain() && (a.key_mask || (a.cu_k && plan.column(step, N) + N > plan.hi));
}

// One thread: all loads of the block.
template <class T, int D, int N>
__device__ __forceinline__ void bring(const ForwardArgs& args, ForwardShared<T, D, N>& shared, int head, int row0,
                                      int sequence) {
  const Attention& a = args.forward.attention;
  const Plan& plan = shared.plan;
  const int kv_head = head / a.group;
  constexpr int kBytes = N * D * int(sizeof(T));
  arrive_expecting(&shared.q_full, kTile * D * int(sizeof(T)));
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
    load_tile<D, kRows>(shared.q[group], args.q, head, row0 + kRows * group, sequence, &shared.q_full);
#pragma unroll 1
  for (int step = 0; step < plan.count; ++step) {
    const int stage = step % kStages, col0 = plan.column(step, N);
    const uint32_t before = (step / kStages & 1) ^ 1;
    wait(&shared.k_free[stage], before);
    arrive_expecting(&shared.k_full[stage], kBytes);
    load_tile<D, N>(shared.k[stage], args.k, kv_head, col0, sequence, &shared.k_full[stage]);
    wait(&shared.v_free[stage], before);
    uint64_t* const there = has_other_rows<N>(a, plan, step) ? &shared.v_landed[stage] : &shared.v_full[stage];
    arrive_expecting(there, kBytes);
    load_tile<D, N>(shared.v[stage], args.v, kv_head, col0, sequence, there);
  }
}

// One warp: sets rows of v that are no keys to 0.
template <class T, int D, int N>
__device__ __forceinline__ void clean(const Attention& a, const uint8_t* mask, ForwardShared<T, D, N>& shared) {
  const Plan& plan = shared.plan;
  uint32_t parities = 0;  // a bit for each stage
#pragma unroll 1
  for (int step = 0; step < plan.count; ++step) {
    if (!has_other_rows<N>(a, plan, step)) continue;
    const int stage = step % kStages, col0 = plan.column(step, N);
    wait(&shared.v_landed[stage], parities >> stage & 1);
    parities ^= 1u << stage;
    clean_tile<D, N>(shared.v[stage], [&](int row) {
      const int key = col0 + row;
      return key < plan.hi && (!mask || mask[key]);
    });
    fence_async();
    release(&shared.v_full[stage]);
  }
}

// At 64 columns the exponential unit takes longer than the tensor cores, so one exponential in kByFma is computed on
// the FMA units: those of keys 57, 59, 61 and 63 of each 64. With dropout or a bias, issue slots are the limit.
constexpr int kByFma = 16;

// 2^x without the exponential unit, for x of -126 to 127; off by at most 1.02e-4 of the value. Below it is 2^-126 at
// most, from -127 down and for NaN 0. The integer part goes into the exponent, a polynomial has the rest, -1/2..1/2.
__device__ __forceinline__ float power_by_fma(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 2^23: a sum with it is an integer, in its low bits
  x = fmaxf(x, -127.0f);
  const float sum = x + kRound, rest = x - (sum - kRound);
  const float y = fmaf(fmaf(fmaf(0.055008933f, rest, 0.24221095f), rest, 0.6932829f), rest, 1.0f);
  return __int_as_float(__float_as_int(y) + (__float_as_int(sum) << 23));
}

// The larger one, or NaN.
__device__ __forceinline__ float larger(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// The online softmax: 2^(factor s + shift - maximum) of a block. rescale: the factors of what was summed so far.
// power_by_fma hides NaN, so the maximum and the sum carry it.
template <bool BY_FMA, class T, int NT>
__device__ __forceinline__ void exponentiate(float (&s)[NT][4], float factor, float shift, float (&maximum)[2],
                                             float (&total)[2], float (&rescale)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = -kInf;
#pragma unroll
    for (int n = 0; n < NT; ++n) top = larger(top, larger(s[n][2 * h], s[n][2 * h + 1]));
    top = larger(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
    top = larger(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
    top = larger(maximum[h], fmaf(top, factor, shift));
    const float least = top == -kInf ? 0.0f : top;  // a row that has seen no key yet
    rescale[h] = power<T>(maximum[h] - least);
    maximum[h] = top;
    float sum = BY_FMA ? 0.0f * least : 0.0f;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        const float x = fmaf(s[n][e], factor, shift - least);
        const bool by_fma = BY_FMA && (2 * n + e % 2) % kByFma == kByFma - 1;
        s[n][e] = by_fma ? power_by_fma(x) : power<T>(x);
        sum += s[n][e];
      }
    }
    total[h] = fmaf(total[h], rescale[h], sum);
  }
}

// A warpgroup: its 64 queries. lost: cu_seqlens are wrong.
template <bool EXTRAS, class T, int D, int N>
__device__ __forceinline__ void compute(const AttentionForward& f, const uint8_t* mask, ForwardShared<T, D, N>& shared,
                                        int head, int64_t b, int row0, int last_row, bool lost) {
  constexpr int NT = N / 8;
  const Attention& a = f.attention;
  const Plan& plan = shared.plan;
  const bool drops = EXTRAS && a.dropout.threshold, biased = EXTRAS && a.bias, capped = EXTRAS && a.softcap > 0.0f;
  const int group = threadIdx.x / kWarpgroup - 1, warp = threadIdx.x % kWarpgroup / 32;
  const int warp_row = kRows * group + 16 * warp, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const float* bias = biased ? a.bias + int64_t(head) * (2 * a.far + 1) : nullptr;
  const bool straddles = a.cu_q && plan.first != plan.last;

  // s: scores, then probabilities of a block; p: those before, rounded, while they are multiplied with v.
  float s[1][NT][4], acc[1][D / 8][4], maximum[2], total[1][2];
  uint32_t p[NT / 2][4];
  clear(acc);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row0 + warp_row + 8 * h + g;
    maximum[h] = -kInf;
    // A row of no sequence gets NaN, and so does every row if cu_seqlens are wrong: lse carries it into backward.
    total[0][h] = lost || row < plan.known.lo || row >= plan.known.hi ? kNaN : 0.0f;
  }

  const LeftTile<D, T, false> q(shared.q[group]);
  auto start_scores = [&](int step) { q.start_product(s[0], shared.k[step % kStages]); };
  auto start_values = [&](int step) {
    const int stage = step % kStages;
    wait(&shared.v_full[stage], step / kStages & 1);
    start_accumulate(acc[0], p, shared.v[stage]);
  };
  // Turns scores into probabilities. kind: std::false_type for a plain block.
  auto soften = [&](int step, auto kind, float (&rescale)[2]) {
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
    exponentiate<D == 64 && !EXTRAS, T>(s[0], factor, shift, maximum, total[0], rescale);
    if (drops) KeptKeys<1, NT>(shared.bytes, shared.dropout, warp_row, col0, straddles && masked).apply(s, 1.0f);
    settle(s[0]);
  };

  float rescale[2];
  wait(&shared.q_full, 0);
  if (plan.count > 0) {
    wait(&shared.k_full[0], 0);
    start_scores(0);
    products_wait<0>();
    settle(s[0]);
    release(&shared.k_free[0]);
    soften(0, std::true_type(), rescale);
    round_to<T>(p, s[0]);
    if (group > 0 && plan.count > 1) pass(kTurn, kGroups * kWarpgroup);  // the first turn is the first group's
#pragma unroll 1
    for (int step = 1; step < plan.count; ++step) {
      wait(&shared.k_full[step % kStages], step / kStages & 1);
      meet(kTurn + group, kGroups * kWarpgroup);
      start_scores(step);
      start_values(step - 1);
      if (group == 0 || step + 1 < plan.count) pass(kTurn + 1 - group, kGroups * kWarpgroup);
      products_wait<1>();
      settle(s[0]);
      release(&shared.k_free[step % kStages]);
      // Both branches have the whole of it: ptxas moves a softmax behind the wait if both are in one basic block.
      step < plan.plain() ? soften(step, std::false_type(), rescale) : soften(step, std::true_type(), rescale);
      products_wait<0>();
      settle(acc[0]);
      release(&shared.v_free[(step - 1) % kStages]);
      each<1, D / 8>([&](int m, int n, int e) { acc[m][n][e] *= rescale[e / 2]; });
      round_to<T>(p, s[0]);
    }
    start_values(plan.count - 1);
    products_wait<0>();
    settle(acc[0]);
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float& sum = total[0][h];
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
    const bool empty = sum == 0.0f;
    const int row = row0 + warp_row + 8 * h + g;
    if (t == 0 && row <= last_row)
      f.lse[(b * a.heads + head) * a.sq + row] = empty ? -kInf : (maximum[h] + log2f(sum)) * kLn2;
    sum = empty ? 0.0f : (drops ? a.dropout.scale : 1.0f) / sum;
  }
  // The output passes through the group's q: all of its warps have multiplied with it.
  meet(kTogether + group, kWarpgroup);
  const int first = row0 + warp_row;
  T* out = static_cast<T*>(f.out) + ((b * a.sq + first) * a.heads + head) * a.d;
  store_rows<T, D>(out, int64_t(a.heads) * a.d, last_row + 1 - first, a.d, f.wide, acc, total,
                   shared.q[group] + 16 * warp * D, 0);
}

template <class T, int D, bool EXTRAS>
__global__ void __launch_bounds__(kThreads, 1) attention_fwd_kernel(const __grid_constant__ ForwardArgs args) {
  constexpr int N = kKeys<D, EXTRAS>;
  extern __shared__ __align__(1024) unsigned char memory[];
  static_assert(sizeof(ForwardShared<T, D, N>) <= kMostBytes);
  auto& shared = *reinterpret_cast<ForwardShared<T, D, N>*>(memory);
  const Attention& a = args.forward.attention;
  if (threadIdx.x == 0) {
    prefetch(args.q), prefetch(args.k), prefetch(args.v);
    init(&shared.q_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      init(&shared.k_full[stage], 1), init(&shared.v_full[stage], 1), init(&shared.v_landed[stage], 1);
      init(&shared.k_free[stage], 4 * kGroups), init(&shared.v_free[stage], 4 * kGroups);  // each warp
    }
    fence_init();
  }

  // With a causal mask the last tiles see the most keys, so they start first.
  const int tiles = (a.sq + kTile - 1) / kTile, head = blockIdx.x / tiles % a.heads;
  const int tile = a.right >= 0 ? tiles - 1 - int(blockIdx.x % tiles) : int(blockIdx.x % tiles);
  const int64_t b = blockIdx.x / tiles / a.heads;
  const int row0 = tile * kTile, last_row = min(row0 + kTile, a.sq) - 1;
  const uint8_t* mask = a.key_mask ? a.key_mask + b * a.sk : nullptr;
  RealKeys real{0, a.sk, false};
  if (mask) real = real_keys<kThreads / 32>(mask, a.sk, shared.buffer);
  const Sight sight{{a.cu_q, a.sq}, {a.cu_k, a.sk}, a.left, a.right, a.far, a.far_right, real.first, real.end};
  // A plain block takes the maximum before scaling, which is wrong for a scale of 0 or less.
  if (threadIdx.x == 0) {
    shared.plan = make_plan<N>(sight, a.sequences, row0, last_row, !real.holes && a.scale > 0.0f, EXTRAS && a.bias);
    if (EXTRAS && a.dropout.threshold) shared.bytes = Bytes(a.dropout);
  }
  const bool wrong =
      sight.rows.template wrong<kThreads>(a.sequences) || sight.cols.template wrong<kThreads>(a.sequences);
  const bool lost = __syncthreads_or(wrong);
  if (threadIdx.x < kTile)
    set_query(shared.sight, shared.dropout, sight, shared.plan, int(b), head, a.heads, row0, last_row);
  __syncthreads();

  if (threadIdx.x < kWarpgroup) {
    give_registers<kFew>();
    if (threadIdx.x == 0) bring(args, shared, head, row0, int(b));
    if (threadIdx.x / 32 == 1) clean(a, mask, shared);
  } else {
    take_registers<kMany>();
    compute<EXTRAS>(args.forward, mask, shared, head, b, row0, last_row, lost);
  }
}

namespace {

template <class T, int D, bool EXTRAS>
void forward(const AttentionForward& f, DType dtype, Place place) {
  constexpr int N = kKeys<D, EXTRAS>;
  const Attention& a = f.attention;
  const int batch = a.cu_q ? 1 : a.sequences, kv_heads = a.heads / a.group;
  const ForwardArgs args{tensor_map("q", a.q, {a.d, a.heads, a.sq, batch}, dtype, kRows),
                         tensor_map("k", a.k, {a.d, kv_heads, a.sk, batch}, dtype, N),
                         tensor_map("v", a.v, {a.d, kv_heads, a.sk, batch}, dtype, N), f};
  launch(attention_fwd_kernel<T, D, EXTRAS>, grid_size(blocks_of(a.sq, kTile) * a.heads * batch), kThreads,
         sizeof(ForwardShared<T, D, N>), place.stream, args);
}

}  // namespace

}  // namespace sm90

void attention_fwd_sm90(AttentionForward f, DType dtype, Place place) {
  using namespace sm90;
  const Attention& a = f.attention;
  if (a.sq == 0 || a.sequences == 0) return;
  check_arguments(a, dtype);
  const OnDevice here(place.device);
  f.wide = is_wide(f.out, int64_t(a.d), sizeof(uint16_t));
  choose_kernel(a, dtype, [&](auto type, auto d, auto extras) {
    forward<decltype(type), decltype(d)::value, decltype(extras)::value>(f, dtype, place);
  });
}

}  // namespace fastlm::cuda
