// embedding: y = dropout(LN(word + position + type)), forward and backward. The maths: fastlm/ops/embedding.py.
//
// Forward reads a row of each table and writes y; what backward needs besides the tables are three numbers a token.
// Backward first takes dh, row by row; then every thread owns a slice of columns and adds all tokens' dh, in order, to
// the rows of the tables. So nothing is sorted, no two threads write to one place, and their number changes no bit.
#include "embedding.h"

#include "norm.h"
#include "parallel.h"
#include "partials.h"
#include "philox_many.h"

namespace fastlm::cpu {
namespace {

constexpr int64_t kSlice = 16;  // columns: a cache line of float
constexpr int64_t kFew = 16;    // the rows of a table with so few (types) sum thousands of tokens: they sum runs
constexpr int64_t kRun = 64;    // of so many tokens in float, and the runs in double

FASTLM_INLINE int64_t row_of(const Lookup& lookup, int64_t token) {
  return lookup.ids ? lookup.ids[token] : token % lookup.period;
}

// h (cols,) = the sum of the token's rows.
template <class T>
FASTLM_INLINE void sum_rows(const Lookup* lookup, int64_t token, int64_t cols, float* h) {
  const T* word = static_cast<const T*>(lookup[0].table) + row_of(lookup[0], token) * lookup[0].stride;
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) h[j] = load(word + j);
  for (int k = 1; k < 3; ++k) {
    if (!lookup[k].table) continue;
    const T* row = static_cast<const T*>(lookup[k].table) + row_of(lookup[k], token) * lookup[k].stride;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) h[j] += load(row + j);
  }
}

template <class T>
FASTLM_CLONES void forward_tokens(const EmbeddingForward& a, int64_t begin, int64_t end, float* h) {
  const int64_t cols = a.cols;
  const Key key = a.dropout.threshold ? dropout_key(a.dropout.rng, a.dropout.site) : Key{0, 0};
  for (int64_t t = begin; t < end; ++t) {
    T* y = static_cast<T*>(a.y) + t * cols;
    sum_rows<T>(a.lookup, t, cols, h);
    if (a.weight) {
      const Statistics s = statistics(h, cols, a.eps, false);
      save(s, t, a.tokens, a.mean, a.rstd);
      if (a.bias) {
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) h[j] = s.normalize(h[j]) * a.weight[j] + a.bias[j];
      } else {
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) h[j] = s.normalize(h[j]) * a.weight[j];
      }
    }
    if (a.dropout.threshold) drop_row(h, t, cols, a.dropout, key);
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) store(y + j, h[j]);
  }
}

// dh of a block of tokens; dweight and dbias are the block's own (cols,) partial sums, set here, where there is a norm.
template <class T>
FASTLM_CLONES void backward_tokens(const EmbeddingBackward& a, int64_t begin, int64_t end, float* dweight, float* dbias,
                                   float* h) {
  const int64_t cols = a.cols;
  const Key key = a.dropout.threshold ? dropout_key(a.dropout.rng, a.dropout.site) : Key{0, 0};
  if (a.weight) {
    for (int64_t j = 0; j < cols; ++j) dweight[j] = dbias[j] = 0.0f;
  }
  for (int64_t t = begin; t < end; ++t) {
    const T* dy = static_cast<const T*>(a.dy) + t * a.stride_dy;
    float* dh = a.dh + t * cols;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) dh[j] = load(dy + j);
    if (a.dropout.threshold) drop_row(dh, t, cols, a.dropout, key);
    if (!a.weight) continue;

    // With g = dy weight:  dh = rstd (g - mean(g) - x̂ mean(g x̂)).
    sum_rows<T>(a.lookup, t, cols, h);
    const Statistics s = saved(a.mean, a.rstd, t, a.tokens);
    float sum_g = 0.0f, sum_gx = 0.0f;
#pragma omp simd reduction(+ : sum_g, sum_gx)
    for (int64_t j = 0; j < cols; ++j) {
      const float d = dh[j], xhat = s.normalize(h[j]), g = d * a.weight[j];
      sum_g += g;
      sum_gx += g * xhat;
      dweight[j] += d * xhat;
      dbias[j] += d;
      h[j] = xhat;
      dh[j] = g;
    }
    const float mean_g = sum_g / float(cols), mean_gx = sum_gx / float(cols);
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) dh[j] = s.rstd * (dh[j] - mean_g - h[j] * mean_gx);
  }
}

