// Intel's matrix unit (AMX): eight tiles of at most 16 rows of 64 bytes. `AmxTiles` holds the only AMX instructions of
// the project; `TwinTiles` does the same in plain C++, so that code written for one of them executes on every CPU.
//
// GCC's own intrinsics are macros that want a tile's number as a literal, and do not say that a load reads memory. The
// statements below take it from a template argument, and say so.
#pragma once

#include <algorithm>
#include <cstring>

#include "isa.h"

namespace fastlm::cpu {

constexpr int64_t TILE_SIDE = 16;                      // rows and 32-bit words of a row
constexpr int64_t TILE_WORDS = TILE_SIDE * TILE_SIDE;  // 1 KB

// The memory image that configures the tiles; every tile has 16 rows of 64 bytes unless changed.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// For a tile C of float, A and B: c[i][j] += Σ_k a[i][2k] b[k][2j] + a[i][2k + 1] b[k][2j + 1], bfloat16 elements.
// The sums over even and odd elements are separate, from 0; then their sum is added to c. Every operation rounds to the
// nearest even; denormals count, and come out, as 0.
struct TwinTiles {
  static void configure(const TileConfig& config) { state() = State{config, {}}; }
  static void release() {}

  template <int T>
  static void zero() {
    std::memset(state().tile[T], 0, sizeof state().tile[T]);
  }

  template <int T>
  static void load(const void* from, int64_t stride) {
    zero<T>();
    for (int r = 0; r < state().config.rows[T]; ++r) {
      std::memcpy(state().tile[T][r], static_cast<const char*>(from) + r * stride, state().config.bytes[T]);
    }
  }
  template <int T>
  static void load_once(const void* from, int64_t stride) {
    load<T>(from, stride);
  }

  template <int T>
  static void store(void* to, int64_t stride) {
    for (int r = 0; r < state().config.rows[T]; ++r) {
      std::memcpy(static_cast<char*>(to) + r * stride, state().tile[T][r], state().config.bytes[T]);
    }
  }

  template <int C, int A, int B>
  static void dot_bf16() {
    State& s = state();
    for (int i = 0; i < s.config.rows[C]; ++i) {
      for (int j = 0; j < s.config.bytes[C] / 4; ++j) {
        float even = 0.0f, odd = 0.0f;
        for (int k = 0; k < s.config.bytes[A] / 4; ++k) {
          const uint32_t a = s.tile[A][i][k], b = s.tile[B][k][j];
          even = add_product(even, bits_to_float(a << 16), bits_to_float(b << 16));
          odd = add_product(odd, bits_to_float(a & 0xFFFF0000u), bits_to_float(b & 0xFFFF0000u));
        }
        s.tile[C][i][j] = float_to_bits(flush(flush(bits_to_float(s.tile[C][i][j])) + flush(even + odd)));
      }
    }
  }

  // The same of signed bytes, four to a word, in 32-bit integers.
  template <int C, int A, int B>
  static void dot_i8() {
    State& s = state();
    for (int i = 0; i < s.config.rows[C]; ++i) {
      for (int j = 0; j < s.config.bytes[C] / 4; ++j) {
        for (int k = 0; k < s.config.bytes[A] / 4; ++k) {
          for (int e = 0; e < 32; e += 8) {
            const int32_t product = int8_t(s.tile[A][i][k] >> e) * int8_t(s.tile[B][k][j] >> e);
            s.tile[C][i][j] += uint32_t(product);
          }
        }
      }
    }
  }

 private:
  struct State {
    TileConfig config;
    uint32_t tile[8][TILE_SIDE][TILE_SIDE];
  };
  static State& state() {
    static thread_local State state{};
    return state;
  }
  // A product of two bfloat16 is exact in double, and its sum with a float in all digits that its rounding looks at.
  static float add_product(float sum, float x, float y) {
    return flush(float(double(sum) + double(flush(x)) * double(flush(y))));
  }
  static float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
};

#ifdef FASTLM_HAS_UNITS
struct AmxTiles {
  FASTLM_INLINE void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
  FASTLM_INLINE void release() { asm volatile("tilerelease"); }

  template <int T>
  FASTLM_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }

  template <int T>
  FASTLM_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
  }
  // Of memory that is not read again soon.
  template <int T>
  FASTLM_INLINE void load_once(const void* from, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
  }

  template <int T>
  FASTLM_INLINE void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
  }

  template <int C, int A, int B>
  FASTLM_INLINE void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B>
  FASTLM_INLINE void dot_i8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};
#endif

}  // namespace fastlm::cpu
