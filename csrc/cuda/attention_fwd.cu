// attention, forward: a block computes a tile of queries of one head and goes through blocks of keys with the online
// softmax. The maths: fastlm/ops/attention.py.
//
// A warp computes all columns of its rows: scores, probabilities and output stay in its registers, and the maximum of a
// row is taken over four lanes. While a block of keys and values is processed, cp.async loads the next one; a step has
// one barrier, where the loads arrive.
#include "attention_dropout.cuh"

namespace fastlm::cuda {

// With two tiles of sixteen rows per warp, k and v are read half as often from shared memory; at d 256 the registers do
// not hold two.
template <class T, int D>
struct ForwardShape : Shape<D <= 128 ? 2 : 1, D <= 64 ? 8 : 4, 4, 2, 2> {};
template <int D>
struct ForwardShape<float, D> : Shape<1, D <= 128 ? 4 : 2, D <= 128 ? 4 : 2, 2, 2> {};

template <class T, int D>
struct ForwardShared {
  using S = ForwardShape<T, D>;
  T q[S::M * D], k[S::STAGES][S::N * D], v[S::STAGES][S::N * D];
  RowSight<S::M> sight;
  RowDropout<S::M> dropout;
  Plan plan;  // in shared memory, to save registers
  Bytes bytes;
  int buffer[3 * S::WARPS];
};

template <class T, int D, bool EXTRAS>
__global__ void __launch_bounds__(ForwardShape<T, D>::THREADS, ForwardShape<T, D>::BLOCKS)
    attention_fwd_kernel(const AttentionForward f) {
  using S = ForwardShape<T, D>;
  constexpr int MT = S::MT, NT = S::NT, M = S::M, N = S::N;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<ForwardShared<T, D>*>(memory);
  const Attention& a = f.attention;
  const bool drops = EXTRAS && a.dropout.threshold, biased = EXTRAS && a.bias, capped = EXTRAS && a.softcap > 0.0f;
  const int warp_row = threadIdx.x / 32 * 16 * MT, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  // With a causal mask the last tiles see the most keys, so they start first.
  const int tiles = (a.sq + M - 1) / M, head = blockIdx.x / tiles % a.heads;
  const int tile = a.right >= 0 ? tiles - 1 - int(blockIdx.x % tiles) : int(blockIdx.x % tiles);
  const int64_t b = blockIdx.x / tiles / a.heads;
  const int row0 = tile * M, last_row = min(row0 + M, a.sq) - 1;
  const uint8_t* mask = a.key_mask ? a.key_mask + b * a.sk : nullptr;
  const Slice<T> q_rows(a.q, b, head), k_rows(a.k, b, head / a.group), v_rows(a.v, b, head / a.group);
  load_rows<T, D, M, S::THREADS>(shared.q, q_rows, row0, last_row + 1, nullptr, a.d);

  RealKeys real{0, a.sk, false};
  if (mask) real = real_keys<S::WARPS>(mask, a.sk, shared.buffer);
  const Sight sight{{a.cu_q, a.sq}, {a.cu_k, a.sk}, a.left, a.right, a.far, a.far_right, real.first, real.end};
  // A plain block takes the maximum before scaling, which is wrong for a scale of 0 or less.
  if (threadIdx.x == 0) {
    shared.plan = make_plan<N>(sight, a.sequences, row0, last_row, !real.holes && a.scale > 0.0f, biased);
    if (drops) shared.bytes = Bytes(a.dropout);
  }
  const bool wrong =
      sight.rows.template wrong<S::THREADS>(a.sequences) || sight.cols.template wrong<S::THREADS>(a.sequences);
  const bool lost = __syncthreads_or(wrong);
  const Plan& plan = shared.plan;
  if (threadIdx.x < M) set_query(shared.sight, shared.dropout, sight, plan, int(b), head, a.heads, row0, last_row);
  const bool straddles = a.cu_q && plan.first != plan.last;

  auto fetch = [&](int step) {
    const int col0 = plan.column(step, N);
    load_rows<T, D, N, S::THREADS>(shared.k[step % S::STAGES], k_rows, col0, plan.hi, mask, a.d);
    load_rows<T, D, N, S::THREADS>(shared.v[step % S::STAGES], v_rows, col0, plan.hi, mask, a.d);
  };
  if (plan.count > 0) fetch(0);
  copies_arrive();
  __syncthreads();

  const Left<T, D, MT, sizeof(T) == 2 && D <= 64> q(shared.q + warp_row * D);
  const float* bias = biased ? a.bias + int64_t(head) * (2 * a.far + 1) : nullptr;
  float maximum[MT][2], total[MT][2], acc[MT][D / 8][4];
  clear(acc);
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + warp_row + 16 * m + 8 * h + g;
      maximum[m][h] = -kInf;
      // A row of no sequence gets NaN, and so does every row if cu_seqlens are wrong: lse carries it into backward.
      total[m][h] = lost || row < plan.known.lo || row >= plan.known.hi ? kNaN : 0.0f;
    }
  }

  for (int step = 0; step < plan.count; ++step) {
    if (step > 0) next_stage<S::STAGES>([&] { fetch(step); });
    if (S::STAGES > 1 && step + 1 < plan.count) fetch(step + 1);
    const int col0 = plan.column(step, N);
    float s[MT][NT][4], factor = a.scale * kUnit<T>, shift = 0.0f;
    product(s, q, shared.k[step % S::STAGES]);
    if (capped) factor = cap_scores<T>(s, factor, a.softcap);
    if (step >= plan.plain()) {
      const RealColumns<NT> columns(mask, col0, plan.hi);
      factor = finish_scores(s, factor, shared.sight, warp_row, col0, columns, bias, a.far, 1);
    } else if (biased) {
      shift = bias[plan.before(step) ? 0 : 2 * a.far];
    }

#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = -kInf;
#pragma unroll
        for (int n = 0; n < NT; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
        top = fmaxf(maximum[m][h], fmaf(top, factor, shift));
        const float least = top == -kInf ? 0.0f : top;  // a row that has seen no key yet
        const float rescale = power<T>(maximum[m][h] - least);
        maximum[m][h] = top;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& p = s[m][n][2 * h + e];
            p = power<T>(fmaf(p, factor, shift - least));
            sum += p;
          }
        }
        total[m][h] = fmaf(total[m][h], rescale, sum);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          acc[m][n][2 * h] *= rescale;
          acc[m][n][2 * h + 1] *= rescale;
        }
      }
    }
    if (drops)
      KeptKeys<MT, NT>(shared.bytes, shared.dropout, warp_row, col0, straddles && step >= plan.plain()).apply(s, 1.0f);
    accumulate<T, D>(acc, s, shared.v[step % S::STAGES], 0);
  }

