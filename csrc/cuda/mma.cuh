// Products of tiles. Tiles of bfloat16 and float16 use the tensor cores, sixteen rows per warp (mma.sync m16n8k16,
// float32 sums). Tiles of float32 use FMA, since their products must be float32. Both have the same fragments, so one
// kernel serves all types.
//
// A tile is in shared memory, in rows of D elements. A fragment of a product, float [MT][NT][4], holds 16·MT rows of
// 8·NT
// columns in a warp: with lane = 4 g + t, element [m][n][e] is row 16 m + g + 8 (e div 2), column 8 n + 2 t + e mod 2.
// A rounded fragment can be the left side of the next product without a rearrangement, as softmax(q kᵀ) for v.
#pragma once

#include "rows.cuh"

namespace fastlm::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---- cp.async: `bytes` bytes of global memory, then zeros

__device__ __forceinline__ void copy_async16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_async4(void* to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copies_arrive() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- a tile in shared memory

// Rows of D elements in chunks of 16 bytes. The chunks of a row are permuted by the row's number, so neither one chunk
// of eight rows nor eight chunks of one row conflict in a bank. The address of a tile is a multiple of 1024.
template <class T, int D>
struct Tile {
  static constexpr int kChunk = kVector<T>, kChunks = D / kChunk, kRowBytes = D * int(sizeof(T));
  static_assert(kChunks >= 4, "narrower rows would need another permutation");

  // The first element of a chunk.
  __device__ __forceinline__ static int at(int row, int chunk) {
    return (row * kChunks + (chunk ^ (kChunks >= 8 ? row & 7 : (row >> 1) & 3))) * kChunk;
  }
};

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c (16, 8) += a (16, 16) b (16, 8)
__device__ __forceinline__ void mma(__nv_bfloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(__half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t pack(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ uint32_t pack(__half, float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// ---- the two products

// Calls f(m, n, e) for every element of a thread's fragment.
template <int MT, int NT, class F>
__device__ __forceinline__ void each(F f) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(m, n, e);
    }
  }
}

template <int MT, int NT>
__device__ __forceinline__ void clear(float (&x)[MT][NT][4]) {
  each<MT, NT>([&](int m, int n, int e) { x[m][n][e] = 0.0f; });
}

// A warp's 16·MT rows of a tile, the left side of a product. KEEP: they are loaded once and stay in registers.
template <class T, int D, int MT, bool KEEP>
struct Left {
  const T* rows;
  uint32_t address;
  uint32_t kept[KEEP ? MT : 1][KEEP ? D / 16 : 1][4];

  __device__ __forceinline__ explicit Left(const T* rows) : rows(rows) {
    const int lane = threadIdx.x % 32;
    address = shared_address(rows + Tile<T, D>::at(lane & 15, lane >> 4));
    if constexpr (KEEP) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) load(kept[m][k], m, k);
      }
    }
  }

  // Sixteen rows and columns. The number of a chunk is combined by XOR (see Tile), so 2 k is too.
  __device__ __forceinline__ void load(uint32_t (&a)[4], int m, int k) const {
    load_matrices(a, (address ^ (32 * k)) + 16 * m * Tile<T, D>::kRowBytes);
  }

  __device__ __forceinline__ void get(uint32_t (&a)[4], int m, int k) const {
    if constexpr (KEEP) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = kept[m][k][r];
    } else {
      load(a, m, k);
    }
  }
};

// Sums in parts of 64 columns, since the error of a float32 sum grows with its length, and eager's sums are shorter.
template <int D, int MT, int NT>
__device__ __forceinline__ void product_float(float (&s)[MT][NT][4], const float* x, const float* y, float factor) {
  using At = Tile<float, D>;
  constexpr int kPart = D < 64 ? D / 4 : 16;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  clear(s);
#pragma unroll 1
  for (int first = 0; first < D / 4; first += kPart) {
    float part[MT][NT][4];
    clear(part);
#pragma unroll 2
    for (int chunk = first; chunk < first + kPart; ++chunk) {
      float4 a[MT][2];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) a[m][h] = *reinterpret_cast<const float4*>(x + At::at(16 * m + g + 8 * h, chunk));
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float4 b = *reinterpret_cast<const float4*>(y + At::at(8 * n + 2 * t + e, chunk));
          b.x *= factor, b.y *= factor, b.z *= factor, b.w *= factor;
#pragma unroll
          for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float& sum = part[m][n][2 * h + e];
              sum = fmaf(a[m][h].x, b.x, sum);
              sum = fmaf(a[m][h].y, b.y, sum);
              sum = fmaf(a[m][h].z, b.z, sum);
              sum = fmaf(a[m][h].w, b.w, sum);
            }
          }
        }
      }
    }
    each<MT, NT>([&](int m, int n, int e) { s[m][n][e] += part[m][n][e]; });
  }
}

