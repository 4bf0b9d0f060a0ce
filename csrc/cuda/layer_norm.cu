// layer_norm and rms_norm: h = residual + dropout(x); y = norm(h) * weight + bias. The maths: fastlm/ops/layer_norm.py.
//
// Forward: THREADS threads hold a row in registers, N packs of VEC columns each, so every tensor is read and written
// once, 16 bytes at a time. Backward: each block loops over rows and keeps the weight gradients of its columns in
// registers. Its next rows are copied to shared memory meanwhile. It writes one partial sum, and a second kernel adds
// these in order. Rows that are too long for registers are read again from the second-level cache. VEC is 1 if rows do
// not start on 16 bytes.
#include <algorithm>

#include "launch.h"
#include "layer_norm_rows.cuh"
#include "partials.cuh"

namespace fastlm::cuda {

constexpr int kLong = 512;  // threads of a block whose row is read again

__host__ __device__ constexpr int block_size(int threads) { return threads < 128 ? 128 : threads; }

// ---- rows in registers

template <class T, int VEC, int N, int THREADS>
__global__ void __launch_bounds__(block_size(THREADS)) layer_norm_fwd_kernel(const LayerNormForward a) {
  constexpr int kRows = block_size(THREADS) / THREADS;
  __shared__ float buffer[3][32];
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / THREADS;
  if (row >= a.rows) return;  // a whole warp returns; with more threads per row, every block has a row
  const int lane = threadIdx.x % THREADS;
  const Key key = a.dropout.threshold ? dropout_key(a.dropout.rng, a.dropout.site) : Key{0, 0};
  const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
  const T* residual = static_cast<const T*>(a.residual) + (a.residual ? row * a.stride_residual : 0);

  Raw<T, VEC> x_packs[N], residual_packs[N];
  load_packs<THREADS, VEC>(x, lane, a.cols, x_packs, a.wide);
  if (a.residual) load_packs<THREADS, VEC>(residual, lane, a.cols, residual_packs, a.wide);
  float h[N][VEC];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t col = int64_t(i * THREADS + lane) * VEC;
    if (col >= a.cols) continue;
    unpack<T>(x_packs[i], h[i]);
    if (a.dropout.threshold) drop(h[i], row, col, a.dropout, key);
    if (a.residual) {
      float r[VEC];
      unpack<T>(residual_packs[i], r);
#pragma unroll
      for (int j = 0; j < VEC; ++j) h[i][j] += r[j];
    }
    if (a.h) {  // statistics of h as it is stored, since backward normalises that
      store(static_cast<T*>(a.h) + row * a.cols + col, h[i]);
#pragma unroll
      for (int j = 0; j < VEC; ++j) h[i][j] = to_float(from_float<T>(h[i][j]));
    }
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum += h[i][j];
  }
  const float mean = a.mean ? row_sum<THREADS>(sum, buffer[0]) / float(a.cols) : 0.0f;
  float sums[2] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (int64_t(i * THREADS + lane) * VEC >= a.cols) continue;
#pragma unroll
    for (int j = 0; j < VEC; ++j) add_centred(h[i][j] - mean, sums);
  }
  row_sums<THREADS>(sums, buffer + 1);
  const Statistics s = make_statistics(a, mean, sums);
  if (lane == 0) save(a, row, s);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t col = int64_t(i * THREADS + lane) * VEC;
    if (col >= a.cols) continue;
#pragma unroll
    for (int j = 0; j < VEC; ++j) h[i][j] = s.normalize(h[i][j]);
    if (a.weight) {
      float w[VEC];
      load_parameter<VEC, T>(a.weight, a.weight_is_float, col, w, a.wide);
#pragma unroll
      for (int j = 0; j < VEC; ++j) h[i][j] *= w[j];
    }
    if (a.bias) {
      float b[VEC];
      load_parameter<VEC, T>(a.bias, a.bias_is_float, col, b, a.wide);
#pragma unroll
      for (int j = 0; j < VEC; ++j) h[i][j] += b[j];
    }
    store(static_cast<T*>(a.y) + row * a.cols + col, h[i]);
  }
}

// Blocks that a multiprocessor should hold: 16 warps if a thread holds 16 values of each tensor, 20 for 8, 32 for 4.
// Without this, ptxas limits float32's <4, 2, 32> to 72 registers on sm_90, and spills.
__host__ __device__ constexpr int bwd_blocks(int values, int block) {
  return (values > 8 ? 512 : values > 4 ? 640 : 1024) / block;
}

