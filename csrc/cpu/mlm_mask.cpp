// mlm_mask: selects the tokens to predict and draws their replacements. The definition: fastlm/ops/mlm_mask.py.
//
// One pass over fixed blocks of tokens writes input_ids, labels and a list of the selected tokens for each block. The
// lengths of the lists give each block's place in `index`; a second pass copies the lists there. Within a block, a
// chunk of tokens at a time is processed in short arrays, so that Philox, one call per token, runs on vectors. r1 and
// r2 of the selected tokens are packed, so that the replacements are drawn on vectors too.
#include "mlm_mask.h"

#include "parallel.h"
#include "philox_many.h"
#include "simd.h"

#ifdef FASTLM_HAS_CLONES
// GCC 12 warns about its own header (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace fastlm::cpu {
namespace {

constexpr int64_t kBlock = 4096;  // positions within it fit 16 bits
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
  for (int64_t s = 0; s < int64_t(a.special_ids.size()); ++s) special |= a.input_ids[token] == a.special_ids[s];
  return special;
}

FASTLM_INLINE bool starts_word(const MlmMask& a, int64_t token) {
  const int64_t row = token / a.cols, col = token % a.cols;
  return col == 0 || a.word_starts[token] || is_special(a, token - 1) ||
         at(a.sample_ids, row, col, 0) != at(a.sample_ids, row, col - 1, 0) ||
         uint32_t(at(a.epochs, row, col, 0)) != uint32_t(at(a.epochs, row, col - 1, 0));
}

// r0 of the word that contains `token` and starts in an earlier block: r0 of the first token of the word.
FASTLM_INLINE uint32_t word_before(const MlmMask& a, int64_t token, Key key) {
  while (!starts_word(a, token)) --token;
  const int64_t row = token / a.cols, col = token % a.cols;
  const uint64_t sample = uint64_t(at(a.sample_ids, row, col, row));
  return philox(uint32_t(at(a.positions, row, col, col)), uint32_t(at(a.epochs, row, col, a.epoch)), uint32_t(sample),
                uint32_t(sample >> 32), key)
      .r0;
}

// The counters of tokens [begin, begin + n), which may be in several rows.
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

// r < t for a t in [0, 2^32], as a 32-bit compare.
struct Below {
  explicit Below(uint64_t t) : any(t > 0), last(uint32_t(t - any)) {}
  bool operator()(uint32_t r) const { return any & (r <= last); }
  bool any;
  uint32_t last;
};

// A chunk's selected tokens, in order, padded to a multiple of sixteen with values that are not read.
struct Picked {
  uint32_t place[kLanes + 16], r1[kLanes + 16], r2[kLanes + 16];
};

// Fills `picked`; returns the number. It has no branches: which tokens are selected is unpredictable, and with branches
// this takes as long as Philox.
#ifdef FASTLM_HAS_CLONES
__attribute__((target("avx512f"))) int64_t pick(const Chunk& chunk, int64_t n, Picked& picked) {
  const auto& word = chunk.lanes.word;
  __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i flags = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(chunk.selected + i)));
    const __mmask16 mask = _mm512_test_epi32_mask(flags, flags);
    _mm512_storeu_si512(picked.place + count, _mm512_maskz_compress_epi32(mask, place));
    _mm512_storeu_si512(picked.r1 + count, _mm512_maskz_compress_epi32(mask, _mm512_load_si512(word[1] + i)));
    _mm512_storeu_si512(picked.r2 + count, _mm512_maskz_compress_epi32(mask, _mm512_load_si512(word[2] + i)));
    place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
    count += __builtin_popcount(mask);
  }
  return count;
}

