// attention, backward, on the bfloat16 units: the products of attention_bwd.cpp with operands of attention_units.h.
#include "attention_bwd.h"
#include "attention_units.h"

namespace fastlm::cpu {
namespace {

// delta_i = dout_i·out_i of words (d / 2, QUERIES), summed in the order of AMX: if out is close to one v, delta has the
// same rounding as dout·v, and ds = p (dout·v - delta) is as small as it should be.
FASTLM_CLONES void query_sums(const uint32_t* dout, const uint32_t* out, int64_t d, float* delta) {
  std::fill_n(delta, QUERIES, 0.0f);
  for (int64_t c = 0; c < d / 2; c += UNIT_DEPTH / 2) {
    float even[QUERIES] = {}, odd[QUERIES] = {};
    for (int64_t r = c; r < c + UNIT_DEPTH / 2; ++r) {
#pragma omp simd
      for (int64_t i = 0; i < QUERIES; ++i) {
        const uint32_t x = dout[r * QUERIES + i], y = out[r * QUERIES + i];
        even[i] += bits_to_float(x << 16) * bits_to_float(y << 16);
        odd[i] += bits_to_float(x & 0xFFFF0000u) * bits_to_float(y & 0xFFFF0000u);
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < QUERIES; ++i) delta[i] += even[i] + odd[i];
  }
}

// dbias of a tile, as in attention_bwd.cpp, but every sixteenth row in turn: their parts of dbias overlap by whole
// vectors, so a load finds what a store before it wrote. Rows one apart overlap by parts, and a load then waits.
FASTLM_CLONES void add_dbias(const float* ds, int64_t n, int64_t count, float* dbias) {
  for (int64_t first = 0; first < 16; ++first) {
    for (int64_t j = first; j < n; j += 16) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) dbias[i - j] += ds[j * QUERIES + i];
    }
  }
}

}  // namespace

UnitBackward::UnitBackward(const Attention& a, const Buckets& buckets, int64_t max_sq, int64_t max_sk, int64_t tasks)
    : a_(a),
      buckets_(buckets),
      tasks_(tasks),
      units_(*units()),
      sizes_(a, max_sq, max_sk),
      in_use_(units_),
      k_(scratch<bfloat16>(sizes_.keys * sizes_.d)),
      v_(scratch<bfloat16>(sizes_.keys * sizes_.d)),
      kt_(scratch<bfloat16>(sizes_.keys * sizes_.rows)),
      rows_(scratch<bfloat16>(QUERIES * sizes_.d)),
      p_(scratch<bfloat16>(UNIT_KEYS * QUERIES)),
      ds_(scratch<bfloat16>(UNIT_KEYS * QUERIES)),
      q_(scratch<uint32_t>(sizes_.d / 2 * QUERIES)),
      dout_(scratch<uint32_t>(sizes_.d / 2 * QUERIES)),
      out_(scratch<uint32_t>(sizes_.d / 2 * QUERIES)),
      q_pairs_(scratch<uint32_t>(QUERIES / 2 * sizes_.d)),
      dout_pairs_(scratch<uint32_t>(QUERIES / 2 * sizes_.d)),
      pairs_(scratch<uint32_t>(sizes_.d / 2 * QUERIES)),
      ds_words_(scratch<uint32_t>(UNIT_KEYS / 2 * QUERIES)),
      dk_(scratch<float>(sizes_.keys * sizes_.d)),
      dv_(scratch<float>(sizes_.keys * sizes_.d)),
      dqt_(scratch<float>(sizes_.rows * QUERIES)),
      bias_(scratch<float>(sizes_.bias)),
      dbias_(scratch<float>(sizes_.bias)),
      scores_(scratch<float>(UNIT_KEYS * QUERIES)),
      products_(scratch<float>(UNIT_KEYS * QUERIES)),
      slope_(scratch<float>(UNIT_KEYS * QUERIES)),
      drop_(scratch<Lanes>((UNIT_KEYS + 63) / 64)) {}

