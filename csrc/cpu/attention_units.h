// attention in bfloat16 on the bfloat16 units (units.h): one thread's part of forward and of backward, and what both
// pack. Products take bfloat16 and sum in float; the softmax is float, with exponents in units of log 2.
//
// Operands of a tile, keys x queries, whose scores have a row for each key:
//   s = k qᵀ       k by rows              q by columns, (d, queries)
//   oᵀ += vᵀ p     v transposed           p as it is
//   dp = v doutᵀ   v by rows              dout by columns
//   dv += p dout   p by rows              dout as it is
//   dk += ds q     ds by rows             q as it is
//   dqᵀ += kᵀ ds   k transposed           ds as it is
#pragma once

#include "attention_tile.h"
#include "parallel.h"
#include "units.h"

namespace fastlm::cpu {

static_assert(QUERIES == UNIT_QUERIES);
constexpr int64_t UNIT_KEYS = 128;  // of a tile: scores of 32 KB
constexpr float LOG2E = 1.44269504f;

using Floats = std::unique_ptr<float[], Free>;
using Bf16s = std::unique_ptr<bfloat16[], Free>;
using Words32 = std::unique_ptr<uint32_t[], Free>;

// The sizes that the buffers of a thread have.
struct UnitSizes {
  int64_t d, rows;  // d rounded up to 32 and to 16
  int64_t keys;     // the most of a sequence, rounded up to 32
  int64_t bias;     // elements of a bias: attention_tile.h's, after a margin for the last rows of a tile

  static constexpr int64_t MARGIN = 16;

  UnitSizes(const Attention& a, int64_t max_sq, int64_t max_sk)
      : d(round_up(a.d, UNIT_DEPTH)),
        rows(round_up(a.d, 16)),
        keys(round_up(max_sk, UNIT_DEPTH)),
        bias(MARGIN + max_sq + max_sk + QUERIES) {}
};

// The rows of a head: queries, keys or values.
struct HeadRows {
  const bfloat16* data;
  int64_t stride;
  int64_t first, last;  // rows outside of [first, last), and those that are not real in `mask`, are zero
  const uint8_t* mask;  // or null
};

// to (count, ld): rows [begin, begin + count), zero from column d on.
void pack_rows(const HeadRows& x, int64_t begin, int64_t count, int64_t d, bfloat16* to, int64_t ld);

struct BlockRows {
  const bfloat16* data;
  int64_t ld;

  const uint32_t* words() const { return reinterpret_cast<const uint32_t*>(data); }
};

// The same rows where they are if they need no zeros, and are whole words; else packed into `to`.
BlockRows block_rows(const HeadRows& x, int64_t begin, int64_t count, int64_t d, bfloat16* to, int64_t ld);

// words (count / 2, columns) = rows as they are, for a right operand; count is even.
void pack_pairs(const bfloat16* rows, int64_t ld, int64_t count, int64_t columns, uint32_t* words);

// Begins to read rows of a head into the second-level cache; `write`: to write them. The rows of a head are two lines
// each, far from each other, which the machine's own prefetchers miss: backward of 8 x 128 took a quarter longer
// without; forward reads less, and gained nothing.
void prefetch_rows(const bfloat16* rows, int64_t stride, int64_t count, int64_t d, bool write);

// panels (count / 32, sizes.rows, 32) = rows [begin, begin + count) transposed, for a left operand: a panel has 32
// rows. rows (32, sizes.d) and pairs (16, sizes.d): scratch.
void pack_transposed(const Units& units, const UnitSizes& sizes, const HeadRows& x, int64_t begin, int64_t count,
                     int64_t d, bfloat16* rows, uint32_t* pairs, bfloat16* panels);

// The left operand that those panels are, from row `begin` (a multiple of 32 after the first) on.
inline Left transposed_from(const bfloat16* panels, const UnitSizes& sizes, int64_t begin) {
  return {panels + begin * sizes.rows, UNIT_DEPTH, sizes.rows * UNIT_DEPTH};
}

// The scores of a tile: keys [j0, j0 + n), queries [i0, i0 + count) in `lanes` lanes. Keys before `lo` are not visible.
struct UnitScores {
  int64_t i0, count, lanes, j0, n, lo;
  Left k;
  const uint32_t* q;
  const float* bias;  // expanded, or null
  float* scores;
  float* slope;  // of the softcap, or null
  Lanes* drop;
};
UnitTile unit_scores(const Units& units, const Attention& a, const Sequence& s, const UnitSizes& sizes,
                     const UnitScores& t, int64_t head, Key key);

// expand_bias in units of log 2, behind the margin.
void expand_unit_bias(const Attention& a, const Buckets& buckets, const Sequence& s, int64_t head, float* bias);

// to (count, d) with a stride = x (sizes.rows, QUERIES) with a factor for each lane, transposed. words (sizes.d / 2,
// QUERIES) and rows (QUERIES, sizes.d): scratch.
void write_transposed(const Units& units, const UnitSizes& sizes, const float* x, const float* factor, int64_t count,
                      int64_t d, uint32_t* words, bfloat16* rows, bfloat16* to, int64_t stride);

// A thread's part of forward: the blocks of queries [begin, end) of a sequence and head. out, lse: whole tensors.
class UnitForward {
 public:
  UnitForward(const Attention& a, const Buckets& buckets, int64_t max_sq, int64_t max_sk);
  void task(const Sequence& s, int64_t head, int64_t begin, int64_t end, Key key, bfloat16* out, float* lse);

 private:
  void block(const Sequence& s, int64_t head, int64_t base, int64_t i0, int64_t count, Key key);

  const Attention& a_;
  const Buckets& buckets_;
  const Units& units_;
  UnitSizes sizes_;
  UnitsInUse in_use_;
  Bf16s k_, vt_, rows_;
  Words32 q_, p_, pairs_;
  Floats bias_, ot_, scores_;
  std::unique_ptr<Lanes[], Free> drop_;
  alignas(64) float max_[QUERIES], sum_[QUERIES], factor_[QUERIES], lse_[QUERIES];
};

// A thread's part of backward: a sequence and query head.
class UnitBackward {
 public:
  // tasks: how many heads lie between this one and the thread's next.
  UnitBackward(const Attention& a, const Buckets& buckets, int64_t max_sq, int64_t max_sk, int64_t tasks);
  void task(const AttentionBackward& g, const Sequence& s, int64_t head, Key key);

 private:
  void load_block(const AttentionBackward& g, const Sequence& s, int64_t head, int64_t i0, int64_t count);
  void tile(const AttentionBackward& g, const Sequence& s, int64_t head, int64_t i0, int64_t count, int64_t j0,
            int64_t n, int64_t lo, bool first, Key key);

  const Attention& a_;
  const Buckets& buckets_;
  const int64_t tasks_;
  const Units& units_;
  UnitSizes sizes_;
  UnitsInUse in_use_;
  Bf16s k_, v_, kt_, rows_, p_, ds_;
  Words32 q_, dout_, out_, q_pairs_, dout_pairs_, pairs_, ds_words_;
  Floats dk_, dv_, dqt_, bias_, dbias_, scores_, products_, slope_;
  std::unique_ptr<Lanes[], Free> drop_;
  alignas(64) float lse_[QUERIES], delta_[QUERIES], factor_[QUERIES];
};

}  // namespace fastlm::cpu
