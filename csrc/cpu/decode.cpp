// All layers run in one parallel region. A phase is one product, or attention; the threads share out its rows of
// weights, some 192 KB at a time, or its heads. A norm of x is computed by every thread for itself: that takes less
// time than waiting for one more phase.
#include "decode.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "gelu.h"
#include "norm.h"
#include "parallel.h"
#include "simd.h"
#include "team.h"

namespace fastlm::cpu {
namespace {

// Bytes of weights that a thread takes at once: 16 runs of 12 KB (matvec.cpp), read at 31 GB/s; of 48 KB, 28.
constexpr int64_t PIECE = 192 << 10;
constexpr int64_t WORTH = 1 << 20;  // bytes of weights in a step that are worth a thread, which waits for the others
constexpr int64_t MOST_ROWS = 240;  // that a thread takes at once

// A multiple of the runs, 12 or 16, where there are so many rows.
int64_t piece_rows(const Matrix& m) {
  const int64_t rows = PIECE / m.row_bytes();
  return std::clamp<int64_t>(rows >= 48 ? rows / 48 * 48 : rows / 12 * 12, 12, MOST_ROWS);
}

int64_t pieces(int64_t rows, const Matrix& m) { return (rows + piece_rows(m) - 1) / piece_rows(m); }

// sums (batch, MOST_ROWS) become the product: times the scale, plus the bias. first: the row of the first column.
FASTLM_CLONES void finish(const Matrix& m, int64_t first, int64_t rows, int64_t batch, float* sums) {
  for (int64_t b = 0; b < batch; ++b) {
    float* y = sums + b * MOST_ROWS;
    if (m.scale) {
#pragma omp simd
      for (int64_t j = 0; j < rows; ++j) y[j] *= m.scale[first + j];
    }
    if (m.bias) {
#pragma omp simd
      for (int64_t j = 0; j < rows; ++j) y[j] += m.bias[first + j];
    }
  }
}

// y = act(x), or act(x) * gate; all of one row.
template <class Form>
FASTLM_CLONES void activate(const float* x, const float* gate, int64_t n, float* y) {
  if (gate) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[j] = x[j] * Form::at(x[j]).cdf * gate[j];
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[j] = x[j] * Form::at(x[j]).cdf;
  }
}

struct Relu {
  FASTLM_INLINE Activation at(float h) { return {h < 0.0f ? 0.0f : 1.0f, 0.0f}; }
};

void activate(DecodeActivation kind, const float* x, const float* gate, int64_t n, float* y) {
  kind == DecodeActivation::relu   ? activate<Relu>(x, gate, n, y)
  : kind == DecodeActivation::gelu ? activate<GeluErf>(x, gate, n, y)
                                   : activate<GeluTanh>(x, gate, n, y);
}

FASTLM_CLONES void add(const float* x, int64_t n, float* y) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] += x[j];
}

FASTLM_CLONES void norm_rows(const float* x, const DecodeNorm& norm, int64_t rows, int64_t cols, float eps, bool rms,
                             float scale, float* y) {
  for (int64_t r = 0; r < rows; ++r, x += cols, y += cols) {
    const Statistics s = statistics(x, cols, eps, rms);
    if (norm.bias) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) y[j] = scale * (s.normalize(x[j]) * norm.weight[j] + norm.bias[j]);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) y[j] = scale * (s.normalize(x[j]) * norm.weight[j]);
    }
  }
}

// out (d,) = softmax(scale k q + bias) v of one query and head, k and v (n, d). bias: by distance to the last key, the
// last of `distances` for all farther ones; or null. scores: (n,) scratch.
FASTLM_CLONES void attend(const float* q, const float* k, const float* v, int64_t stride, int64_t n, int64_t d,
                          float scale, const float* bias, int64_t distances, float* scores, float* out) {
  float most = -std::numeric_limits<float>::infinity();
  for (int64_t s = 0; s < n; ++s) {
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = 0; c < d; ++c) dot += q[c] * k[s * stride + c];
    scores[s] = dot * scale + (bias ? bias[std::min(n - 1 - s, distances - 1)] : 0.0f);
    most = std::max(most, scores[s]);
  }
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t s = 0; s < n; ++s) {
    scores[s] = fast_exp(scores[s] - most);
    sum += scores[s];
  }
  for (int64_t c = 0; c < d; ++c) out[c] = 0.0f;
  for (int64_t s = 0; s < n; ++s) {
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) out[c] += scores[s] * v[s * stride + c];
  }
  const float inverse = n ? 1.0f / sum : 0.0f;  // no keys: 0
#pragma omp simd
  for (int64_t c = 0; c < d; ++c) out[c] *= inverse;
}

