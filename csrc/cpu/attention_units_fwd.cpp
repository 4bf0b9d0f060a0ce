// attention, forward, on the bfloat16 units: the online softmax of attention_fwd.cpp with operands of
// attention_units.h.
#include "attention_units.h"

namespace fastlm::cpu {
namespace {

// x (rows, QUERIES) times one factor per lane.
FASTLM_CLONES void scale_lanes(float* x, int64_t rows, int64_t lanes, const float* factor) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) x[r * QUERIES + i] *= factor[i];
  }
}

}  // namespace

UnitForward::UnitForward(const Attention& a, const Buckets& buckets, int64_t max_sq, int64_t max_sk)
    : a_(a),
      buckets_(buckets),
      units_(*units()),
      sizes_(a, max_sq, max_sk),
      in_use_(units_),
      k_(scratch<bfloat16>(sizes_.keys * sizes_.d)),
      vt_(scratch<bfloat16>(sizes_.keys * sizes_.rows)),
      rows_(scratch<bfloat16>(QUERIES * sizes_.d)),
      q_(scratch<uint32_t>(sizes_.d / 2 * QUERIES)),
      p_(scratch<uint32_t>(UNIT_KEYS / 2 * QUERIES)),
      pairs_(scratch<uint32_t>(std::max(UNIT_DEPTH / 2 * sizes_.d, sizes_.d / 2 * QUERIES))),
      bias_(scratch<float>(sizes_.bias)),
      ot_(scratch<float>(sizes_.rows * QUERIES)),
      scores_(scratch<float>(UNIT_KEYS * QUERIES)),
      drop_(scratch<Lanes>((UNIT_KEYS + 63) / 64)) {}

// The block's ot, max and sum. k_ and vt_ hold the keys from `base` on.
void UnitForward::block(const Sequence& s, int64_t head, int64_t base, int64_t i0, int64_t count, Key key) {
  const int64_t lanes = round_up(count, UNIT_DEPTH);
  std::fill_n(max_, QUERIES, -INF);
  std::fill_n(sum_, QUERIES, 0.0f);
  const int64_t lo = s.lo(a_, i0), hi = s.hi(a_, i0, count);
  if (lo >= hi) std::fill_n(ot_.get(), sizes_.rows * QUERIES, 0.0f);
  bool first = true;
  for (int64_t j0 = lo / UNIT_DEPTH * UNIT_DEPTH; lo < hi && j0 < hi; j0 += UNIT_KEYS, first = false) {
    const int64_t n = std::min(UNIT_KEYS, hi - j0);
    const Left k = {k_.get() + (j0 - base) * sizes_.d, sizes_.d, UNIT_DEPTH};
    const UnitTile tile =
        unit_scores(units_, a_, s, sizes_,
                    {i0, count, lanes, j0, n, lo, k, q_.get(), a_.table ? bias_.get() + UnitSizes::MARGIN : nullptr,
                     scores_.get(), nullptr, drop_.get()},
                    head, key);
    const bool changed = units_.softmax({tile, max_, sum_, factor_, p_.get()});
    if (changed && !first) scale_lanes(ot_.get(), sizes_.rows, lanes, factor_);
    (first ? units_.set : units_.add)(sizes_.rows, lanes, round_up(n, UNIT_DEPTH),
                                      transposed_from(vt_.get(), sizes_, j0 - base), p_.get(), QUERIES, ot_.get(),
                                      QUERIES);
  }
}

void UnitForward::task(const Sequence& s, int64_t head, int64_t begin, int64_t end, Key key, bfloat16* out,
                       float* lse) {
  const int64_t d = a_.d, row = a_.heads * d, kv_head = head / (a_.heads / a_.kv_heads);
  const HeadRows q = {rows_of<bfloat16>(a_.q, a_.q_stride, s.b, a_.cu_q, head), a_.q_stride.row, 0, end, nullptr};
  const HeadRows k = {rows_of<bfloat16>(a_.k, a_.k_stride, s.b, a_.cu_k, kv_head), a_.k_stride.row, s.first, s.last,
                      s.mask};
  const HeadRows v = {rows_of<bfloat16>(a_.v, a_.v_stride, s.b, a_.cu_k, kv_head), a_.v_stride.row, s.first, s.last,
                      s.mask};
  out += s.row_q * row + head * d;
  lse += s.b * a_.lse_sequence + (a_.cu_q ? s.row_q : 0) + head * a_.lse_head;
  const int64_t base = s.lo(a_, begin) / UNIT_DEPTH * UNIT_DEPTH;
  const int64_t keys = round_up(std::max<int64_t>(0, s.hi(a_, begin, end - begin) - base), UNIT_DEPTH);
  pack_rows(k, base, keys, d, k_.get(), sizes_.d);
  pack_transposed(units_, sizes_, v, base, keys, d, rows_.get(), pairs_.get(), vt_.get());
  if (a_.table) expand_unit_bias(a_, buckets_, s, head, bias_.get());

  for (int64_t i0 = begin; i0 < end; i0 += QUERIES) {
    const int64_t count = std::min(QUERIES, end - i0), lanes = round_up(count, UNIT_DEPTH);
    const BlockRows rows = block_rows(q, i0, lanes, d, rows_.get(), sizes_.d);
    units_.transpose(rows.words(), rows.ld / 2, lanes, sizes_.d / 2, q_.get(), QUERIES);
    block(s, head, base, i0, count, key);
    units_.finish(max_, sum_, lanes, a_.dropout.scale, factor_, lse_);
    write_transposed(units_, sizes_, ot_.get(), factor_, count, d, pairs_.get(), rows_.get(), out + i0 * row, row);
    std::copy_n(lse_, count, lse + i0);
  }
}

}  // namespace fastlm::cpu