// Queries and gradients of a block, lse in units of log 2, delta. lse is infinite for lanes without a key: p = 0.
void UnitBackward::load_block(const AttentionBackward& g, const Sequence& s, int64_t head, int64_t i0, int64_t count) {
  const int64_t d = a_.d, ld = sizes_.d, row = a_.heads * d;
  const HeadRows q = {rows_of<bfloat16>(a_.q, a_.q_stride, s.b, a_.cu_q, head), a_.q_stride.row, 0, s.sq, nullptr};
  const HeadRows dout = {rows_of<bfloat16>(g.dout, g.dout_stride, s.b, a_.cu_q, head), g.dout_stride.row, 0, s.sq,
                         nullptr};
  const HeadRows out = {static_cast<const bfloat16*>(g.out) + s.row_q * row + head * d, row, 0, s.sq, nullptr};
  const auto load = [&](const HeadRows& x, uint32_t* words, uint32_t* pairs) {
    const BlockRows rows = block_rows(x, i0, QUERIES, d, rows_.get(), ld);
    units_.transpose(rows.words(), rows.ld / 2, QUERIES, ld / 2, words, QUERIES);
    if (pairs) pack_pairs(rows.data, rows.ld, QUERIES, ld, pairs);
  };
  load(q, q_.get(), q_pairs_.get());
  load(dout, dout_.get(), dout_pairs_.get());
  load(out, out_.get(), nullptr);
  query_sums(dout_.get(), out_.get(), ld, delta_);
  const int64_t at = s.b * a_.lse_sequence + (a_.cu_q ? s.row_q : 0) + head * a_.lse_head + i0;
  for (int64_t i = 0; i < QUERIES; ++i) {
    const bool keys = i < count && g.lse[at + i] != -INF;
    lse_[i] = keys ? g.lse[at + i] * LOG2E : INF;
    if (g.dlse && keys) delta_[i] -= g.dlse[at + i];
  }
}

// Adds a tile's part of dk, dv, dqt (set where it is the first) and dbias.
void UnitBackward::tile(const AttentionBackward& g, const Sequence& s, int64_t head, int64_t i0, int64_t count,
                        int64_t j0, int64_t n, int64_t lo, bool first, Key key) {
  const int64_t ld = sizes_.d, lanes = round_up(count, UNIT_DEPTH), rows = round_up(n, 16);
  const auto by_rows = [&](const Bf16s& x) { return Left{x.get() + j0 * ld, ld, UNIT_DEPTH}; };
  const UnitTile tile =
      unit_scores(units_, a_, s, sizes_,
                  {i0, count, lanes, j0, n, lo, by_rows(k_), q_.get(),
                   a_.table ? bias_.get() + UnitSizes::MARGIN : nullptr, scores_.get(), slope_.get(), drop_.get()},
                  head, key);
  units_.set(rows, lanes, ld, by_rows(v_), dout_.get(), QUERIES, products_.get(), QUERIES);
  std::fill(products_.get() + n * QUERIES, products_.get() + tile.rows * QUERIES, 0.0f);
  units_.gradient({tile, products_.get(), lse_, delta_, a_.softcap > 0.0f ? slope_.get() : nullptr, a_.dropout.scale,
                   g.dtable != nullptr, p_.get(), ds_.get(), ds_words_.get()});
  if (g.dtable) add_dbias(products_.get(), n, count, dbias_.get() + i0 - j0 + s.sk - 1);
  units_.add(rows, sizes_.rows, lanes, {p_.get(), QUERIES, UNIT_DEPTH}, dout_pairs_.get(), ld, dv_.get() + j0 * ld, ld);
  units_.add(rows, sizes_.rows, lanes, {ds_.get(), QUERIES, UNIT_DEPTH}, q_pairs_.get(), ld, dk_.get() + j0 * ld, ld);
  (first ? units_.set : units_.add)(sizes_.rows, lanes, round_up(n, UNIT_DEPTH), transposed_from(kt_.get(), sizes_, j0),
                                    ds_words_.get(), QUERIES, dqt_.get(), QUERIES);
}