FASTLM_INLINE void add(const float* from, int64_t n, float* to) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] += from[j];
}

// Adds columns [begin, end) of all tokens' dh to the rows of one table.
FASTLM_CLONES void add_columns(const EmbeddingBackward& a, Lookup lookup, const TableGradient& gradient, int64_t begin,
                               int64_t end) {
  const int64_t n = end - begin;
  if (gradient.ids) lookup.ids = gradient.ids;
  if (gradient.rows > kFew) {
    for (int64_t t = 0; t < a.tokens; ++t) {
      const int64_t row = row_of(lookup, t);
      if (row != gradient.skip) add(a.dh + t * a.cols + begin, n, gradient.data + row * a.cols + begin);
    }
    return;
  }
  const int64_t size = gradient.rows * n;
  const auto run = scratch<float>(size);
  const auto total = scratch<double>(size);
  std::fill(total.get(), total.get() + size, 0.0);
  for (int64_t first = 0; first < a.tokens; first += kRun) {
    std::fill(run.get(), run.get() + size, 0.0f);
    for (int64_t t = first; t < std::min(first + kRun, a.tokens); ++t) {
      add(a.dh + t * a.cols + begin, n, run.get() + row_of(lookup, t) * n);
    }
    for (int64_t j = 0; j < size; ++j) total[j] += double(run[j]);
  }
  for (int64_t row = 0; row < gradient.rows; ++row) {
    if (row == gradient.skip) continue;
    float* to = gradient.data + row * a.cols + begin;
    for (int64_t j = 0; j < n; ++j) to[j] += float(total[row * n + j]);
  }
}

template <class T>
void forward(const EmbeddingForward& a, int threads) {
  parallel_for(a.tokens, grain_of(a.cols), threads, [&](int64_t begin, int64_t end) {
    const auto h = scratch<float>(a.cols);
    forward_tokens<T>(a, begin, end, h.get());
  });
}

template <class T>
void backward(const EmbeddingBackward& a, int threads) {
  const int64_t blocks = row_blocks(a.tokens);
  float* dbias = a.partial + blocks * a.cols;
  parallel_for(blocks, grain_of(a.tokens / blocks * a.cols), threads, [&](int64_t begin, int64_t end) {
    const auto h = scratch<float>(a.cols);
    for (int64_t b = begin; b < end; ++b) {
      backward_tokens<T>(a, a.tokens * b / blocks, a.tokens * (b + 1) / blocks, a.partial + b * a.cols,
                         dbias + b * a.cols, h.get());
    }
  });
  if (a.dweight) sum_partials(a.partial, blocks, a.cols, a.dweight);
  if (a.dbias) sum_partials(dbias, blocks, a.cols, a.dbias);
  parallel_for((a.cols + kSlice - 1) / kSlice, grain_of(a.tokens * kSlice), threads, [&](int64_t begin, int64_t end) {
    for (int k = 0; k < 3; ++k) {
      if (!a.gradient[k].data) continue;
      add_columns(a, a.lookup[k], a.gradient[k], begin * kSlice, std::min(end * kSlice, a.cols));
    }
  });
}

}  // namespace

void embedding_fwd(const EmbeddingForward& args, DType dtype, int threads) {
  dtype == DType::f32 ? forward<float>(args, threads) : forward<bfloat16>(args, threads);
}

void embedding_bwd(const EmbeddingBackward& args, DType dtype, int threads) {
  dtype == DType::f32 ? backward<float>(args, threads) : backward<bfloat16>(args, threads);
}

}  // namespace fastlm::cpu