template <class T, int VEC, int N, int THREADS>
__global__ void __launch_bounds__(block_size(THREADS), bwd_blocks(VEC* N, block_size(THREADS)))
    layer_norm_bwd_kernel(const LayerNormBackward a) {
  constexpr int kRows = block_size(THREADS) / THREADS;
  extern __shared__ uint4 memory[];
  __shared__ float buffer[2][2][32];  // rows alternate: a row's sums are read while the next one's are written
  __shared__ float sums[2][THREADS * N * VEC];  // of weights' gradients, over the rows of a block
  const int lane = threadIdx.x % THREADS, group = threadIdx.x / THREADS;
  const Key key = a.dropout.threshold ? dropout_key(a.dropout.rng, a.dropout.site) : Key{0, 0};
  const float inverse = 1.0f / float(a.cols);

  float w[N][VEC], dw[N][VEC] = {}, db[N][VEC] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t col = int64_t(i * THREADS + lane) * VEC;
#pragma unroll
    for (int j = 0; j < VEC; ++j) w[i][j] = 1.0f;
    if (a.weight && col < a.cols) load_parameter<VEC, T>(a.weight, a.weight_is_float, col, w[i], a.wide);
  }
  // Rows that do not start on 16 bytes are not copied ahead, but loaded when it is their turn.
  using Rows = Ahead<T, N, block_size(THREADS)>;
  const Rows rows(memory, a.dh != nullptr);
  const bool ahead = VEC > 1 && a.wide;
  const int64_t step = int64_t(gridDim.x) * kRows;
  auto fetch = [&](int64_t row, int stage) {
    if constexpr (VEC > 1) {
      if (ahead && row < a.rows) rows.template fetch<THREADS>(a, row, lane, stage);
      __pipeline_commit();
    }
  };
  int64_t row = int64_t(blockIdx.x) * kRows + group;
#pragma unroll
  for (int k = 0; k < Rows::kStages; ++k) fetch(row + k * step, k);
  for (int stage = 0, turn = 0; row < a.rows; row += step, turn ^= 1, stage = (stage + 1) % Rows::kStages) {
    Statistics s;
    float g[N][VEC], xhat[N][VEC];
    if (ahead) {
      __pipeline_wait_prior(Rows::kStages - 1);
      s = rows.statistics(a.mean, stage);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (int64_t(i * THREADS + lane) * VEC >= a.cols) continue;
        load(rows.pack(stage, 0, i), g[i]);
        load(rows.pack(stage, 1, i), xhat[i]);
      }
    } else {
      s = saved(a, row);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int64_t col = int64_t(i * THREADS + lane) * VEC;
        if (col >= a.cols) continue;
        load(static_cast<const T*>(a.dy) + row * a.stride_dy + col, g[i], false);
        load(static_cast<const T*>(a.h) + row * a.stride_h + col, xhat[i], false);
      }
    }
    float sum[2] = {};  // of g and of g x̂
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (int64_t(i * THREADS + lane) * VEC >= a.cols) continue;
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        xhat[i][j] = s.normalize(xhat[i][j]);
        dw[i][j] += g[i][j] * xhat[i][j];
        db[i][j] += g[i][j];
        g[i][j] *= w[i][j];
        sum[0] += g[i][j];
        sum[1] += g[i][j] * xhat[i][j];
      }
    }
    // With g = dy weight:  dh = rstd (g - mean(g) - x̂ mean(g x̂)); rms has no mean(g).
    row_sums<THREADS>(sum, buffer[turn]);
    const float mean_g = a.mean ? sum[0] * inverse : 0.0f, mean_gx = sum[1] * inverse;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t col = int64_t(i * THREADS + lane) * VEC;
      if (col >= a.cols) continue;
