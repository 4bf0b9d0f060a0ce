#include "attention_units.h"

namespace fastlm::cpu {

namespace {

// Whole words, so that rows can be transposed as such.
bool by_words(const bfloat16* x, int64_t stride) { return reinterpret_cast<uintptr_t>(x) % 4 == 0 && stride % 2 == 0; }

// Moves of a size that the compiler knows: a call of memcpy for each row takes three times as long.
FASTLM_INLINE void copy_row(const bfloat16* from, int64_t d, bfloat16* to) {
  int64_t c = 0;
  for (; c + UNIT_DEPTH <= d; c += UNIT_DEPTH) std::memcpy(to + c, from + c, UNIT_DEPTH * sizeof *to);
  if (c < d) std::memcpy(to + c, from + c, (d - c) * sizeof *to);
}

}  // namespace

FASTLM_CLONES void pack_rows(const HeadRows& x, int64_t begin, int64_t count, int64_t d, bfloat16* to, int64_t ld) {
  for (int64_t r = begin; r < begin + count; ++r, to += ld) {
    const int64_t n = r >= x.first && r < x.last && (!x.mask || x.mask[r]) ? d : 0;
    copy_row(x.data + r * x.stride, n, to);
    if (n < ld) std::memset(to + n, 0, (ld - n) * sizeof *to);
  }
}

void prefetch_rows(const bfloat16* rows, int64_t stride, int64_t count, int64_t d, bool write) {
  for (int64_t r = 0; r < count; ++r, rows += stride) {
    for (int64_t c = 0; c < d; c += UNIT_DEPTH) {
      write ? __builtin_prefetch(rows + c, 1, 2) : __builtin_prefetch(rows + c, 0, 2);
    }
  }
}

BlockRows block_rows(const HeadRows& x, int64_t begin, int64_t count, int64_t d, bfloat16* to, int64_t ld) {
  const bool whole = begin >= x.first && begin + count <= x.last && !x.mask && d == ld;
  if (whole && by_words(x.data, x.stride)) return {x.data + begin * x.stride, x.stride};
  pack_rows(x, begin, count, d, to, ld);
  return {to, ld};
}

FASTLM_CLONES void pack_pairs(const bfloat16* rows, int64_t ld, int64_t count, int64_t columns, uint32_t* words) {
  for (int64_t r = 0; r < count; r += 2, rows += 2 * ld, words += columns) {
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) words[c] = uint32_t(rows[c].bits) | uint32_t(rows[ld + c].bits) << 16;
  }
}

void pack_transposed(const Units& units, const UnitSizes& sizes, const HeadRows& x, int64_t begin, int64_t count,
                     int64_t d, bfloat16* rows, uint32_t* pairs, bfloat16* panels) {
  for (int64_t r = begin; r < begin + count; r += UNIT_DEPTH, panels += sizes.rows * UNIT_DEPTH) {
    const BlockRows block = block_rows(x, r, UNIT_DEPTH, d, rows, sizes.d);
    pack_pairs(block.data, block.ld, UNIT_DEPTH, sizes.d, pairs);
    units.transpose(pairs, sizes.d, 16, sizes.rows, reinterpret_cast<uint32_t*>(panels), UNIT_DEPTH / 2);
  }
}

namespace {

FASTLM_CLONES void multiply(float* x, int64_t rows, int64_t lanes, float factor) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) x[r * QUERIES + i] *= factor;
  }
}

void draw_tile(const UnitScores& t, int64_t sequence_head, Key key) {
  for (int64_t j = 0; j < t.n; j += 64) {
    const int64_t groups = (std::min<int64_t>(64, t.n - j) + 15) / 16;
    philox_block(t.drop[j / 64], {groups, t.lanes, uint32_t((t.j0 + j) / 16), uint32_t(t.i0), uint32_t(sequence_head)},
                 key);
  }
}

}  // namespace

UnitTile unit_scores(const Units& units, const Attention& a, const Sequence& s, const UnitSizes& sizes,
                     const UnitScores& t, int64_t head, Key key) {
  units.set(round_up(t.n, 16), t.lanes, sizes.d, t.k, t.q, QUERIES, t.scores, QUERIES);
  float factor = a.scale * LOG2E;
  if (a.softcap > 0.0f || !(a.scale > 0.0f)) {  // masked scores stay -inf only under a positive factor
    multiply(t.scores, t.n, t.lanes, a.scale);
    if (a.softcap > 0.0f) cap_scores(t.scores, t.n, t.lanes, a.softcap, t.slope);
    factor = LOG2E;
  }
  mask_scores(a, s, t.i0, t.count, t.lanes, t.j0, t.n, t.scores);
  const int64_t rows = round_up(t.n, 4);
  std::fill(t.scores, t.scores + std::max<int64_t>(0, t.lo - t.j0) * QUERIES, -INF);
  std::fill(t.scores + t.n * QUERIES, t.scores + rows * QUERIES, -INF);
  if (t.slope) std::fill(t.slope + t.n * QUERIES, t.slope + rows * QUERIES, 0.0f);  // 0 times what is there may be NaN
  const bool drop = a.dropout.threshold != 0;
  if (drop) draw_tile(t, s.b * a.heads + head, key);
  return {t.scores,
          t.n,
          rows,
          t.lanes,
          factor,
          t.bias ? t.bias + t.i0 - t.j0 + s.sk - 1 : nullptr,
          drop ? t.drop : nullptr,
          uint32_t((a.dropout.threshold << 24) - 1)};
}

void expand_unit_bias(const Attention& a, const Buckets& buckets, const Sequence& s, int64_t head, float* bias) {
  std::fill_n(bias, UnitSizes::MARGIN, 0.0f);
  bias += UnitSizes::MARGIN;
  expand_bias(a, buckets, s, head, bias);
  for (int64_t t = 0; t < s.sq + s.sk - 1; ++t) bias[t] *= LOG2E;
}

void write_transposed(const Units& units, const UnitSizes& sizes, const float* x, const float* factor, int64_t count,
                      int64_t d, uint32_t* words, bfloat16* rows, bfloat16* to, int64_t stride) {
  const int64_t lanes = round_up(count, 16);
  units.round_lanes(x, sizes.rows, lanes, factor, words);
  if (d == sizes.d && count == lanes && by_words(to, stride)) {
    units.transpose(words, QUERIES, d / 2, count, reinterpret_cast<uint32_t*>(to), stride / 2);
    return;
  }
  // Where sizes.d is more than sizes.rows, the columns from sizes.rows on are what the buffer held; none is copied.
  units.transpose(words, QUERIES, sizes.d / 2, lanes, reinterpret_cast<uint32_t*>(rows), sizes.d / 2);
  for (int64_t i = 0; i < count; ++i) copy_row(rows + i * sizes.d, d, to + i * stride);
}

}  // namespace fastlm::cpu
