// mlm_mask: the definition is in fastlm/ops/mlm_mask.py. No host synchronisation, no atomics.
//
// Three kernels over blocks of kMaskBlock tokens of the flattened input, the first for whole words only:
//   mlm_mask_words     the last token of a block that starts a word
//   mlm_mask_select    ids and labels, a flag a token, and the number selected in a block
//   mlm_mask_compact   a selected token's slot is the number selected before it
// A block needs the first token of a word and the numbers selected in earlier blocks. It reads them from all blocks
// before it, one number each, which is cheap up to many millions of tokens. A thread has kTokens neighbouring tokens:
// 32 bytes of ids, in accesses of 16 bytes.
#include <algorithm>
#include <limits>

#include "launch.h"
#include "mlm_mask.h"
#include "philox.h"

namespace fastlm::cuda {

constexpr int kTokens = 4, kMaskThreads = kMaskBlock / kTokens, kMaskWarps = kMaskThreads / 32;
constexpr int64_t kIgnore = -100;

struct Add {
  static constexpr int32_t kNothing = 0;
  __device__ static int32_t join(int32_t a, int32_t b) { return a + b; }
};
struct Larger {
  static constexpr int32_t kNothing = -1;
  __device__ static int32_t join(int32_t a, int32_t b) { return max(a, b); }
};

// Combines x over the threads of a block: returns the result of the threads before this one, and sets `total` to that
// of all. The function has the barriers that `buffer` needs.
template <class Op>
__device__ int32_t scan_before(int32_t x, int32_t& total, int32_t* buffer) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t upto = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int32_t other = __shfl_up_sync(0xFFFFFFFFu, upto, offset);
    if (lane >= offset) upto = Op::join(other, upto);
  }
  __syncthreads();
  if (lane == 31) buffer[warp] = upto;
  __syncthreads();
  int32_t before = Op::kNothing;
  total = Op::kNothing;
#pragma unroll
  for (int k = 0; k < kMaskWarps; ++k) {
    if (k < warp) before = Op::join(before, buffer[k]);
    total = Op::join(total, buffer[k]);
  }
  const int32_t mine = __shfl_up_sync(0xFFFFFFFFu, upto, 1);
  return lane == 0 ? before : Op::join(before, mine);
}

// Combines from[0, count); all threads of a block get the result.
template <class Op>
__device__ int32_t join_all(const int32_t* from, int count, int32_t* buffer) {
  int32_t x = Op::kNothing, total;
  for (int k = threadIdx.x; k < count; k += kMaskThreads) x = Op::join(x, from[k]);
  scan_before<Op>(x, total, buffer);
  return total;
}

// Two neighbouring elements of an array that has `left` more: 16 bytes at once; one by one if not `wide`, or at the
// end.
__device__ __forceinline__ void load_pair(const int64_t* from, int64_t left, bool wide, int64_t* to) {
  if (wide && left >= 2) {
    const longlong2 pair = *reinterpret_cast<const longlong2*>(from);
    to[0] = pair.x;
    to[1] = pair.y;
    return;
  }
  to[0] = left > 0 ? from[0] : 0;
  to[1] = left > 1 ? from[1] : 0;
}

__device__ __forceinline__ void store_pair(int64_t* to, int64_t left, bool wide, const int64_t* from) {
  if (wide && left >= 2) {
    *reinterpret_cast<longlong2*>(to) = longlong2{from[0], from[1]};
    return;
  }
  if (left > 0) to[0] = from[0];
  if (left > 1) to[1] = from[1];
}

__device__ __forceinline__ int64_t number(const PerToken& of, int64_t row, int64_t col) {
  return of.data[row * of.stride_row + col * of.stride_col];
}

__device__ __forceinline__ bool is_special(const MlmMask& a, int32_t token, int64_t id) {
  if (a.special_tokens_mask) return a.special_tokens_mask[token];
  bool special = false;
  for (int k = 0; k < a.special_ids.count; ++k) {
    special |= id >= a.special_ids.first[k] && id < int64_t(a.special_ids.first[k]) + a.special_ids.length[k];
  }
  return special;
}

__device__ __forceinline__ Words words(const MlmMask& a, int32_t token, Key key) {
  const int32_t cols = int32_t(a.cols), row = token / cols, col = token - row * cols;
  const uint64_t sample = a.sample_ids.data ? number(a.sample_ids, row, col) : row;
  const uint32_t position = uint32_t(a.positions.data ? number(a.positions, row, col) : col);
  const uint32_t epoch = uint32_t(a.epochs.data ? number(a.epochs, row, col) : a.epoch);
  return philox(position, epoch, uint32_t(sample), uint32_t(sample >> 32), key);
}

// Whether a token starts a word: word_starts is set, it is the first of a row or a sample, or it follows a special
// token.
__device__ __forceinline__ bool starts_word(const MlmMask& a, int32_t token) {
  const int32_t cols = int32_t(a.cols), row = token / cols, col = token - row * cols;
  if (col == 0 || a.word_starts[token] || is_special(a, token - 1, a.input_ids[token - 1])) return true;
  if (a.sample_ids.data && number(a.sample_ids, row, col) != number(a.sample_ids, row, col - 1)) return true;
  return a.epochs.data && uint32_t(number(a.epochs, row, col)) != uint32_t(number(a.epochs, row, col - 1));
}