// One thread's view of a step.
struct Step {
  const DecodeStep& a;
  Team& team;
  int64_t inner;  // heads d

  // Of all threads: (batch, width), (batch, inner) twice, (batch, linear2.cols).
  float *x = nullptr, *q = nullptr, *attended = nullptr, *hidden = nullptr;
  // Of this one: (batch, width), (batch, MOST_ROWS) twice, the scores of a head, and for `prepare`.
  float *normed = nullptr, *sums = nullptr, *gates = nullptr, *scores = nullptr;
  char* columns = nullptr;

  void embed() const {
    team.phase(a.batch, [&](int64_t b) {
      std::copy_n(a.words + a.tokens[b] * a.width, a.width, x + b * a.width);
      if (a.positions) add(a.positions + a.lengths[b] * a.width, a.width, x + b * a.width);
    });
  }

  void norm(const DecodeNorm& norm, float scale = 1.0f) const {
    norm_rows(x, norm, a.batch, a.width, a.eps, a.rms, scale, normed);
  }

  // Calls f(first, rows) for pieces of m's rows, with rows [first, first + rows) of m times `from` in `sums`.
  template <class F>
  void product(const Matrix& m, const float* from, F f) const {
    const Operand x = prepare(m, from, m.cols, a.batch, columns);
    team.phase(pieces(m.rows, m), [&](int64_t i) {
      const int64_t first = i * piece_rows(m), rows = std::min(piece_rows(m), m.rows - first);
      times(m, first, rows, x, sums);
      f(first, rows);
    });
  }

  void times(const Matrix& m, int64_t first, int64_t rows, const Operand& x, float* to) const {
    rows_times(m, first, first + rows, x, to, MOST_ROWS);
    finish(m, first, rows, a.batch, to);
  }

  // The columns [first, first + n) of q (batch, inner), and of the keys and values behind them, go to their places.
  void split(const DecodeCache& cache, int64_t first, int64_t n) const {
    for (int64_t b = 0; b < a.batch; ++b) {
      const int64_t at = (b * a.capacity + a.lengths[b]) * cache.stride;
      float* const place[] = {q + b * inner, cache.k + at, cache.v + at};
      for (int64_t j = 0; j < n;) {
        const int64_t part = (first + j) / inner, column = (first + j) % inner, count = std::min(n - j, inner - column);
        std::copy_n(sums + b * MOST_ROWS + j, count, place[part] + column);
        j += count;
      }
    }
  }

  void add_product(const Matrix& m, const float* from) const {
    product(m, from, [&](int64_t first, int64_t n) {
      for (int64_t b = 0; b < a.batch; ++b) add(sums + b * MOST_ROWS, n, x + b * a.width + first);
    });
  }

  template <class Begin, class Count>
  void attention(const DecodeCache& cache, const float* bias, Begin begin, Count count) const {
    team.phase(a.batch * a.heads, [&](int64_t i) {
      const int64_t b = i / a.heads, head = i % a.heads, at = begin(b) * cache.stride + head * a.d;
      attend(q + b * inner + head * a.d, cache.k + at, cache.v + at, cache.stride, count(b), a.d, a.softmax_scale,
             bias ? bias + head * a.distances : nullptr, a.distances, scores, attended + b * inner + head * a.d);
    });
  }

  void self_attention(const DecodeLayer& layer) const {
    norm(layer.norm1);
    product(layer.qkv, normed, [&](int64_t first, int64_t n) { split(layer.cache, first, n); });
    attention(
        layer.cache, a.distance_bias, [&](int64_t b) { return b * a.capacity; },
        [&](int64_t b) { return a.lengths[b] + 1; });
    add_product(layer.out, attended);
  }

  void cross_attention(const DecodeLayer& layer) const {
    norm(layer.norm_cross);
    product(layer.cross_q, normed, [&](int64_t first, int64_t n) {
      for (int64_t b = 0; b < a.batch; ++b) std::copy_n(sums + b * MOST_ROWS, n, q + b * inner + first);
    });
    attention(
        layer.cross, nullptr, [&](int64_t b) { return a.cross_starts[b]; },
        [&](int64_t b) { return a.cross_lengths[b]; });
    add_product(layer.cross_out, attended);
  }

  void mlp(const DecodeLayer& layer) const {
    const Matrix& m = layer.linear1;
    const int64_t cols = layer.linear2.cols;
    norm(layer.norm2);
    const Operand x = prepare(m, normed, m.cols, a.batch, columns);
    team.phase(pieces(cols, m), [&](int64_t i) {
      const int64_t first = i * piece_rows(m), rows = std::min(piece_rows(m), cols - first);
      times(m, first, rows, x, sums);
      if (a.gated) times(m, cols + first, rows, x, gates);
      for (int64_t b = 0; b < a.batch; ++b) {
        activate(a.activation, sums + b * MOST_ROWS, a.gated ? gates + b * MOST_ROWS : nullptr, rows,
                 hidden + b * cols + first);
      }
    });
    add_product(layer.linear2, hidden);
  }