#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& sum = total[m][h];
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
      const bool empty = sum == 0.0f;
      const int row = row0 + warp_row + 16 * m + 8 * h + g;
      if (t == 0 && row <= last_row) {
        const float lse = sizeof(T) == 4 ? maximum[m][h] + logf(sum) : (maximum[m][h] + log2f(sum)) * kLn2;
        f.lse[(b * a.heads + head) * a.sq + row] = empty ? -kInf : lse;
      }
      sum = empty ? 0.0f : (drops ? a.dropout.scale : 1.0f) / sum;
    }
  }
  const int first = row0 + warp_row;
  T* out = static_cast<T*>(f.out) + ((b * a.sq + first) * a.heads + head) * a.d;
  store_rows<T, D>(out, int64_t(a.heads) * a.d, last_row + 1 - first, a.d, f.wide, acc, total, shared.q + warp_row * D,
                   0);
}

namespace {

template <class T, int D, bool EXTRAS>
void forward(const AttentionForward& f, Place place) {
  using S = ForwardShape<T, D>;
  static_assert(sizeof(ForwardShared<T, D>) <= kMostShared);
  const Attention& a = f.attention;
  const int64_t batch = a.cu_q ? 1 : a.sequences;
  launch(attention_fwd_kernel<T, D, EXTRAS>, grid_size(blocks_of(a.sq, S::M) * a.heads * batch), S::THREADS,
         sizeof(ForwardShared<T, D>), place.stream, f);
}

}  // namespace

void attention_fwd(AttentionForward f, DType dtype, Place place) {
  Attention& a = f.attention;
  if (a.sq == 0 || a.sequences == 0) return;
  const OnDevice here(place.device);
  const size_t item = dtype == DType::f32 ? 4 : 2;
  for (Rows* x : {&a.q, &a.k, &a.v}) x->wide = is_wide(*x, a.d, item);
  f.wide = is_wide(f.out, int64_t(a.d), item);
  choose(a, dtype, [&](auto type, auto d, auto extras) {
    forward<decltype(type), decltype(d)::value, decltype(extras)::value>(f, place);
  });
}

}  // namespace fastlm::cuda
