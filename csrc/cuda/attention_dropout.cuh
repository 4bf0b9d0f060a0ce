// The dropout bits of a tile of attention. One Philox call gives the bytes of sixteen keys for one query. The lanes of
// a warp exchange bits, so that no call is made twice.
#pragma once

#include "attention_tile.cuh"
#include "philox.h"

namespace fastlm::cuda {

struct Bytes {
  Key key;
  uint32_t addend, either;

  __device__ __forceinline__ explicit Bytes(const Dropout& dropout)
      : key(dropout_key(dropout.rng, dropout.site)),
        addend((dropout.threshold <= 128 ? 128 - uint32_t(dropout.threshold) : 256 - uint32_t(dropout.threshold)) *
               0x01010101u),
        either(dropout.threshold <= 128 ? 0xFFFFFFFFu : 0u) {}

  // Bits 0..3: which bytes of a word are at least the threshold, 1 to 256. The top bit of a byte decides, together with
  // the carry out of its low seven bits plus 128 - threshold or 256 - threshold.
  __device__ __forceinline__ uint32_t kept(uint32_t word) const {
    const uint32_t carry = (word & 0x7F7F7F7Fu) + addend;
    const uint32_t top = ((carry & word) | (either & (carry | word))) >> 7 & 0x01010101u;
    return top * 0x01020408u >> 24;  // bits 0, 8, 16, 24 meet in 24..27
  }

  // Bit b: key 16·block + b stays. Positions count within the sequence.
  __device__ __forceinline__ uint32_t sixteen(int block, int query, int sequence_head) const {
    const Words w = philox(uint32_t(block), uint32_t(query), uint32_t(sequence_head), 0u, key);
    return kept(w.r0) | kept(w.r1) << 4 | kept(w.r2) << 8 | kept(w.r3) << 12;
  }
};

// For each row of a tile of queries: the first key of its sequence, its position, and sequence·heads + head.
template <int M>
struct RowDropout {
  int start[M], query[M], sequence_head[M];
};

// Fills in row threadIdx.x of a tile of queries, row0 and on.
template <int M>
__device__ __forceinline__ void set_query(RowSight<M>& seen, RowDropout<M>& dropout, const Sight& sight,
                                          const Plan& plan, int b, int head, int heads, int row0, int last_row) {
  const int i = threadIdx.x, row = min(row0 + i, last_row);
  const int s = sight.rows.cu ? find_sequence(sight.rows.cu, row, plan.first, plan.last) : 0;
  seen.set(i, sight, row, s);
  if (row0 + i > last_row) seen.width[i] = 0;
  dropout.start[i] = sight.cols.start(s);
  dropout.query[i] = row - sight.rows.start(s);
  dropout.sequence_head[i] = (sight.rows.cu ? s : b) * heads + head;
}

// Which elements of a tile of queries stay. Four lanes share their rows. Each draws for one of the rows, and for a part
// of its groups of sixteen keys. straddles: the groups of a row may start at any column, so sixteen bits come from two
// calls.
template <int MT, int NT>
struct KeptKeys {
  static constexpr int kRows = 2 * MT, kGroups = NT / 2, kEach = kGroups * kRows >= 4 ? kGroups * kRows / 4 : 1;
  uint32_t bits[kEach];

  template <int M>
  __device__ __forceinline__ KeptKeys(const Bytes& bytes, const RowDropout<M>& rows, int row0, int key0,
                                      bool straddles) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int row = row0 + g + 8 * (t % kRows), part = t / kRows % (kGroups / kEach);
    const int position = key0 - rows.start[row], block = (position >> 4) + part * kEach;
    const int query = rows.query[row], sequence_head = rows.sequence_head[row];
#pragma unroll
    for (int i = 0; i < kEach; ++i) bits[i] = bytes.sixteen(block + i, query, sequence_head);
    if (straddles) {
      const uint32_t last = bytes.sixteen(block + kEach, query, sequence_head);
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        bits[i] = (bits[i] | (i + 1 < kEach ? bits[i + 1] : last) << 16) >> (position & 15);
    }
  }

  // x if it stays, else 0. All threads of a warp must call it.
  __device__ __forceinline__ void apply(float (&x)[MT][NT][4], float factor) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
          const int group = n / 2, lane = 2 * m + h + kRows * (group / kEach);
          const uint32_t mine = __shfl_sync(0xFFFFFFFFu, bits[group % kEach], lane, 4) >> (2 * t);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& y = x[m][n + e / 2][2 * h + e % 2];
            y = mine >> (8 * (e / 2) + e % 2) & 1 ? y * factor : 0.0f;
          }
        }
      }
    }
  }
};

// What a lane draws for: the position of the first key, the query, and sequence·heads + head.
struct Draw {
  int position, query, sequence_head;
};

// The same for a tile of keys, whose columns are queries. A lane draws for one column in 32, for all keys of the warp.
template <int MT, int NT>
struct KeptQueries {
  static constexpr int kCols = 8 * NT, kEach = kCols > 32 ? kCols / 32 : 1;
  uint32_t stays[MT];  // bit 4 n + e: of the thread's element [m][n][e]

  // of(column) gives the Draw of a column 0..8·NT-1, for the warp's first key.
  template <class F>
  __device__ __forceinline__ void draw(const Bytes& bytes, bool straddles, F of) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t bits[MT][kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const auto [position, query, sequence_head] = of(32 * i + lane % kCols);
      const int block = position >> 4;
#pragma unroll
      for (int m = 0; m < MT; ++m) bits[m][i] = bytes.sixteen(block + m, query, sequence_head);
      if (straddles) {
        const uint32_t last = bytes.sixteen(block + MT, query, sequence_head);
#pragma unroll
        for (int m = 0; m < MT; ++m)
          bits[m][i] = (bits[m][i] | (m + 1 < MT ? bits[m + 1][i] : last) << 16) >> (position & 15);
      }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      stays[m] = 0;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t mine = __shfl_sync(0xFFFFFFFFu, bits[m][n / 4], (8 * n + 2 * t + e) % 32) >> g;
          stays[m] |= ((mine & 1) | (mine >> 8 & 1) << 2) << (4 * n + e);
        }
      }
    }
  }

  __device__ __forceinline__ bool has(int m, int n, int e) const { return stays[m] >> (4 * n + e) & 1; }
};

}  // namespace fastlm::cuda
