// mlm_mask: which tokens are predicted, and what stands in their place. The definition: fastlm/ops/mlm_mask.py.
//
// One pass over fixed blocks of tokens writes input_ids, labels and each block's list of selected tokens; the lists'
// lengths give every block its place in `index`, and a second pass copies the lists there. Within a block a chunk of
// tokens at a time goes through short arrays, so that Philox, one call per token, runs on vectors; r1 and r2 are looked
// at for selected tokens only.
#include "mlm_mask.h"

#include "parallel.h"
#include "philox_many.h"
#include "simd.h"

namespace fastlm::cpu {
namespace {

constexpr int64_t kBlock = 4096;  // its positions fit 16 bits
constexpr int64_t kIgnore = -100;

struct Chunk {
  Lanes lanes;                                                // counters, then words
  uint32_t id[kLanes];                                        // low halves
  uint8_t special[kLanes], starts[kLanes], selected[kLanes];  // 0 or 1
};

FASTLM_INLINE int64_t at(const PerToken& p, int64_t row, int64_t col, int64_t absent) {
  return p.data ? p.data[row * p.stride_row + col * p.stride_col] : absent;
}

FASTLM_INLINE bool is_special(const MlmMask& a, int64_t token) {
  if (a.special_tokens_mask) return a.special_tokens_mask[token];
  bool special = false;
  for (int64_t s = 0; s < a.specials; ++s) special |= a.input_ids[token] == a.special_ids[s];
  return special;
}

FASTLM_INLINE bool starts_word(const MlmMask& a, int64_t token) {
  const int64_t row = token / a.cols, col = token % a.cols;
  return col == 0 || a.word_starts[token] || is_special(a, token - 1) ||
         at(a.sample_ids, row, col, 0) != at(a.sample_ids, row, col - 1, 0) ||
         uint32_t(at(a.epochs, row, col, 0)) != uint32_t(at(a.epochs, row, col - 1, 0));
}

// r0 of the word that `token` is in the middle of, from the start of that word, in an earlier block.
FASTLM_INLINE uint32_t word_before(const MlmMask& a, int64_t token, Key key) {
  while (!starts_word(a, token)) --token;
  const int64_t row = token / a.cols, col = token % a.cols;
  const uint64_t sample = uint64_t(at(a.sample_ids, row, col, row));
  return philox(uint32_t(at(a.positions, row, col, col)), uint32_t(at(a.epochs, row, col, a.epoch)), uint32_t(sample),
                uint32_t(sample >> 32), key)
      .r0;
}

// The counters of tokens [begin, begin + n), which may lie in several rows.
FASTLM_INLINE void fill_counters(const MlmMask& a, int64_t begin, int64_t n, Chunk& chunk) {
  int64_t row = begin / a.cols, col = begin % a.cols;
  for (int64_t i = 0; i < n; ++row, col = 0) {
    const int64_t stop = std::min(n, i + a.cols - col), shift = col - i;
    const int64_t* p = a.positions.data ? a.positions.data + row * a.positions.stride_row : nullptr;
    const int64_t* e = a.epochs.data ? a.epochs.data + row * a.epochs.stride_row : nullptr;
    const int64_t* s = a.sample_ids.data ? a.sample_ids.data + row * a.sample_ids.stride_row : nullptr;
    if (p) {
      for (int64_t k = i; k < stop; ++k) chunk.lanes.word[0][k] = uint32_t(p[(k + shift) * a.positions.stride_col]);
    } else {
      for (int64_t k = i; k < stop; ++k) chunk.lanes.word[0][k] = uint32_t(k + shift);
    }
    if (e) {
      for (int64_t k = i; k < stop; ++k) chunk.lanes.word[1][k] = uint32_t(e[(k + shift) * a.epochs.stride_col]);
    } else {
      for (int64_t k = i; k < stop; ++k) chunk.lanes.word[1][k] = uint32_t(a.epoch);
    }
    for (int64_t k = i; k < stop; ++k) {
      const uint64_t sample = uint64_t(s ? s[(k + shift) * a.sample_ids.stride_col] : row);
      chunk.lanes.word[2][k] = uint32_t(sample);
      chunk.lanes.word[3][k] = uint32_t(sample >> 32);
    }
    i = stop;
  }
}

// starts_word of tokens [begin, begin + n): samples and epochs are compared as counters.
FASTLM_INLINE void fill_starts(const MlmMask& a, int64_t begin, int64_t n, Chunk& chunk) {
  const auto& counter = chunk.lanes.word;
  chunk.starts[0] = starts_word(a, begin);
#pragma omp simd
  for (int64_t i = 1; i < n; ++i) {
    const uint32_t other =
        (counter[1][i] ^ counter[1][i - 1]) | (counter[2][i] ^ counter[2][i - 1]) | (counter[3][i] ^ counter[3][i - 1]);
    chunk.starts[i] = uint8_t(a.word_starts[begin + i]) | chunk.special[i - 1] | uint8_t(other != 0);
  }
  for (int64_t i = a.cols - begin % a.cols; i < n; i += a.cols) chunk.starts[i] = 1;
}

FASTLM_INLINE int64_t replacement(const MlmMask& a, uint32_t r1, uint32_t r2, int64_t id) {
  if (r1 < a.mask_below) return a.mask_token_id;
  if (r1 >= a.replace_below) return id;
  int64_t j = int64_t(uint64_t(r2) * uint64_t(a.vocab_size - a.lefts) >> 32);
  for (int64_t s = 0; s < a.lefts; ++s) j += j >= a.left_out[s];
  return j;
}

// Tokens [begin, end); their selected ones, relative to begin, go to `list`. Returns how many; `outside` is set to an
// id outside the vocabulary.
FASTLM_CLONES int64_t mask_block(const MlmMask& a, int64_t begin, int64_t end, uint16_t* list, bool* outside) {
  const Key key = make_key(a.seed, kMaskDomain);
  // 32-bit compares: r0 < t is r0 <= t - 1 with a t that is not 0.
  const uint8_t any = a.select_below > 0;
  const uint32_t last = uint32_t(a.select_below - any);
  uint32_t word = a.word_starts && begin < end ? word_before(a, begin, key) : 0;
  int64_t count = 0;
  uint32_t wrong = 0;
  Chunk chunk;
  for (int64_t start = begin; start < end; start += kLanes) {
    const int64_t n = std::min(kLanes, end - start);
    const int64_t* ids = a.input_ids + start;
    int64_t *out = a.input_ids_out + start, *labels = a.labels + start;
    fill_counters(a, start, n, chunk);
#pragma omp simd reduction(| : wrong)
    for (int64_t i = 0; i < n; ++i) {
      chunk.id[i] = uint32_t(ids[i]);
      wrong |= uint64_t(ids[i]) >= uint64_t(a.vocab_size);
    }
    if (a.special_tokens_mask) {
      for (int64_t i = 0; i < n; ++i) chunk.special[i] = a.special_tokens_mask[start + i];
    } else {
      for (int64_t i = 0; i < n; ++i) chunk.special[i] = 0;
      for (int64_t s = 0; s < a.specials; ++s) {
        const uint32_t special = uint32_t(a.special_ids[s]);
        for (int64_t i = 0; i < n; ++i) chunk.special[i] |= chunk.id[i] == special;
      }
    }
    if (a.word_starts) fill_starts(a, start, n, chunk);
    philox_many(chunk.lanes, n, key);
    uint32_t* r0 = chunk.lanes.word[0];
    if (a.word_starts) {
      for (int64_t i = 0; i < n; ++i) {  // a select without a branch: where words start cannot be foretold
        const uint32_t own = -uint32_t(chunk.starts[i]);
        r0[i] = word = (r0[i] & own) | (word & ~own);
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      chunk.selected[i] = any & (chunk.special[i] ^ 1) & uint8_t(r0[i] <= last);
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      out[i] = ids[i];
      labels[i] = chunk.selected[i] ? ids[i] : kIgnore;
    }
    for (int64_t i = n; i % 8; ++i) chunk.selected[i] = 0;
    for (int64_t eight = 0; eight < n; eight += 8) {
      uint64_t flags;  // little-endian: the lowest byte is the first token
      std::memcpy(&flags, chunk.selected + eight, 8);
      for (; flags; flags &= flags - 1) {
        const int64_t i = eight + __builtin_ctzll(flags) / 8;
        out[i] = replacement(a, chunk.lanes.word[1][i], chunk.lanes.word[2][i], ids[i]);
        list[count++] = uint16_t(start - begin + i);
      }
    }
  }
  *outside |= wrong;
  return count;
}

}  // namespace

int64_t mlm_mask(const MlmMask& a, int threads) {
  const int64_t tokens = a.rows * a.cols, blocks = (tokens + kBlock - 1) / kBlock;
  const auto lists = scratch<uint16_t>(tokens);
  const auto offsets = scratch<int64_t>(blocks + 1);
  const auto outside = scratch<bool>(blocks);
  parallel_for(blocks, 2, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * kBlock, end = std::min(tokens, begin + kBlock);
      outside[b] = false;
      offsets[b + 1] = mask_block(a, begin, end, lists.get() + begin, &outside[b]);
    }
  });
  for (int64_t b = 0; b < blocks; ++b) {
    if (!outside[b]) continue;
    for (int64_t t = b * kBlock;; ++t) {
      if (uint64_t(a.input_ids[t]) >= uint64_t(a.vocab_size)) return t;
    }
  }

  offsets[0] = 0;
  for (int64_t b = 0; b < blocks; ++b) offsets[b + 1] += offsets[b];
  *a.count = offsets[blocks];
  parallel_for(blocks, 2, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t stop = std::min(offsets[b + 1], a.capacity);
      for (int64_t slot = offsets[b]; slot < stop; ++slot) {
        const int64_t token = b * kBlock + lists[b * kBlock + slot - offsets[b]];
        a.index[slot] = token;
        a.targets[slot] = a.input_ids[token];
      }
    }
  });
  const int64_t filled = std::min(offsets[blocks], a.capacity);
  parallel_for(a.capacity - filled, 16384, threads, [&](int64_t first, int64_t last) {
    std::fill(a.index + filled + first, a.index + filled + last, int64_t(0));
    std::fill(a.targets + filled + first, a.targets + filled + last, kIgnore);
  });
  return -1;
}

}  // namespace fastlm::cpu
