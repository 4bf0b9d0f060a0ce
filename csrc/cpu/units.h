// Products of bfloat16 matrices on the bfloat16 units of a CPU (AVX512-BF16, AMX), and the passes of attention between
// them. The lanes of a vector are queries, as in attention_tile.h; what is exponential or a sum is float.
//
// A left operand has rows of bfloat16. A right operand has words of 32 bits: the element of an even row in the low
// half, of the next row in the high half, so (k/2, n) words are a (k, n) matrix. Both are padded with zeros: the depth
// of a product is a multiple of 32, rows and columns of 16.
#pragma once

#include "isa.h"
#include "philox_many.h"

namespace fastlm::cpu {

constexpr int64_t UNIT_QUERIES = 64;  // the stride of rows of queries in a tile, in floats, words or bfloat16
constexpr int64_t UNIT_DEPTH = 32;

// A left operand: rows are `ld` elements apart, and the next 32 columns of a row `step` elements further.
struct Left {
  const bfloat16* data;
  int64_t ld, step;
};

// One tile of scores of attention, of n keys and `lanes` queries; `rows` is n rounded up to 4, and the rows from n on
// are -inf. A score in units of log 2 is factor scores + bias. bias (or null): of key j and query i, element i - j.
// drop (or null): dropout's words of 64 keys each, key j's in drop[j / 64].word[j % 16 / 4][j % 64 / 16 lanes + i]; a
// byte is kept if it, in the highest place, is more than `last`.
struct UnitTile {
  float* scores;
  int64_t n, rows, lanes;
  float factor;
  const float* bias;
  const Lanes* drop;
  uint32_t last;
};

// p: right operand (keys, queries), exp(score - max), 0 where dropped; zero to a multiple of 32 keys.
// max, sum: of the tiles so far, max in units of log 2, sum without dropout. rescale: the factor for sums of earlier
// tiles.
struct UnitSoftmax {
  UnitTile tile;
  float *max, *sum, *rescale;
  uint32_t* p;
};

// From scores and products = dout·v: p = exp(score - lse), 0 where dropped, and ds = p (scale dout·v - delta), 0 for v
// where dropped. lse in units of log 2.
// p, ds: left operands (keys, queries); ds_words: ds as a right operand (keys, queries).
// slope, or null: ds is multiplied by it, after products has become ds where keep_ds is set.
struct UnitGradient {
  UnitTile tile;
  float* products;
  const float *lse, *delta, *slope;
  float scale;
  bool keep_ds;
  bfloat16 *p, *ds;
  uint32_t* ds_words;
};

// The functions of one instruction set.
struct Units {
  // On the calling thread, around all else.
  void (*begin)();
  void (*end)();

  // c = a b, c += a b; a (m, k), b (k, n), c (m, n) floats.
  using Product = void (*)(int64_t m, int64_t n, int64_t k, const Left& a, const uint32_t* b, int64_t ldb, float* c,
                           int64_t ldc);
  Product set, add;

  bool (*softmax)(const UnitSoftmax& a);  // whether any rescale is not 1
  void (*gradient)(const UnitGradient& a);
  // From max and sum of all tiles: lse in units of e, and scale / sum; -inf and 0 for a query without keys.
  void (*finish)(const float* max, const float* sum, int64_t lanes, float scale, float* factor, float* lse);

  // to (cols, ld_to) = fromᵀ (rows, ld_from), words; rows and cols are multiples of 16.
  void (*transpose)(const uint32_t* from, int64_t ld_from, int64_t rows, int64_t cols, uint32_t* to, int64_t ld_to);
  // x (rows, UNIT_QUERIES) times a factor for each lane, as a right operand; rows even.
  void (*round_lanes)(const float* x, int64_t rows, int64_t lanes, const float* factor, uint32_t* words);
  // y (rows, d) = scale x (rows, ld); ld is a multiple of 32.
  void (*round_rows)(const float* x, int64_t ld, int64_t rows, int64_t d, float scale, bfloat16* y, int64_t stride);
};

// Of the set in use; null if it has no bfloat16 units.
const Units* units();

// The products of each set (gemm_bf16.cpp).
struct UnitProducts {
  void (*begin)();
  void (*end)();
  Units::Product set, add;
};
UnitProducts unit_products(Isa set);

class UnitsInUse {
 public:
  explicit UnitsInUse(const Units& units) : units_(units) { units_.begin(); }
  ~UnitsInUse() { units_.end(); }
  UnitsInUse(const UnitsInUse&) = delete;
  UnitsInUse& operator=(const UnitsInUse&) = delete;

 private:
  const Units& units_;
};

// c (m, n) = a (m, k) b (k, n), b as words (k/2, n), with the set in use: for the test that compares the sets.
// std::invalid_argument if it has no bfloat16 units.
void bf16_product(const void* a, const uint32_t* b, float* c, int64_t m, int64_t n, int64_t k);

}  // namespace fastlm::cpu
