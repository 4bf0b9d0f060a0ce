// Shared by attention's forward and backward: the bounds of a sequence, and tiles of scores.
//
// The lanes of a vector are queries: a tile of scores is (keys, QUERIES), one key per row. The softmax then needs no
// sum across lanes, and the products (gemm.h) read k and v without a transpose. Only blocks of q and dout are
// transposed.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "attention.h"
#include "gemm.h"
#include "math.h"
#include "philox_many.h"
#include "simd.h"

namespace fastlm::cpu {

constexpr int64_t QUERIES = 64;  // of a tile, and the stride of its rows: four AVX-512 registers
constexpr int64_t KEYS = 96;     // of a tile: a multiple of gemm's 6 rows and of dropout's 16 keys; 24 KB of scores
constexpr float INF = std::numeric_limits<float>::infinity();

static inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One sequence. Keys outside of [first, last) are padding. mask is null if all keys inside are real.
struct Sequence {
  int64_t b, sq, sk, row_q, row_k;  // row_q, row_k: the first row in a contiguous tensor
  int64_t first, last, offset;      // query i is aligned with key i + offset
  const uint8_t* mask;

  Sequence(const Attention& a, int64_t index) : b(index), mask(nullptr) {
    row_q = a.cu_q ? a.cu_q[b] : b * a.sq;
    row_k = a.cu_k ? a.cu_k[b] : b * a.sk;
    sq = a.cu_q ? a.cu_q[b + 1] - row_q : a.sq;
    sk = a.cu_k ? a.cu_k[b + 1] - row_k : a.lengths_k ? a.lengths_k[b] : a.sk;
    first = 0, last = sk, offset = sk - sq;
    if (a.key_mask) {
      const uint8_t* real = a.key_mask + b * sk;
      while (first < last && !real[first]) ++first;
      while (first < last && !real[last - 1]) --last;
      if (std::find(real + first, real + last, 0) != real + last) mask = real;
    }
  }

  // The keys that some query of [i, i + count) may see are [lo, hi); none if lo >= hi.
  int64_t lo(const Attention& a, int64_t i) const { return a.left < 0 ? first : std::max(first, i + offset - a.left); }
  int64_t hi(const Attention& a, int64_t i, int64_t count) const {
    return a.right < 0 ? last : std::min(last, i + count + offset + a.right);
  }
};

// The number of rows of the longest sequence.
inline int64_t longest(const int32_t* cu, int64_t batch, int64_t rows) {
  int64_t most = cu ? 0 : rows;
  for (int64_t b = 0; cu && b < batch; ++b) most = std::max<int64_t>(most, cu[b + 1] - cu[b]);
  return most;
}

// At most `threads`, each with 2^18 products of q and k elements or more: some microseconds, worth starting a thread.
inline int worthwhile(const Attention& a, int threads) {
  int64_t pairs = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t sk = a.cu_k ? a.cu_k[b + 1] - a.cu_k[b] : a.lengths_k ? a.lengths_k[b] : a.sk;
    pairs += (a.cu_q ? a.cu_q[b + 1] - a.cu_q[b] : a.sq) * sk;
  }
  return int(std::clamp<int64_t>(pairs * a.heads * a.d >> 18, 1, std::max(threads, 1)));
}

// The first row of sequence b and a head in a tensor of given strides.
template <class T>
inline const T* rows_of(const void* x, const Strides& stride, int64_t b, const int32_t* cu, int64_t head) {
  return static_cast<const T*>(x) + (cu ? cu[b] * stride.row : b * stride.sequence) + head * stride.head;
}

// dst (padded_rows, ld) = scale * src (rows, d). Padding, and rows that are not real in `mask`, are 0.
template <class T>
FASTLM_CLONES void load_rows(const T* src, int64_t stride, int64_t rows, int64_t d, float scale, const uint8_t* mask,
                             float* dst, int64_t ld, int64_t padded_rows) {
  for (int64_t r = 0; r < padded_rows; ++r) {
    float* y = dst + r * ld;
    const int64_t n = r >= rows || (mask && !mask[r]) ? 0 : d;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) y[c] = load(src + r * stride + c) * scale;
    for (int64_t c = n; c < ld; ++c) y[c] = 0.0f;
  }
}

// dst (rows, d) = scale * src (rows, ld).
template <class T>
FASTLM_CLONES void write_rows(const float* src, int64_t ld, int64_t rows, int64_t d, float scale, T* dst,
                              int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) store(dst + r * stride + c, src[r * ld + c] * scale);
  }
}

// dst (cols, ld_dst) = srcᵀ (rows, ld_src); rows and cols are multiples of 4. The compiler turns the 4 x 4 blocks into
// shuffles: 0.9 us for 64 x 64; the plain loop takes 2.5.
[[maybe_unused]] FASTLM_CLONES static void transpose(const float* src, int64_t ld_src, int64_t rows, int64_t cols,
                                                     float* dst, int64_t ld_dst) {
  for (int64_t c = 0; c < cols; c += 4) {
    for (int64_t r = 0; r < rows; r += 4) {
      float t[4][4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) t[j][i] = src[(r + i) * ld_src + c + j];
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) dst[(c + j) * ld_dst + r + i] = t[j][i];
      }
    }
  }
}

