// Products of a weight matrix with a few rows of x, as a step of decoding has them: bound by reading the weights.
#pragma once

#include <cstdint>

namespace fastlm::cpu {

// How the weights are stored. Sums are float32 in every form.
//   f32   (rows, cols)
//   bf16  (rows, cols / 2) words of 32 bits: the low half is column c, the high half column c + cols / 2
//   i8    (rows, cols / 4) words of 32 bits: byte p, from the low one, is column c + p cols / 4, an integer; row r
//   stands
//         for scale[r] times its integers
// So the columns of a vector of words unpack with a shift and a mask, and each part meets neighbouring elements of x.
// cols is a multiple of 2, of 4.
enum class WeightForm : int { f32 = 0, bf16 = 1, i8 = 2 };

struct Matrix {
  const void* data;
  const float* scale;  // (rows,) of i8, else null
  const float* bias;   // (rows,) or null
  int64_t rows, cols;
  WeightForm form;

  int64_t row_bytes() const { return cols * (form == WeightForm::f32 ? 4 : form == WeightForm::bf16 ? 2 : 1); }
};

// Rows of x (batch, ld), as the products with one matrix read them: in place, or as the columns of amx.h in `columns`.
struct Operand {
  const float* x;
  int64_t ld, batch;
  const char* columns;  // or null
};

// Bytes of scratch, 64-byte aligned, that `prepare` needs for `batch` rows of x and this matrix.
int64_t operand_bytes(const Matrix& m, int64_t batch);
Operand prepare(const Matrix& m, const float* x, int64_t ld, int64_t batch, char* memory);

// sums (batch, ld) = x times rows [begin, end) of the matrix, before its scale and bias; the first column of sums
// belongs to row `begin`. Every weight is read from memory once. A sum does not depend on the range, nor on the other
// rows of x. Runs on the calling thread.
void rows_times(const Matrix& m, int64_t begin, int64_t end, const Operand& x, float* sums, int64_t ld);

// y (batch, rows) = x (batch, cols) mᵀ with scale and bias, on `threads` threads.
void matvec(const Matrix& m, const float* x, int64_t batch, float* y, int threads);

// Reads `bytes` bytes on `threads` threads: the ceiling that a benchmark holds a step against. Returns their sum as
// 32-bit integers, modulo 2^32.
int64_t read_memory(const void* data, int64_t bytes, int threads);

}  // namespace fastlm::cpu