#pragma unroll
      for (int j = 0; j < VEC; ++j) g[i][j] = s.rstd * (g[i][j] - mean_g - xhat[i][j] * mean_gx);
      if (a.dh) {
        float dh[VEC];
        if (ahead) {
          load(rows.pack(stage, 2, i), dh);
        } else {
          load(static_cast<const T*>(a.dh) + row * a.stride_dh + col, dh, false);
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) g[i][j] += dh[j];
      }
    }
    fetch(row + Rows::kStages * step, stage);  // into the place that was just read
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t col = int64_t(i * THREADS + lane) * VEC;
      if (col >= a.cols) continue;
      store(static_cast<T*>(a.dresidual) + row * a.cols + col, g[i]);
      if (a.dropout.threshold) {
        drop(g[i], row, col, a.dropout, key);
        store(static_cast<T*>(a.dx) + row * a.cols + col, g[i]);
      }
    }
  }
  if (!a.dweight && !a.dbias) return;

  // The rows that share a block add their columns one after the other; the last one writes.
  for (int k = 0; k < kRows; ++k) {
    if (group == k) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          const int at = (i * THREADS + lane) * VEC + j;
          if (k > 0) {
            dw[i][j] += sums[0][at];
            db[i][j] += sums[1][at];
          }
          if (k < kRows - 1) {
            sums[0][at] = dw[i][j];
            sums[1][at] = db[i][j];
          }
        }
      }
    }
    if (k < kRows - 1) __syncthreads();
  }
  if (group != kRows - 1) return;
  float* partial = a.partial + int64_t(blockIdx.x) * a.cols;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t col = int64_t(i * THREADS + lane) * VEC;
    if (col >= a.cols) continue;
    if (a.dweight) store(partial + col, dw[i]);
    if (a.dbias) store(partial + int64_t(gridDim.x) * a.cols + col, db[i]);
  }
}

// ---- rows that are read again

template <class T, int VEC>
__global__ void __launch_bounds__(kLong) layer_norm_fwd_long_kernel(const LayerNormForward a) {
  __shared__ float buffer[3][32];
  const int64_t row = blockIdx.x;
  const Key key = a.dropout.threshold ? dropout_key(a.dropout.rng, a.dropout.site) : Key{0, 0};
  const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
  const T* residual = static_cast<const T*>(a.residual) + (a.residual ? row * a.stride_residual : 0);
  T* stored = static_cast<T*>(a.h) + (a.h ? row * a.cols : 0);
  const T* source = a.h ? stored : x;  // a thread reads back only what it wrote
  float v[VEC];
  float sum = 0.0f;
  for (int64_t col = int64_t(threadIdx.x) * VEC; col < a.cols; col += kLong * VEC) {
    load(x + col, v, a.wide);
    if (a.dropout.threshold) drop(v, row, col, a.dropout, key);
    if (a.residual) {
      float r[VEC];
      load(residual + col, r, a.wide);
      for (int j = 0; j < VEC; ++j) v[j] += r[j];
    }
    if (a.h) store(stored + col, v);
    for (int j = 0; j < VEC; ++j) sum += to_float(from_float<T>(v[j]));
  }
  const float mean = a.mean ? row_sum<kLong>(sum, buffer[0]) / float(a.cols) : 0.0f;
  float sums[2] = {};
  for (int64_t col = int64_t(threadIdx.x) * VEC; col < a.cols; col += kLong * VEC) {
    load(source + col, v, a.wide);
    for (int j = 0; j < VEC; ++j) add_centred(v[j] - mean, sums);
  }
  row_sums<kLong>(sums, buffer + 1);
  const Statistics s = make_statistics(a, mean, sums);
  if (threadIdx.x == 0) save(a, row, s);
  for (int64_t col = int64_t(threadIdx.x) * VEC; col < a.cols; col += kLong * VEC) {
    load(source + col, v, a.wide);
    float w[VEC], b[VEC];
    if (a.weight) load_parameter<VEC, T>(a.weight, a.weight_is_float, col, w, a.wide);
    if (a.bias) load_parameter<VEC, T>(a.bias, a.bias_is_float, col, b, a.wide);
    for (int j = 0; j < VEC; ++j) {
      v[j] = s.normalize(v[j]);
      if (a.weight) v[j] *= w[j];
      if (a.bias) v[j] += b[j];
    }
    store(static_cast<T*>(a.y) + row * a.cols + col, v);
  }
}