  void run(const std::vector<DecodeLayer>& layers) const {
    embed();
    for (const DecodeLayer& layer : layers) {
      self_attention(layer);
      if (layer.norm_cross.weight) cross_attention(layer);
      mlp(layer);
    }
    norm(a.norm, a.output_scale);
    product(a.head, normed, [&](int64_t first, int64_t n) {
      for (int64_t b = 0; b < a.batch; ++b) std::copy_n(sums + b * MOST_ROWS, n, a.logits + b * a.head.rows + first);
    });
  }
};

void check(const DecodeStep& a, int64_t b) {
  const auto refuse = [&](const char* name, const char* expected, int64_t most, int64_t got) {
    if (got >= 0 && got < most) return;
    throw std::invalid_argument(std::string(name) + ": expected " + expected + std::to_string(most) + ", got " +
                                std::to_string(got) + " in row " + std::to_string(b));
  };
  refuse("ids", "token ids from 0 and below vocab_size=", a.vocab, a.tokens[b]);
  refuse("cache", "fewer tokens in a row than its length ", a.capacity, a.lengths[b]);
  if (a.positions) refuse("cache", "fewer tokens in a row than n_positions=", a.most_positions, a.lengths[b]);
}

}  // namespace

void decode_step(const std::vector<DecodeLayer>& layers, const DecodeStep& a, int threads) {
  const int64_t inner = a.heads * a.d;
  int64_t keys = 0, hidden = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    check(a, b);
    keys = std::max<int64_t>({keys, a.lengths[b] + 1, a.cross_lengths ? a.cross_lengths[b] : 0});
  }
  for (const DecodeLayer& layer : layers) hidden = std::max(hidden, layer.linear2.cols);

  int64_t operand = operand_bytes(a.head, a.batch), weights = a.head.rows * a.head.row_bytes();
  for (const DecodeLayer& l : layers) {
    for (const Matrix* m : {&l.qkv, &l.out, &l.cross_q, &l.cross_out, &l.linear1, &l.linear2}) {
      if (!m->data) continue;
      operand = std::max(operand, operand_bytes(*m, a.batch));
      weights += m->rows * m->row_bytes();
    }
  }
  threads = int(std::clamp<int64_t>(weights / WORTH, 1, threads));

  // Each part begins at a cache line of its own.
  const auto lines = [](int64_t n) { return (n + 15) / 16 * 16; };
  const int64_t x = lines(a.batch * a.width), heads = lines(a.batch * inner), wide = lines(a.batch * hidden);
  const int64_t sums = a.batch * MOST_ROWS, scores = lines(keys), columns = lines((operand + 3) / 4);
  const int64_t shared = x + 2 * heads + wide, own = x + 2 * sums + scores + columns;
  const auto memory = scratch<float>(shared + threads * own);
  Team::run(threads, [&](Team& team, int thread) {
    float* at = memory.get();
    const auto take = [&](int64_t n) { return std::exchange(at, at + n); };
    Step step{a, team, inner};
    step.x = take(x), step.q = take(heads), step.attended = take(heads), step.hidden = take(wide);
    at = memory.get() + shared + thread * own;
    step.normed = take(x), step.sums = take(sums), step.gates = take(sums), step.scores = take(scores);
    step.columns = reinterpret_cast<char*>(take(columns));
    step.run(layers);
  });
}

void matvec(const Matrix& m, const float* x, int64_t batch, float* y, int threads) {
  const int64_t bytes = operand_bytes(m, batch);
  const auto memory = scratch<float>(threads * batch * MOST_ROWS);
  const auto columns = scratch<char>(threads * bytes);
  Team::run(threads, [&](Team& team, int thread) {
    float* const sums = memory.get() + thread * batch * MOST_ROWS;
    const Operand operand = prepare(m, x, m.cols, batch, columns.get() + thread * bytes);
    team.phase(pieces(m.rows, m), [&](int64_t i) {
      const int64_t first = i * piece_rows(m), rows = std::min(piece_rows(m), m.rows - first);
      rows_times(m, first, first + rows, operand, sums, MOST_ROWS);
      finish(m, first, rows, batch, sums);
      for (int64_t b = 0; b < batch; ++b) std::copy_n(sums + b * MOST_ROWS, rows, y + b * m.rows + first);
    });
  });
}

}  // namespace fastlm::cpu
