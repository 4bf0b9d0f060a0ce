// mma.sync and movmatrix.
//
// Fragments (PTX ISA, "Matrix fragments for mma"): lane = 4 g + t. With e elements in a 32-bit register, register r of
// A holds row g + 8 (r & 1), columns e t + 4 e (r >> 1) and on; register r of B holds rows e t + 4 e r and on, column
// g; C and D hold row g + 8 (r >> 1), column 2 t + (r & 1). One rule for every type.
//
// The order of the hardware's sum is not specified. Here: fp32, the products in the order of k after c, each exact
// product added with one rounding. With any Chip but EXACT it is what studies of an A100 found: matrix.h.
#include <algorithm>

#include "matrix.h"
#include "register.h"

namespace ptx {

namespace {

struct Signed8 {};
struct Unsigned8 {};

template <class T>
constexpr int PER_REGISTER = 2;
template <>
constexpr int PER_REGISTER<Tf32> = 1;
template <>
constexpr int PER_REGISTER<double> = 1;
template <>
constexpr int PER_REGISTER<Signed8> = 4;
template <>
constexpr int PER_REGISTER<Unsigned8> = 4;

template <class T>
i32 element8(u32 word, int k) {
  if constexpr (std::is_same_v<T, Signed8>)
    return i8(word >> (8 * k));
  else
    return u8(word >> (8 * k));
}

// Rows of A and columns of B of which a value is undefined make their row and column of D undefined.
void taint_mma(Block& b, Warp& w, const Ins& i, u32) {
  u32 na = i.aux[1], nb = i.aux[2], nc = i.aux[3], rows = 0, columns = 0, from = 0;
  const Operand *a = i.ops + i.nd, *bb = a + na, *c = bb + nb;
  auto visit = [&](const Operand& o, auto&& f) {
    for_lanes(w.undef[o.reg], [&](int l) {
      if (w.undefined_bytes(o, l)) f(l), from = w.origin_of(o, b.pc);
    });
  };
  for (u32 r = 0; r < na; ++r) visit(a[r], [&](int l) { rows |= 1u << (l / 4 + 8 * (r & 1)); });
  for (u32 r = 0; r < nb; ++r) visit(bb[r], [&](int l) { columns |= 1u << (l / 4); });
  u32 own[8] = {};
  for (u32 r = 0; r < nc; ++r) visit(c[r], [&](int l) { own[r] |= 1u << l; });
  bool half = i.aux[4];
  for (u32 r = 0; r < i.nd; ++r) {
    for (int l = 0; l < LANES; ++l) {
      u32 row = l / 4 + 8 * (half ? r : r >> 1), column = 2 * (l % 4) + (r & 1);
      bool bad = rows >> row & 1 || own[r] >> l & 1 || (half ? columns >> (2 * (l % 4)) & 3 : columns >> column & 1);
      w.set_undefined(i.ops[r], l, bad ? 0xff : 0, from);
    }
  }
}

void taint(Block& b, Warp& w, const Ins& i) {
  u32 any = 0;
  for (u32 k = 0; k < i.ns; ++k) any |= w.undef[i.ops[i.nd + k].reg];
  if (any) return taint_mma(b, w, i, ALL);
  for (u32 k = 0; k < i.nd; ++k) w.undef[i.ops[k].reg] = 0;
}

// aux[0]: rows (16 or 8), aux[1..3]: registers of A, B, C; aux[4]: C and D are packed f16
template <class T>
void mma_float(Block& b, Warp& w, const Ins& i, u32) {
  constexpr int E = PER_REGISTER<T>;
  const u32 na = i.aux[1], nb = i.aux[2];
  const int rows = int(i.aux[0]), depth = 4 * E * int(nb);
  const Operand *a = i.ops + i.nd, *bb = a + na, *c = bb + nb;
  alignas(64) float A[16][16], B[16][8], D[16][8];
  for (u32 r = 0; r < na; ++r) {
    const u32* words = w.at(a[r]);
    for (int l = 0; l < LANES; ++l) {
      for (int k = 0; k < E; ++k) A[l / 4 + 8 * (r & 1)][E * (l % 4) + 4 * E * (r >> 1) + k] = element<T>(words[l], k);
    }
  }
  for (u32 r = 0; r < nb; ++r) {
    const u32* words = w.at(bb[r]);
    for (int l = 0; l < LANES; ++l) {
      for (int k = 0; k < E; ++k) B[E * (l % 4) + 4 * E * r + k][l / 4] = element<T>(words[l], k);
    }
  }
  const bool half = i.aux[4];
  for (u32 r = 0; r < i.aux[3]; ++r) {
    const u32* words = w.at(c[r]);
    for (int l = 0; l < LANES; ++l) {
      if (half) {
        for (int k = 0; k < 2; ++k) D[l / 4 + 8 * r][2 * (l % 4) + k] = to_float<F16>(u16(words[l] >> (16 * k)));
      } else {
        D[l / 4 + 8 * (r >> 1)][2 * (l % 4) + (r & 1)] = std::bit_cast<float>(words[l]);
      }
    }
  }
  taint(b, w, i);
  if (b.launch.chip == Chip::EXACT) {
    for (int m = 0; m < rows; ++m) {
      for (int k = 0; k < depth; ++k) {
        for (int n = 0; n < 8; ++n) D[m][n] = std::fma(A[m][k], B[k][n], D[m][n]);
      }
    }
  } else {
    constexpr int AT_ONCE = 4 * E;  // pairs
    for (int m = 0; m < rows; ++m) {
      for (int n = 0; n < 8; ++n) {
        for (int k = 0; k < depth; k += AT_ONCE) D[m][n] = truncated<AMPERE>(A[m] + k, B[k] + n, 8, AT_ONCE, D[m][n]);
      }
    }
  }
  for (u32 r = 0; r < i.nd; ++r) {
    u32* words = w.at(i.ops[r]);
    for (int l = 0; l < LANES; ++l) {
      if (half) {
        const float* d = &D[l / 4 + 8 * r][2 * (l % 4)];
        words[l] = round_half<F16>(d[0]) | u32(round_half<F16>(d[1])) << 16;
      } else {
        words[l] = std::bit_cast<u32>(canonical(D[l / 4 + 8 * (r >> 1)][2 * (l % 4) + (r & 1)]));
      }
    }
  }
}

// imm: 1 saturates
template <class TA, class TB>
void mma_int(Block& b, Warp& w, const Ins& i, u32) {
  const u32 na = i.aux[1], nb = i.aux[2];
  const int rows = int(i.aux[0]), depth = 16 * int(nb);
  const Operand *a = i.ops + i.nd, *bb = a + na, *c = bb + nb;
  i32 A[16][32], B[32][8];
  i64 D[16][8];
  for (u32 r = 0; r < na; ++r) {
    for (int l = 0; l < LANES; ++l) {
      for (int k = 0; k < 4; ++k)
        A[l / 4 + 8 * (r & 1)][4 * (l % 4) + 16 * (r >> 1) + k] = element8<TA>(w.at(a[r])[l], k);
    }
  }
  for (u32 r = 0; r < nb; ++r) {
    for (int l = 0; l < LANES; ++l) {
      for (int k = 0; k < 4; ++k) B[4 * (l % 4) + 16 * r + k][l / 4] = element8<TB>(w.at(bb[r])[l], k);
    }
  }
  for (u32 r = 0; r < i.aux[3]; ++r) {
    for (int l = 0; l < LANES; ++l) D[l / 4 + 8 * (r >> 1)][2 * (l % 4) + (r & 1)] = i32(w.at(c[r])[l]);
  }
  taint(b, w, i);
  for (int m = 0; m < rows; ++m) {
    for (int k = 0; k < depth; ++k) {
      for (int n = 0; n < 8; ++n) D[m][n] += A[m][k] * B[k][n];
    }
  }
  for (u32 r = 0; r < i.nd; ++r) {
    for (int l = 0; l < LANES; ++l) {
      i64 d = D[l / 4 + 8 * (r >> 1)][2 * (l % 4) + (r & 1)];
      w.at(i.ops[r])[l] = u32(i.imm ? std::clamp<i64>(d, INT32_MIN, INT32_MAX) : d);
    }
  }
}

// m8n8k4, one register of A and of B, two of C
void mma_double(Block& b, Warp& w, const Ins& i, u32) {
  const Operand *a = i.ops + i.nd, *bb = a + 1, *c = bb + 1;
  double A[8][4], B[4][8], D[8][8];
  for (int l = 0; l < LANES; ++l) {
    A[l / 4][l % 4] = get<double>(w.at(a[0]), l);
    B[l % 4][l / 4] = get<double>(w.at(bb[0]), l);
    for (int r = 0; r < 2; ++r) D[l / 4][2 * (l % 4) + r] = get<double>(w.at(c[r]), l);
  }
  taint(b, w, i);
  for (int m = 0; m < 8; ++m) {
    for (int k = 0; k < 4; ++k) {
      for (int n = 0; n < 8; ++n) D[m][n] = std::fma(A[m][k], B[k][n], D[m][n]);
    }
  }
  for (int l = 0; l < LANES; ++l) {
    for (int r = 0; r < 2; ++r) put<double>(w.at(i.ops[r]), l, D[l / 4][2 * (l % 4) + r]);
  }
}

// The transpose of an 8x8 matrix of 16 bits.
void movmatrix(Block& b, Warp& w, const Ins& i, u32) {
  const Operand &s = i.ops[1], &d = i.ops[0];
  u16 tile[8][8];
  u8 unset[8][8];
  for (int l = 0; l < LANES; ++l) {
    u8 u = w.undefined_bytes(s, l);
    for (int k = 0; k < 2; ++k) {
      tile[2 * (l % 4) + k][l / 4] = u16(w.at(s)[l] >> (16 * k));
      unset[2 * (l % 4) + k][l / 4] = u >> (2 * k) & 3;
    }
  }
  u32 from = w.origin_of(s, b.pc);
  for (int l = 0; l < LANES; ++l) {
    int row = l / 4, col = 2 * (l % 4);
    w.at(d)[l] = tile[row][col] | u32(tile[row][col + 1]) << 16;
    w.set_undefined(d, l, u8(unset[row][col] | unset[row][col + 1] << 2), from);
  }
}

}  // namespace

void register_matrix() {
  add("mma.bf16", mma_float<BF16>, Kind::CONVERGE);
  add("mma.f16", mma_float<F16>, Kind::CONVERGE);
  add("mma.tf32", mma_float<Tf32>, Kind::CONVERGE);
  add("mma.s8.s8", mma_int<Signed8, Signed8>, Kind::CONVERGE);
  add("mma.s8.u8", mma_int<Signed8, Unsigned8>, Kind::CONVERGE);
  add("mma.u8.s8", mma_int<Unsigned8, Signed8>, Kind::CONVERGE);
  add("mma.u8.u8", mma_int<Unsigned8, Unsigned8>, Kind::CONVERGE);
  add("mma.f64", mma_double, Kind::CONVERGE);
  add("movmatrix", movmatrix, Kind::CONVERGE);
}

}  // namespace ptx