template <class T, int VEC>
__global__ void __launch_bounds__(kLong) layer_norm_bwd_long_kernel(const LayerNormBackward a) {
  __shared__ float buffer[2][32];
  const int64_t row = blockIdx.x;
  const Key key = a.dropout.threshold ? dropout_key(a.dropout.rng, a.dropout.site) : Key{0, 0};
  const T* dy = static_cast<const T*>(a.dy) + row * a.stride_dy;
  const T* h = static_cast<const T*>(a.h) + row * a.stride_h;
  const Statistics s = saved(a, row);
  float g[VEC], xhat[VEC], w[VEC];
  auto read = [&](int64_t col) {
    load(dy + col, g, a.wide);
    load(h + col, xhat, a.wide);
    if (a.weight) load_parameter<VEC, T>(a.weight, a.weight_is_float, col, w, a.wide);
    for (int j = 0; j < VEC; ++j) {
      xhat[j] = s.normalize(xhat[j]);
      if (a.weight) g[j] *= w[j];
    }
  };
  float sum_g = 0.0f, sum_gx = 0.0f;
  for (int64_t col = int64_t(threadIdx.x) * VEC; col < a.cols; col += kLong * VEC) {
    read(col);
    for (int j = 0; j < VEC; ++j) {
      sum_g += g[j];
      sum_gx += g[j] * xhat[j];
    }
  }
  const float mean_g = a.mean ? row_sum<kLong>(sum_g, buffer[0]) / float(a.cols) : 0.0f;
  const float mean_gx = row_sum<kLong>(sum_gx, buffer[1]) / float(a.cols);
  for (int64_t col = int64_t(threadIdx.x) * VEC; col < a.cols; col += kLong * VEC) {
    read(col);
    for (int j = 0; j < VEC; ++j) g[j] = s.rstd * (g[j] - mean_g - xhat[j] * mean_gx);
    if (a.dh) {
      float dh[VEC];
      load(static_cast<const T*>(a.dh) + row * a.stride_dh + col, dh, a.wide);
      for (int j = 0; j < VEC; ++j) g[j] += dh[j];
    }
    store(static_cast<T*>(a.dresidual) + row * a.cols + col, g);
    if (a.dropout.threshold) {
      drop(g, row, col, a.dropout, key);
      store(static_cast<T*>(a.dx) + row * a.cols + col, g);
    }
  }
}

constexpr int kLongCols = 128;  // columns of a block of the kernel below, one a thread

// Partial sums of long rows' weight gradients: block (x, y) takes kLongCols columns, and every gridDim.y-th row.
template <class T>
__global__ void __launch_bounds__(kLongCols) layer_norm_weights_long_kernel(const LayerNormBackward a) {
  const int64_t col = int64_t(blockIdx.x) * kLongCols + threadIdx.x;
  if (col >= a.cols) return;
  float dw = 0.0f, db = 0.0f;
#pragma unroll 4
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const float dy = to_float(static_cast<const T*>(a.dy)[row * a.stride_dy + col]);
    const float h = to_float(static_cast<const T*>(a.h)[row * a.stride_h + col]);
    dw += dy * saved(a, row).normalize(h);
    db += dy;
  }
  if (a.dweight) a.partial[blockIdx.y * a.cols + col] = dw;
  if (a.dbias) a.partial[(int64_t(gridDim.y) + blockIdx.y) * a.cols + col] = db;
}

// ---- what is launched