__attribute__((target("default")))
#endif
int64_t pick(const Chunk& chunk, int64_t n, Picked& picked) {
  int64_t count = 0;
  for (int64_t eight = 0; eight < n; eight += 8) {
    uint64_t flags;  // little-endian: the lowest byte is the first token
    std::memcpy(&flags, chunk.selected + eight, 8);
    for (; flags; flags &= flags - 1, ++count) {
      const int64_t i = eight + __builtin_ctzll(flags) / 8;
      picked.place[count] = uint32_t(i);
      picked.r1[count] = chunk.lanes.word[1][i];
      picked.r2[count] = chunk.lanes.word[2][i];
    }
  }
  for (int64_t k = count; k % 16; ++k) picked.r1[k] = picked.r2[k] = 0;
  return count;
}

// For `count` tokens: sets r1 to whether the token is replaced, and r2 to the replacement.
FASTLM_INLINE void replace(const MlmMask& a, int64_t count, Picked& picked) {
  const uint64_t choices = uint64_t(a.vocab_size - int64_t(a.left_out.size()));
  const uint32_t mask = uint32_t(a.mask_token_id);
  const Below masked(a.mask_below), replaced(a.replace_below);
  for (int64_t k = 0; k < count; k += 16) {
    uint32_t *r1 = picked.r1 + k, *token = picked.r2 + k;
#pragma omp simd
    for (int64_t l = 0; l < 16; ++l) token[l] = uint32_t(token[l] * choices >> 32);
    for (int64_t s = 0; s < int64_t(a.left_out.size()); ++s) {
      const uint32_t left = uint32_t(a.left_out[s]);
#pragma omp simd
      for (int64_t l = 0; l < 16; ++l) token[l] += token[l] >= left;
    }
#pragma omp simd
    for (int64_t l = 0; l < 16; ++l) {
      token[l] = masked(r1[l]) ? mask : token[l];
      r1[l] = masked(r1[l]) | replaced(r1[l]);
    }
  }
}

// Processes tokens [begin, end). Writes the selected ones, relative to begin, to `list` and returns their number. Sets
// `outside` if there is an id outside the vocabulary.
FASTLM_CLONES int64_t mask_block(const MlmMask& a, int64_t begin, int64_t end, uint16_t* list, bool* outside) {
  const Key key = make_key(uint64_t(a.seed), kMaskDomain);
  const Below below(a.select_below);
  uint32_t word = a.word_starts && begin < end ? word_before(a, begin, key) : 0;
  int64_t count = 0;
  uint32_t wrong = 0;
  Chunk chunk;
  Picked picked;
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
      for (int64_t i = 0; i < n; i += 16) {
        uint32_t special[16] = {};
        for (int64_t s = 0; s < int64_t(a.special_ids.size()); ++s) {
          const uint32_t id = uint32_t(a.special_ids[s]);
#pragma omp simd
          for (int64_t l = 0; l < 16; ++l) special[l] |= chunk.id[i + l] == id;
        }
#pragma omp simd
        for (int64_t l = 0; l < 16; ++l) chunk.special[i + l] = uint8_t(special[l]);
      }
    }
    if (a.word_starts) fill_starts(a, start, n, chunk);
    philox_many(chunk.lanes, n, key);
    uint32_t* r0 = chunk.lanes.word[0];
    if (a.word_starts) {
      for (int64_t i = 0; i < n; ++i) {  // a select without a branch, since word starts are unpredictable
        const uint32_t own = -uint32_t(chunk.starts[i]);
        r0[i] = word = (r0[i] & own) | (word & ~own);
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      chunk.selected[i] = below(r0[i]) & (chunk.special[i] ^ 1);
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      out[i] = ids[i];
      labels[i] = chunk.selected[i] ? ids[i] : kIgnore;
    }
    for (int64_t i = n; i % 16; ++i) chunk.selected[i] = 0;
    const int64_t selected = pick(chunk, n, picked);
    replace(a, selected, picked);
    for (int64_t k = 0; k < selected; ++k) {
      const int64_t i = picked.place[k];
      out[i] = picked.r1[k] ? int64_t(picked.r2[k]) : ids[i];
      list[count + k] = uint16_t(start - begin + i);
    }
    count += selected;
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
