// Products with bfloat16 and int8 weights on Intel's matrix unit (AMX), or its twin (tile.h), where that set is in use.
//
// A tile of 16 rows of weights, 64 bytes each, meets a tile of 16 columns of x. An element of x is three columns, so
// nothing of its float32 is lost: its bfloat16 parts, whose sum it is, or the digits of a fixed-point number of 24 bits
// with one scale for each row of x. Products of up to five rows of x cost what one costs.
#pragma once

#include "matvec.h"

namespace fastlm::cpu {

// Whether the products of m run here. False is a property of the instruction set and of m, never of x.
bool amx_takes(const Matrix& m);

// Bytes of scratch, 64-byte aligned, for `batch` rows of x; `amx_columns` makes the columns from x there.
int64_t amx_bytes(const Matrix& m, int64_t batch);
void amx_columns(const Matrix& m, const float* x, int64_t ldx, int64_t batch, char* columns);

// rows_times with those columns.
void amx_times(const Matrix& m, int64_t begin, int64_t end, const char* columns, int64_t batch, float* sums,
               int64_t ld);

}  // namespace fastlm::cpu
