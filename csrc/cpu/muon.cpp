// muon: what surrounds the iterations of a matrix, one pass over memory before them and one after. The maths:
// fastlm/train/muon.py.
#include "muon.h"

#include "parallel.h"

namespace fastlm::cpu {
namespace {

constexpr int64_t BLOCK = 16384;

template <class G, class U>
FASTLM_CLONES void direction(const MuonDirection& a, int64_t begin, int64_t end) {
  const G* g = static_cast<const G*>(a.g);
  U* u = static_cast<U*>(a.u);
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) {
    const float gj = load(g + j) * a.gradient, mj = a.momentum * a.m[j] + gj;
    a.m[j] = mj;
    store(u + j, gj + a.momentum * mj);
  }
}

template <class O, bool LOW>
FASTLM_CLONES void update(const MuonUpdate& a, int64_t begin, int64_t end) {
  const O* o = static_cast<const O*>(a.o);
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) {
    const float wj = a.decay * a.w[j] - a.step * load(o + j);
    a.w[j] = wj;
    if constexpr (LOW) store(a.low + j, wj);
  }
}

template <class Args>
void in_blocks(const Args& a, void (*run)(const Args&, int64_t, int64_t), int threads) {
  parallel_for(a.n, BLOCK, threads, [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

}  // namespace

void muon_direction(const MuonDirection& args, DType gradient, DType dtype, int threads) {
  if (gradient == DType::f32) {
    in_blocks(args, dtype == DType::f32 ? direction<float, float> : direction<float, bfloat16>, threads);
  } else {
    in_blocks(args, dtype == DType::f32 ? direction<bfloat16, float> : direction<bfloat16, bfloat16>, threads);
  }
}

void muon_update(const MuonUpdate& args, DType dtype, int threads) {
  if (args.low) {
    in_blocks(args, dtype == DType::f32 ? update<float, true> : update<bfloat16, true>, threads);
  } else {
    in_blocks(args, dtype == DType::f32 ? update<float, false> : update<bfloat16, false>, threads);
  }
}

}  // namespace fastlm::cpu