namespace {

template <class T, int VEC, int N, int THREADS>
void run_fwd(const LayerNormForward& a, Place place) {
  constexpr int kRows = block_size(THREADS) / THREADS;
  launch(layer_norm_fwd_kernel<T, VEC, N, THREADS>, grid_size((a.rows + kRows - 1) / kRows), block_size(THREADS), 0,
         place.stream, a);
}

// Up to four packs a thread, which is 32 values of bfloat16. A row gets one warp if that is enough: no barrier.
template <class T>
void forward(LayerNormForward a, Place place) {
  constexpr int V = kVector<T>;
  a.wide = is_wide(a.x, a.stride_x, sizeof(T)) && is_wide(a.residual, a.stride_residual, sizeof(T)) &&
           is_wide(a.weight, 0, 1) && is_wide(a.bias, 0, 1);
  if (a.cols % V != 0) {
    if (a.cols <= 128 * 4) return run_fwd<T, 1, 4, 128>(a, place);
    if (a.cols <= 512 * 4) return run_fwd<T, 1, 4, 512>(a, place);
    return launch(layer_norm_fwd_long_kernel<T, 1>, grid_size(a.rows), kLong, 0, place.stream, a);
  }
  const int64_t packs = a.cols / V;
  if (packs <= 32) return run_fwd<T, V, 1, 32>(a, place);
  if (packs <= 64) return run_fwd<T, V, 2, 32>(a, place);
  if (packs <= 96) return run_fwd<T, V, 3, 32>(a, place);
  if (packs <= 128) return run_fwd<T, V, 4, 32>(a, place);
  if (packs <= 256) return run_fwd<T, V, 2, 128>(a, place);
  if (packs <= 512) return run_fwd<T, V, 4, 128>(a, place);
  if (packs <= 1024) return run_fwd<T, V, 2, 512>(a, place);
  if (packs <= 2048) return run_fwd<T, V, 4, 512>(a, place);
  launch(layer_norm_fwd_long_kernel<T, V>, grid_size(a.rows), kLong, 0, place.stream, a);
}

template <class T>
void finish(const LayerNormBackward& a, int64_t count, Place place) {
  if (a.dweight) sum_partials<T>(a.partial, count, a.cols, a.dweight, a.weight_is_float, place);
  if (a.dbias) sum_partials<T>(a.partial + count * a.cols, count, a.cols, a.dbias, true, place);
}

// Blocks that are resident at once; each loops over its rows and writes one partial sum.
template <class T, int VEC, int N, int THREADS>
void run_bwd(const LayerNormBackward& a, Place place) {
  constexpr int kBlock = block_size(THREADS), kRows = kBlock / THREADS;
  const auto kernel = layer_norm_bwd_kernel<T, VEC, N, THREADS>;
  const size_t shared = VEC > 1 && a.wide ? Ahead<T, N, kBlock>::bytes(a.dh) : 0;
  const int64_t resident =
      std::min<int64_t>(partial_rows(place.device), resident_blocks(kernel, kBlock, shared, place.device));
  const int64_t blocks = std::min<int64_t>((a.rows + kRows - 1) / kRows, resident);
  launch(kernel, unsigned(blocks), kBlock, shared, place.stream, a);
  finish<T>(a, blocks, place);
}

template <class T, int VEC>
void run_bwd_long(const LayerNormBackward& a, Place place) {
  launch(layer_norm_bwd_long_kernel<T, VEC>, grid_size(a.rows), kLong, 0, place.stream, a);
  if (!a.dweight && !a.dbias) return;
  const int64_t columns = (a.cols + kLongCols - 1) / kLongCols;
  const int64_t resident = resident_blocks(layer_norm_weights_long_kernel<T>, kLongCols, 0, place.device);
  const int64_t count =
      std::min({a.rows, partial_rows(place.device), std::max<int64_t>(1, resident / columns), int64_t(65535)});
  launch(layer_norm_weights_long_kernel<T>, dim3(unsigned(columns), unsigned(count)), kLongCols, 0, place.stream, a);
  finish<T>(a, count, place);
}

// At most two packs a thread, since besides dy and x̂ it holds the weight and the sums of two gradients.
template <class T>
void backward(LayerNormBackward a, Place place) {
  constexpr int V = kVector<T>;
  a.wide = is_wide(a.dy, a.stride_dy, sizeof(T)) && is_wide(a.dh, a.stride_dh, sizeof(T)) &&
           is_wide(a.h, a.stride_h, sizeof(T)) && is_wide(a.weight, 0, 1);
  if (a.cols % V != 0) {
    if (a.cols <= 128 * 4) return run_bwd<T, 1, 4, 128>(a, place);
    if (a.cols <= 512 * 4) return run_bwd<T, 1, 4, 512>(a, place);
    return run_bwd_long<T, 1>(a, place);
  }
  const int64_t packs = a.cols / V;
  if (packs <= 32) return run_bwd<T, V, 1, 32>(a, place);
  if (packs <= 64) return run_bwd<T, V, 2, 32>(a, place);
  if (packs <= 128) return run_bwd<T, V, 1, 128>(a, place);
  if (packs <= 256) return run_bwd<T, V, 2, 128>(a, place);
  if (packs <= 512) return run_bwd<T, V, 1, 512>(a, place);
  if (packs <= 1024) return run_bwd<T, V, 2, 512>(a, place);
  run_bwd_long<T, V>(a, place);
}

}  // namespace

int64_t partial_rows(int device) { return 8 * multiprocessors(device); }

void layer_norm_fwd(const LayerNormForward& args, DType dtype, Place place) {
  if (args.rows == 0) return;
  const OnDevice here(place.device);
  if (dtype == DType::f32) return forward<float>(args, place);
  dtype == DType::bf16 ? forward<__nv_bfloat16>(args, place) : forward<__half>(args, place);
}

void layer_norm_bwd(const LayerNormBackward& args, DType dtype, Place place) {
  const OnDevice here(place.device);
  if (dtype == DType::f32) return backward<float>(args, place);
  dtype == DType::bf16 ? backward<__nv_bfloat16>(args, place) : backward<__half>(args, place);
}

}  // namespace fastlm::cuda