void UnitBackward::task(const AttentionBackward& g, const Sequence& s, int64_t head, Key key) {
  const int64_t d = a_.d, row = a_.heads * d, kv_head = head / (a_.heads / a_.kv_heads);
  const int64_t keys = round_up(s.sk, UNIT_DEPTH);
  const HeadRows k = {rows_of<bfloat16>(a_.k, a_.k_stride, s.b, a_.cu_k, kv_head), a_.k_stride.row, s.first, s.last,
                      s.mask};
  const HeadRows v = {rows_of<bfloat16>(a_.v, a_.v_stride, s.b, a_.cu_k, kv_head), a_.v_stride.row, s.first, s.last,
                      s.mask};
  pack_rows(k, 0, keys, d, k_.get(), sizes_.d);
  pack_rows(v, 0, keys, d, v_.get(), sizes_.d);
  pack_transposed(units_, sizes_, k, 0, keys, d, rows_.get(), pairs_.get(), kt_.get());
  std::fill_n(dk_.get(), keys * sizes_.d, 0.0f);
  std::fill_n(dv_.get(), keys * sizes_.d, 0.0f);
  if (a_.table) expand_unit_bias(a_, buckets_, s, head, bias_.get());
  if (g.dtable) std::fill_n(dbias_.get(), bias_size(s), 0.0f);

  bfloat16* dq = static_cast<bfloat16*>(g.dq) + s.row_q * row + head * d;
  prefetch_rows(dq, row, s.sq, d, true);
  if (a_.heads == a_.kv_heads) {
    prefetch_rows(static_cast<bfloat16*>(g.dk) + s.row_k * row + head * d, row, s.sk, d, true);
    prefetch_rows(static_cast<bfloat16*>(g.dv) + s.row_k * row + head * d, row, s.sk, d, true);
  }
  if (const int64_t next = head + tasks_; next < a_.heads) {
    const int64_t next_kv = next / (a_.heads / a_.kv_heads);
    const bfloat16* const out = static_cast<const bfloat16*>(g.out) + s.row_q * row + next * d;
    prefetch_rows(rows_of<bfloat16>(a_.q, a_.q_stride, s.b, a_.cu_q, next), a_.q_stride.row, s.sq, d, false);
    prefetch_rows(rows_of<bfloat16>(a_.k, a_.k_stride, s.b, a_.cu_k, next_kv), a_.k_stride.row, s.sk, d, false);
    prefetch_rows(rows_of<bfloat16>(a_.v, a_.v_stride, s.b, a_.cu_k, next_kv), a_.v_stride.row, s.sk, d, false);
    prefetch_rows(rows_of<bfloat16>(g.dout, g.dout_stride, s.b, a_.cu_q, next), g.dout_stride.row, s.sq, d, false);
    prefetch_rows(out, row, s.sq, d, false);
  }
  for (int64_t i0 = 0; i0 < s.sq; i0 += QUERIES) {
    const int64_t count = std::min(QUERIES, s.sq - i0);
    load_block(g, s, head, i0, count);
    const int64_t lo = s.lo(a_, i0), hi = s.hi(a_, i0, count);
    if (lo >= hi) std::fill_n(dqt_.get(), sizes_.rows * QUERIES, 0.0f);
    bool first = true;
    for (int64_t j0 = lo / UNIT_DEPTH * UNIT_DEPTH; lo < hi && j0 < hi; j0 += UNIT_KEYS, first = false) {
      tile(g, s, head, i0, count, j0, std::min(UNIT_KEYS, hi - j0), lo, first, key);
    }
    std::fill_n(factor_, QUERIES, a_.scale);
    write_transposed(units_, sizes_, dqt_.get(), factor_, count, d, pairs_.get(), rows_.get(), dq + i0 * row, row);
  }

  const auto write = [&](const float* x, float scale, bfloat16* to) {
    units_.round_rows(x, sizes_.d, s.sk, d, scale, to, row);
  };
  write_key_gradients<bfloat16>(a_, g, s, head, {dk_.get(), dv_.get(), sizes_.d, a_.dropout.scale}, write);
  if (g.dtable) add_table(a_, buckets_, g, s, head, dbias_.get());
}

}  // namespace fastlm::cpu