// The bias of one head by relative position: element i - j + sk - 1 belongs to query i and key j, so the lanes of a row
// of scores read neighbouring elements. QUERIES zeros follow, for lanes past the last query.
inline int64_t bias_size(const Sequence& s) { return s.sq + s.sk + QUERIES; }

inline int64_t bucket_of(const Attention& a, int64_t relative) {  // key minus query
  const int64_t distance = a.bidirectional ? std::abs(relative) : std::max<int64_t>(0, -relative);
  const int64_t bucket = std::upper_bound(a.starts, a.starts + a.one_way, distance) - a.starts - 1;
  return bucket + (a.bidirectional && relative > 0 ? a.one_way : 0);
}

// The buckets of all relative positions, found once a call: a search for each head takes as long as a third of forward
// on AMX. Empty without a table.
class Buckets {
 public:
  Buckets(const Attention& a, int64_t max_sq, int64_t max_sk) : first_(max_sk - 1) {
    if (!a.table) return;
    for (int64_t relative = 1 - max_sk; relative < max_sq; ++relative) {
      buckets_.push_back(int32_t(bucket_of(a, relative)));
    }
  }

  // Of an element of a bias by relative position.
  int64_t at(const Sequence& s, int64_t element) const { return buckets_[s.sk - 1 - element - s.offset + first_]; }

 private:
  int64_t first_;
  std::vector<int32_t> buckets_;
};

inline void expand_bias(const Attention& a, const Buckets& buckets, const Sequence& s, int64_t head, float* bias) {
  for (int64_t t = 0; t < s.sq + s.sk - 1; ++t) bias[t] = a.table[buckets.at(s, t) * a.heads + head];
  std::fill(bias + std::max<int64_t>(0, s.sq + s.sk - 1), bias + bias_size(s), 0.0f);
}

FASTLM_CLONES static void add_bias(float* scores, int64_t n, int64_t lanes, const float* bias) {
  for (int64_t j = 0; j < n; ++j) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) scores[j * QUERIES + i] += bias[i - j];
  }
}

// Sets scores to -inf where a query does not see a key. The tile: keys [j0, j0 + n), queries [i0, i0 + count) in
// `lanes` lanes.
inline void mask_scores(const Attention& a, const Sequence& s, int64_t i0, int64_t count, int64_t lanes, int64_t j0,
                        int64_t n, float* scores) {
  const bool left = a.left >= 0 && j0 < i0 + count - 1 + s.offset - a.left;
  const bool right = a.right >= 0 && j0 + n - 1 > i0 + s.offset + a.right;
  if (!left && !right && !s.mask) return;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t lane = j0 + j - s.offset - i0;  // of the query that is aligned with this key
    const bool real = !s.mask || s.mask[j0 + j];
    const int64_t begin = right ? std::clamp<int64_t>(lane - a.right, 0, lanes) : 0;
    const int64_t end = !real ? begin : left ? std::clamp<int64_t>(lane + a.left + 1, begin, lanes) : lanes;
    float* row = scores + j * QUERIES;
    std::fill(row, row + begin, -INF);
    std::fill(row + end, row + lanes, -INF);
  }
}

// scores = c tanh(scores/c). slope, unless null: the derivative, 1 - tanh².
FASTLM_CLONES static void cap_scores(float* scores, int64_t n, int64_t lanes, float c, float* slope) {
  for (int64_t j = 0; j < n; ++j) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) scores[j * QUERIES + i] = fast_tanh(scores[j * QUERIES + i] / c);
    if (slope) {
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) {
        slope[j * QUERIES + i] = 1.0f - scores[j * QUERIES + i] * scores[j * QUERIES + i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) scores[j * QUERIES + i] *= c;
  }
}

// Scores of a tile, (n, QUERIES): scale k (n, ld) qt (d, QUERIES), with softcap (slope: its derivative, or null), bias
// and mask.
inline void score_tile(const Attention& a, const Sequence& s, int64_t i0, int64_t count, int64_t lanes, int64_t j0,
                       int64_t n, const float* k, int64_t ld, const float* qt, const float* bias, float* scores,
                       float* slope = nullptr) {
  gemm(A::plain, n, lanes, a.d, a.scale, k, ld, qt, QUERIES, scores, QUERIES);
  if (a.softcap > 0.0f) cap_scores(scores, n, lanes, a.softcap, slope);
  if (bias) add_bias(scores, n, lanes, bias + i0 - j0 + s.sk - 1);
  mask_scores(a, s, i0, count, lanes, j0, n, scores);
}

// Dropout's bytes for sixteen keys, 16 group + 0..15, and a tile's queries: byte m%4 of words.word[m/4][lane] is for
// key m.
inline void draw(int64_t group, int64_t i0, int64_t sequence_head, Key key, int64_t lanes, Lanes& words) {
  philox_block(words, {1, lanes, uint32_t(group), uint32_t(i0), uint32_t(sequence_head)}, key);
}

FASTLM_INLINE bool kept(uint32_t word, int64_t key, uint32_t threshold) {
  return ((word >> (8 * (key % 4))) & 0xFFu) >= threshold;
}

}  // namespace fastlm::cpu