// s = x yᵀ (16·MT, 8·NT) of a warp's rows x and a tile y (8·NT, D). float32 takes factor·y,
// rounded; factor is dropout's scale and y is v. If out equals one v, do·out is then do·v to the bit.
template <class T, int D, int MT, int NT, bool KEEP>
__device__ __forceinline__ void product(float (&s)[MT][NT][4], const Left<T, D, MT, KEEP>& x, const T* y,
                                        float factor = 1.0f) {
  if constexpr (sizeof(T) == 4) {
    product_float<D>(s, x.rows, y, factor);
  } else {
    clear(s);
    const int lane = threadIdx.x % 32;
    const uint32_t address = shared_address(y + Tile<T, D>::at((lane & 7) | (lane >> 4) << 3, lane >> 3 & 1));
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) x.get(a[m], m, k);
#pragma unroll
      for (int n = 0; n < NT; n += 2) {
        uint32_t b[4];
        load_matrices(b, (address ^ (32 * k)) + 8 * n * Tile<T, D>::kRowBytes);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          mma(T(), s[m][n], a[m], b[0], b[1]);
          mma(T(), s[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

// The sum of a step is computed separately and then added to the sum so far, for the same reason. 32 columns at a time,
// to save registers.
template <int D, int MT, int NT, int DT>
__device__ __forceinline__ void accumulate_float(float (&acc)[MT][DT][4], const float (&p)[MT][NT][4], const float* z,
                                                 int chunk0) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int first = 0; first < DT; first += 4) {
    float part[MT][4][4];
    clear(part);
#pragma unroll 1
    for (int lane = 0; lane < 4; ++lane) {  // the lane, of the four that share a row, that has these columns
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float a[MT][2];
#pragma unroll
          for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) a[m][h] = __shfl_sync(0xFFFFFFFFu, p[m][n][2 * h + e], lane, 4);
          }
#pragma unroll
          for (int j = 0; j < 4; j += 2) {
            const int chunk = chunk0 + 2 * (first + j) + t;
            const float4 b = *reinterpret_cast<const float4*>(z + Tile<float, D>::at(8 * n + 2 * lane + e, chunk));
#pragma unroll
            for (int m = 0; m < MT; ++m) {
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                part[m][j][2 * h] = fmaf(a[m][h], b.x, part[m][j][2 * h]);
                part[m][j][2 * h + 1] = fmaf(a[m][h], b.y, part[m][j][2 * h + 1]);
                part[m][j + 1][2 * h] = fmaf(a[m][h], b.z, part[m][j + 1][2 * h]);
                part[m][j + 1][2 * h + 1] = fmaf(a[m][h], b.w, part[m][j + 1][2 * h + 1]);
              }
            }
          }
        }
      }
    }
    each<MT, 4>([&](int m, int n, int e) { acc[m][first + n][e] += part[m][n][e]; });
  }
}

// acc (16·MT, 8·DT) += p z, for a fragment p (16·MT, 8·NT), rounded to T, and the columns of a tile z (8·NT, D) from
// `chunk0` chunks on. column() below gives the column of an element of acc.
template <class T, int D, int MT, int NT, int DT>
__device__ __forceinline__ void accumulate(float (&acc)[MT][DT][4], const float (&p)[MT][NT][4], const T* z,
                                           int chunk0) {
  if constexpr (sizeof(T) == 4) {
    accumulate_float<D>(acc, p, z, chunk0);
  } else {
    const int lane = threadIdx.x % 32;
    const uint32_t address = shared_address(z + Tile<T, D>::at(lane & 15, lane >> 4)) ^ (16 * chunk0);
#pragma unroll
    for (int k = 0; k < NT; k += 2) {
      uint32_t a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[m][r] = pack(T(), p[m][k + r / 2][r % 2 * 2], p[m][k + r / 2][r % 2 * 2 + 1]);
      }
#pragma unroll
      for (int n = 0; n < DT; n += 2) {
        uint32_t b[4];
        load_transposed(b, (address ^ (16 * n)) + 8 * k * Tile<T, D>::kRowBytes);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          mma(T(), acc[m][n], a[m], b[0], b[1]);
          mma(T(), acc[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

// The first of the two neighbouring columns of elements 0 and 1 of acc[.][n], and, eight rows below, of 2 and 3.
template <class T>
__device__ __forceinline__ int column(int n) {
  const int t = threadIdx.x % 4;
  return sizeof(T) == 2 ? 8 * n + 2 * t : 16 * (n / 2) + 4 * t + 2 * (n % 2);
}

}  // namespace fastlm::cuda