__global__ void __launch_bounds__(kMaskThreads) mlm_mask_words(const MlmMask a) {
  __shared__ int32_t buffer[kMaskWarps];
  const int32_t tokens = int32_t(a.rows * a.cols);
  int32_t last = -1, total;
  for (int k = 0; k < kTokens; ++k) {
    const int64_t token = int64_t(blockIdx.x) * kMaskBlock + threadIdx.x * kTokens + k;
    if (token < tokens && starts_word(a, int32_t(token))) last = int32_t(token);
  }
  scan_before<Larger>(last, total, buffer);
  if (threadIdx.x == 0) a.last[blockIdx.x] = total;
}

// Five blocks a multiprocessor: for six ptxas stops at 40 registers on sm_90, and spills.
__global__ void __launch_bounds__(kMaskThreads, 5) mlm_mask_select(const MlmMask a) {
  __shared__ int32_t buffer[kMaskWarps];
  const int64_t tokens = a.rows * a.cols, begin = int64_t(blockIdx.x) * kMaskBlock + threadIdx.x * kTokens;
  const Key key = make_key(uint64_t(a.seed), kMaskDomain);
  int64_t ids[kTokens];
#pragma unroll
  for (int k = 0; k < kTokens; k += 2) load_pair(a.input_ids + begin + k, tokens - begin - k, a.wide, ids + k);

  int32_t first[kTokens], total;  // of each token's word
  if (a.word_starts) {
    int32_t last = -1;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (begin + k < tokens && starts_word(a, int32_t(begin + k))) last = int32_t(begin + k);
      first[k] = last;
    }
    int32_t before = scan_before<Larger>(last, total, buffer);
    before = max(before, join_all<Larger>(a.last, blockIdx.x, buffer));
#pragma unroll
    for (int k = 0; k < kTokens; ++k) first[k] = max(first[k], before);
  }

  const uint32_t choices = uint32_t(a.vocab_size) - [&] {
    uint32_t n = 0;
    for (int k = 0; k < a.left_out.count; ++k) n += uint32_t(a.left_out.length[k]);
    return n;
  }();
  int32_t selected = 0;
#pragma unroll
  for (int k = 0; k < kTokens; k += 2) {
    int64_t out[2] = {}, labels[2] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (begin + k + j >= tokens) break;
      const int32_t token = int32_t(begin + k + j);
      const int64_t id = ids[k + j];
      const Words w = words(a, token, key);
      const uint32_t r0 = a.word_starts ? words(a, first[k + j], key).r0 : w.r0;
      const bool hit = r0 < a.select_below && !is_special(a, token, id);
      int64_t to = id;
      if (w.r1 < a.mask_below) {
        to = a.mask_token_id;
      } else if (w.r1 < a.replace_below) {
        // The j-th of the remaining ids: j, plus the length of every left-out range at or below it, in ascending order.
        to = int64_t(uint64_t(w.r2) * choices >> 32);
        for (int n = 0; n < a.left_out.count; ++n) to += to >= a.left_out.first[n] ? a.left_out.length[n] : 0;
      }
      out[j] = hit ? to : id;
      labels[j] = hit ? id : kIgnore;
      a.flags[token] = hit;
      selected += hit;
    }
    store_pair(a.input_ids_out + begin + k, tokens - begin - k, a.wide, out);
    store_pair(a.labels + begin + k, tokens - begin - k, a.wide, labels);
  }
  scan_before<Add>(selected, total, buffer);
  if (threadIdx.x == 0) a.counts[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kMaskThreads) mlm_mask_compact(const MlmMask a, int blocks) {
  __shared__ int32_t buffer[kMaskWarps];
  const int64_t tokens = a.rows * a.cols, begin = int64_t(blockIdx.x) * kMaskBlock + threadIdx.x * kTokens;
  const int32_t before = join_all<Add>(a.counts, min(int(blockIdx.x), blocks), buffer);
  const int32_t all = join_all<Add>(a.counts, blocks, buffer);
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.count = all;

  bool hit[kTokens];
  int32_t mine = 0, total;
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    hit[k] = begin + k < tokens && a.flags[begin + k];
    mine += hit[k];
  }
  int64_t slot = before + scan_before<Add>(mine, total, buffer);
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    if (hit[k] && slot < a.capacity) {
      a.index[slot] = begin + k;
      a.targets[slot] = a.input_ids[begin + k];
    }
    slot += hit[k];
    // Slots without a token: this thread fills its share of all slots.
    if (begin + k >= all && begin + k < a.capacity) {
      a.index[begin + k] = 0;
      a.targets[begin + k] = kIgnore;
    }
  }
}

void mlm_mask(const MlmMask& args, Place place) {
  MlmMask a = args;
  const int64_t tokens = a.rows * a.cols;
  if (tokens > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("input_ids: expected fewer than 2^31 tokens, got " + std::to_string(tokens) +
                                "; split them");
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a.input_ids) | reinterpret_cast<uintptr_t>(a.input_ids_out) |
                              reinterpret_cast<uintptr_t>(a.labels);
  a.wide = addresses % 16 == 0;
  const OnDevice here(place.device);
  const int blocks = int((tokens + kMaskBlock - 1) / kMaskBlock);
  if (blocks && a.word_starts) launch(mlm_mask_words, blocks, kMaskThreads, 0, place.stream, a);
  if (blocks) launch(mlm_mask_select, blocks, kMaskThreads, 0, place.stream, a);
  const int64_t slots = (a.capacity + kMaskBlock - 1) / kMaskBlock;
  launch(mlm_mask_compact, grid_size(std::max<int64_t>({1, blocks, slots})), kMaskThreads, 0, place.stream, a, blocks);
}

}  // namespace fastlm::cuda
