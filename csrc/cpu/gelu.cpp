// gelu: y = gelu(x + bias) * gate, forward and backward. The maths: fastlm/ops/gelu.py.
//
// Every input is read once and every output written once. A row goes through in pieces; where there is no bias, a piece
// of zeros takes its place, and where no dbias is wanted it goes to a piece that nobody reads.
#include "gelu.h"

#include "math.h"
#include "parallel.h"
#include "partials.h"

namespace fastlm::cpu {
namespace {

constexpr int64_t kPiece = 1024;  // 4 KB of float stay in the first-level cache
constexpr float kSqrtHalf = 0.707106781f, kInvSqrt2Pi = 0.398942280f;
constexpr float kSqrt2OverPi = 0.797884561f, kCubic = 0.044715f;

// gelu(h) = h cdf, and its derivative.
struct Gelu {
  float cdf, slope;
};

struct Erf {
  FASTLM_INLINE Gelu at(float h) {
    const float cdf = 0.5f + 0.5f * fast_erf(h * kSqrtHalf);
    return {cdf, cdf + h * kInvSqrt2Pi * fast_exp(-0.5f * h * h)};
  }
};

// (1 + tanh(u))/2 = 1/(1 + exp(-2u)), and (1 - tanh(u)²)/4 = e/(1 + e)² with e = exp(-2|u|): neither cancels, where
// 1 - tanh(u)² would, times an h that is large there.
struct Tanh {
  FASTLM_INLINE Gelu at(float h) {
    const float u = kSqrt2OverPi * (h + kCubic * h * h * h);
    const float e = fast_exp(-2.0f * std::fabs(u)), r = 1.0f / (1.0f + e);
    const float cdf = u < 0.0f ? e * r : r;
    return {cdf, cdf + h * 2.0f * kSqrt2OverPi * (e * r * r) * (1.0f + 3.0f * kCubic * h * h)};
  }
};

alignas(64) const float kNoBias[kPiece] = {};

template <class T, class Form>
FASTLM_CLONES void forward_rows(const GeluForward& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < a.cols; c += kPiece) {
      const int64_t n = std::min(kPiece, a.cols - c);
      const T* x = static_cast<const T*>(a.x) + r * a.stride_x + c;
      const float* bias = a.bias ? a.bias + c : kNoBias;
      T* y = static_cast<T*>(a.y) + r * a.cols + c;
      if (a.gate) {
        const T* gate = static_cast<const T*>(a.gate) + r * a.stride_gate + c;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const float h = load(x + j) + bias[j];
          store(y + j, h * Form::at(h).cdf * load(gate + j));
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const float h = load(x + j) + bias[j];
          store(y + j, h * Form::at(h).cdf);
        }
      }
    }
  }
}

// One block of rows; `partial` is its own (cols,) sum of dx, set here, or null.
template <class T, class Form>
FASTLM_CLONES void backward_rows(const GeluBackward& a, int64_t begin, int64_t end, float* partial) {
  alignas(64) float unread[kPiece] = {};
  if (partial) std::fill(partial, partial + a.cols, 0.0f);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < a.cols; c += kPiece) {
      const int64_t n = std::min(kPiece, a.cols - c);
      const T* dy = static_cast<const T*>(a.dy) + r * a.stride_dy + c;
      const T* x = static_cast<const T*>(a.x) + r * a.stride_x + c;
      const float* bias = a.bias ? a.bias + c : kNoBias;
      T* dx = static_cast<T*>(a.dx) + r * a.cols + c;
      float* dbias = partial ? partial + c : unread;
      if (a.gate) {
        const T* gate = static_cast<const T*>(a.gate) + r * a.stride_gate + c;
        T* dgate = static_cast<T*>(a.dgate) + r * a.cols + c;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const float h = load(x + j) + bias[j], d = load(dy + j);
          const Gelu g = Form::at(h);
          const float dh = d * g.slope * load(gate + j);
          store(dgate + j, d * h * g.cdf);
          store(dx + j, dh);
          dbias[j] += dh;
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const float dh = load(dy + j) * Form::at(load(x + j) + bias[j]).slope;
          store(dx + j, dh);
          dbias[j] += dh;
        }
      }
    }
  }
}

template <class T, class Form>
void forward(const GeluForward& a, int threads) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, a.cols));
  parallel_for(a.rows, grain, threads, [&](int64_t begin, int64_t end) { forward_rows<T, Form>(a, begin, end); });
}

template <class T, class Form>
void backward(const GeluBackward& a, int threads) {
  const int64_t blocks = row_blocks(a.rows);
  parallel_for(blocks, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* partial = a.dbias ? a.partial + b * a.cols : nullptr;
      backward_rows<T, Form>(a, a.rows * b / blocks, a.rows * (b + 1) / blocks, partial);
    }
  });
  if (a.dbias) sum_partials(a.partial, blocks, a.cols, a.dbias);
}

}  // namespace

void gelu_fwd(const GeluForward& args, DType dtype, int threads) {
  if (args.tanh) {
    dtype == DType::f32 ? forward<float, Tanh>(args, threads) : forward<bfloat16, Tanh>(args, threads);
  } else {
    dtype == DType::f32 ? forward<float, Erf>(args, threads) : forward<bfloat16, Erf>(args, threads);
  }
}

void gelu_bwd(const GeluBackward& args, DType dtype, int threads) {
  if (args.tanh) {
    dtype == DType::f32 ? backward<float, Tanh>(args, threads) : backward<bfloat16, Tanh>(args, threads);
  } else {
    dtype == DType::f32 ? backward<float, Erf>(args, threads) : backward<bfloat16, Erf>(args, threads);
  }
}

}  // namespace fastlm::cpu
