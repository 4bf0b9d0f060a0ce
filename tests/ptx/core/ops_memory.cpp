// Loads, stores, atomics, cp.async, ldmatrix and stmatrix.
//
// Of loads, stores and atomics: aux[0] is the Memory space, aux[1] the bytes of an element, aux[2] the AccessFlags,
// aux[3] the number of elements; the first source is the address, `imm` is added to it.
#include <algorithm>

#include "float.h"
#include "memory.h"
#include "register.h"

namespace ptx {

namespace {

// Wavefronts that a shared-memory access needs beyond the least: words of one bank take a cycle each.
void count_conflicts(Block& b, const u64* addresses, u32 mask, u32 bytes) {
  if (b.conflicts.empty()) return;
  u32 group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;  // lanes that are served together
  for (u32 from = 0; from < LANES; from += group) {
    std::array<std::array<u32, LANES>, 32> words;
    std::array<u32, 32> n{};
    u32 worst = 0;
    for (u32 lane = from; lane < from + group; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (u32 word = u32(addresses[lane] / 4); word <= (addresses[lane] + bytes - 1) / 4; ++word) {
        auto& bank = words[word % 32];
        u32& count = n[word % 32];
        if (std::find(bank.begin(), bank.begin() + count, word) == bank.begin() + count) bank[count++] = word;
        worst = std::max(worst, count);
      }
    }
    if (worst > 1) b.conflicts[b.pc] += worst - 1;
  }
}

bool is_shared(u32 space, u64 address) {
  return space == SHARED || space == CLUSTER ||
         (space == GENERIC && address / WINDOW_BYTES == SHARED_WINDOW / WINDOW_BYTES);
}

void load(Block& b, Warp& w, const Ins& i, u32 mask) {
  const Operand& address = i.ops[i.nd];
  u32 size = i.aux[1], n = i.aux[3], bytes = size * n;
  if (b.undefined(w, address, mask, "an address")) return;
  u64 addresses[LANES];
  for_lanes(mask, [&](int lane) {
    u64 a = addresses[lane] = address_of(w, address, lane) + i.imm;
    u8 value[32];
    u32 undefined = 0;
    Access{b, w, i, lane, i.aux[0], a, bytes, i.aux[2]}.load(value, undefined, bytes);
    for (u32 k = 0; k < n; ++k) {
      const Operand& d = i.ops[k];
      u64 v = 0;
      memcpy(&v, value + k * size, size);
      if (i.aux[2] & SIGNED) v = u64(i64(v << (64 - 8 * size)) >> (64 - 8 * size));
      if (d.width == 8)
        put<u64>(w.at(d), lane, v);
      else
        put<u32>(w.at(d), lane, u32(v));
      u32 unset = undefined >> (k * size) & ((1u << size) - 1);
      if (i.aux[2] & SIGNED && unset >> (size - 1)) unset |= 0xffu << size;
      if (unset || w.undef[d.reg] >> lane & 1) w.set_undefined(d, lane, u8(unset), b.pc + 1);
    }
  });
  if (mask && is_shared(i.aux[0], addresses[std::countr_zero(mask)])) count_conflicts(b, addresses, mask, bytes);
}

void store(Block& b, Warp& w, const Ins& i, u32 mask) {
  const Operand& address = i.ops[0];
  u32 size = i.aux[1], n = i.aux[3], bytes = size * n;
  if (b.undefined(w, address, mask, "an address")) return;
  u64 addresses[LANES];
  for_lanes(mask, [&](int lane) {
    u64 a = addresses[lane] = address_of(w, address, lane) + i.imm;
    u8 value[32];
    u32 undefined = 0;
    for (u32 k = 0; k < n; ++k) {
      const Operand& s = i.ops[1 + k];
      u64 v = s.width == 8 ? get<u64>(w.at(s), lane) : get<u32>(w.at(s), lane);
      memcpy(value + k * size, &v, size);
      undefined |= u32(w.undefined_bytes(s, lane) & ((1u << size) - 1)) << (k * size);
    }
    // Local and shared memory may carry undefined values on, as registers may; a buffer is what the caller gets.
    bool leaves = i.aux[0] == GLOBAL || (i.aux[0] == GENERIC && (a < SHARED_WINDOW || a >= PARAM_WINDOW));
    if (undefined && leaves) {
      for (u32 k = 0; k < n; ++k) b.undefined(w, i.ops[1 + k], 1u << lane, "the value of a store to global memory");
    }
    Access{b, w, i, lane, i.aux[0], a, bytes, i.aux[2]}.store(value, leaves ? 0 : undefined, bytes);
  });
  if (mask && is_shared(i.aux[0], addresses[std::countr_zero(mask)])) count_conflicts(b, addresses, mask, bytes);
}

// ---- atomics ---------------------------------------------------------------------------------------------------

struct Exchange {
  template <class T>
  static T f(T, T b, T) {
    return b;
  }
};
struct CompareExchange {
  template <class T>
  static T f(T old, T b, T c) {
    return old == b ? c : old;
  }
};
struct AtomicAdd {
  template <class T>
  static T f(T old, T b, T) {
    return T(old + b);
  }
};
struct AtomicMin {
  template <class T>
  static T f(T old, T b, T) {
    return std::min(old, b);
  }
};
struct AtomicMax {
  template <class T>
  static T f(T old, T b, T) {
    return std::max(old, b);
  }
};
struct AtomicInc {
  template <class T>
  static T f(T old, T b, T) {
    return old >= b ? 0 : old + 1;
  }
};
struct AtomicDec {
  template <class T>
  static T f(T old, T b, T) {
    return old == 0 || old > b ? b : old - 1;
  }
};
struct AtomicAnd {
  template <class T>
  static T f(T old, T b, T) {
    return old & b;
  }
};
struct AtomicOr {
  template <class T>
  static T f(T old, T b, T) {
    return old | b;
  }
};
struct AtomicXor {
  template <class T>
  static T f(T old, T b, T) {
    return old ^ b;
  }
};
template <class H>
struct AtomicAddHalf {
  template <class T>
  static T f(T old, T b, T) {
    T sum = 0;
    for (u32 shift = 0; shift < 8 * sizeof(T); shift += 16) {
      sum |= T(T(half_add<H>(u16(old >> shift), u16(b >> shift))) << shift);
    }
    return sum;
  }
};

template <class F, class T>
void atomic(Block& b, Warp& w, const Ins& i, u32 mask) {
  const Operand* s = i.ops + i.nd;
  for (u32 k = 0; k < i.ns; ++k) {
    if (b.undefined(w, s[k], mask, k ? "the value of an atomic" : "an address")) return;
  }
  const u32 swap = std::is_same_v<F, CompareExchange> ? u32(SWAP) : 0;
  for_lanes(mask, [&](int lane) {
    u64 a = address_of(w, s[0], lane) + i.imm;
    u8 bytes[sizeof(T)];
    u32 undefined = 0;
    Access access{b, w, i, lane, i.aux[0], a, sizeof(T), i.aux[2] | VOLATILE | swap};
    if (!access.load(bytes, undefined, sizeof(T))) return;
    T old = std::bit_cast<T>(bytes);
    T value = F::template f<T>(old, get<T>(w.at(s[1]), lane), i.ns > 2 ? get<T>(w.at(s[2]), lane) : T{});
    memcpy(bytes, &value, sizeof(T));
    access.store(bytes, 0, sizeof(T));
    if (!(i.aux[2] & (ACQUIRE | RELEASE))) access.acquire_release(is_shared(i.aux[0], a) ? SHARED_WINDOW + a : a);
    if (i.nd) {
      put<T>(w.at(i.ops[0]), lane, old);
      w.set_undefined(i.ops[0], lane, u8(undefined), b.pc + 1);
    }
  });
}

// ---- cp.async --------------------------------------------------------------------------------------------------

// Sources: shared address, global address (imm added), [bytes to read, the rest is zero]. aux[1]: bytes to write;
// aux[4]: offset of the shared address.
void copy_async(Block& b, Warp& w, const Ins& i, u32 mask) {
  for (u32 k = 0; k < i.ns; ++k) {
    if (b.undefined(w, i.ops[k], mask, k == 2 ? "the size of a copy" : "an address")) return;
  }
  for_lanes(mask, [&](int lane) {
    const u32 to = b.place_of(w, lane, address_of(w, i.ops[0], lane) + u64(i64(i32(i.aux[4]))), false);
    if (to == NOWHERE) return;
    u64 from = address_of(w, i.ops[1], lane) + i.imm;
    u32 bytes = i.aux[1], source = i.ns > 2 ? std::min(bytes, get<u32>(w.at(i.ops[2]), lane)) : bytes;
    Range range;
    Access write{b, w, i, lane, PLACE, to, bytes};
    if (!write.locate(range, true, bytes)) return;
    if (source) {
      Range read;
      Access access{b, w, i, lane, GLOBAL, from, source};
      if (!access.locate(read, false, 1)) return;
      if (from % bytes) {
        b.find("alignment", w, lane, "reads " + access.where() + ": not aligned to " + std::to_string(bytes));
        return;
      }
    }
    if (range.shadow) write.check_write(range, nullptr, 0);
    memset(range.state, PENDING, bytes);
    w.copies.push_back({u32(lane), w.group[lane], to, from, bytes, source, b.pc});
  });
}

void commit_group(Block&, Warp& w, const Ins&, u32 mask) {
  for_lanes(mask, [&](int lane) { ++w.group[lane]; });
}

// imm: groups that may stay pending; aux[0]: wait for copies in no group too.
void wait_group(Block& b, Warp& w, const Ins& i, u32 mask) { complete_copies(b, w, mask, u32(i.imm), i.aux[0]); }

// ---- matrices --------------------------------------------------------------------------------------------------

// 8x8 tiles of 16 bits; lane r of every eight gives the address of row r. aux[1]: tiles, aux[2]: transposed.
void load_matrix(Block& b, Warp& w, const Ins& i, u32) {
  u32 tiles = i.aux[1];
  const Operand& address = i.ops[i.nd];
  u32 rows = tiles == 4 ? ALL : (1u << 8 * tiles) - 1;
  if (b.undefined(w, address, rows, "an address")) return;
  u16 tile[4][8][8] = {};
  bool unset[4][8][8] = {};
  u64 addresses[LANES];
  u32 any = 0;
  for (u32 lane = 0; lane < 8 * tiles; ++lane) {
    u8 row[16];
    u32 undefined = 0;
    addresses[lane] = address_of(w, address, lane) + i.imm;
    Access{b, w, i, int(lane), i.aux[0], addresses[lane], 16}.load(row, undefined, 16);
    memcpy(tile[lane / 8][lane % 8], row, 16);
    any |= undefined;
    for (u32 k = 0; k < 8; ++k) unset[lane / 8][lane % 8][k] = undefined >> (2 * k) & 3;
  }
  count_conflicts(b, addresses, rows, 16);
  for (u32 t = 0; t < tiles; ++t) {
    const Operand& d = i.ops[t];
    for (int lane = 0; lane < LANES; ++lane) {
      int row = lane / 4, col = lane % 4 * 2;
      u16 low = i.aux[2] ? tile[t][col][row] : tile[t][row][col];
      u16 high = i.aux[2] ? tile[t][col + 1][row] : tile[t][row][col + 1];
      put<u32>(w.at(d), lane, low | u32(high) << 16);
      if (any) {
        bool l = i.aux[2] ? unset[t][col][row] : unset[t][row][col];
        bool h = i.aux[2] ? unset[t][col + 1][row] : unset[t][row][col + 1];
        w.set_undefined(d, lane, u8(l * 3 | h * 12), b.pc + 1);
      }
    }
    if (!any) w.undef[d.reg] = 0;
  }
}

void store_matrix(Block& b, Warp& w, const Ins& i, u32) {
  u32 tiles = i.aux[1];
  u32 rows = tiles == 4 ? ALL : (1u << 8 * tiles) - 1;
  if (b.undefined(w, i.ops[0], rows, "an address")) return;
  u64 addresses[LANES];
  for (u32 lane = 0; lane < 8 * tiles; ++lane) {
    u16 row[8];
    u32 undefined = 0;
    for (int col = 0; col < 8; ++col) {
      const Operand& s = i.ops[1 + lane / 8];
      int r = lane % 8, holder = i.aux[2] ? col * 4 + r / 2 : r * 4 + col / 2, half = i.aux[2] ? r % 2 : col % 2;
      row[col] = u16(get<u32>(w.at(s), holder) >> (16 * half));
      undefined |= u32(w.undefined_bytes(s, holder) >> (2 * half) & 3) << (2 * col);
    }
    addresses[lane] = address_of(w, i.ops[0], lane) + i.imm;
    Access{b, w, i, int(lane), i.aux[0], addresses[lane], 16}.store(reinterpret_cast<u8*>(row), undefined, 16);
  }
  count_conflicts(b, addresses, rows, 16);
}

// ---- addresses and fences --------------------------------------------------------------------------------------

template <u64 WINDOW>
struct ToGeneric {
  static u64 f(u64 a) { return a + WINDOW; }
};
template <u64 WINDOW>
struct FromGeneric {
  static u64 f(u64 a) { return a - WINDOW; }
};
template <u64 WINDOW>
struct ToGeneric32 {
  static u64 f(u32 a) { return a + WINDOW; }
};

// imm: first address of the window; aux[0]: 1 for global, which is what lies in no window.
void is_space(Block&, Warp& w, const Ins& i, u32 mask) {
  u32 result = 0;
  for_lanes(mask, [&](int lane) {
    u64 a = address_of(w, i.ops[1], lane);
    bool window = a >= SHARED_WINDOW && a < PARAM_WINDOW + WINDOW_BYTES;
    bool in = i.aux[0] ? !window : a >= u64(i.imm) && a < u64(i.imm) + WINDOW_BYTES;
    result |= u32(in) << lane;
  });
  u32* d = w.at(i.ops[0]);
  *d = (*d & ~mask) | result;
}

// Memory is sequentially consistent here, so a fence only marks what a later strong write or relaxed arrival publishes.
void fence(Block& b, Warp& w, const Ins&, u32 mask) {
  if (!mask) return;
  b.fence_time = b.tick();
  for (auto [other, time] : b.read_before_fence) b.known[other] = std::max(b.known[other], time);
  b.read_before_fence.clear();
  w.fenced = w.known;
  w.fenced[w.id] = (mask & w.alive) == w.alive ? b.fence_time : w.lanes_known;
}

void nothing(Block&, Warp&, const Ins&, u32) {}

template <class T>
void atomics_of(const char* type) {
  std::string t = std::string(".") + type;
  add("atom.add" + t, atomic<AtomicAdd, T>, Kind::MEMORY);
  add("atom.min" + t, atomic<AtomicMin, T>, Kind::MEMORY);
  add("atom.max" + t, atomic<AtomicMax, T>, Kind::MEMORY);
}

template <class T>
void bit_atomics_of(const char* type) {
  std::string t = std::string(".") + type;
  add("atom.and" + t, atomic<AtomicAnd, T>, Kind::MEMORY);
  add("atom.or" + t, atomic<AtomicOr, T>, Kind::MEMORY);
  add("atom.xor" + t, atomic<AtomicXor, T>, Kind::MEMORY);
  add("atom.exch" + t, atomic<Exchange, T>, Kind::MEMORY);
  add("atom.cas" + t, atomic<CompareExchange, T>, Kind::MEMORY);
}

}  // namespace

void register_memory() {
  add("ld", load, Kind::MEMORY);
  add("st", store, Kind::MEMORY);
  atomics_of<u32>("u32");
  atomics_of<i32>("s32");
  atomics_of<u64>("u64");
  atomics_of<i64>("s64");
  bit_atomics_of<u32>("b32");
  bit_atomics_of<u64>("b64");
  add("atom.cas.b16", atomic<CompareExchange, u16>, Kind::MEMORY);
  add("atom.exch.b16", atomic<Exchange, u16>, Kind::MEMORY);
  add("atom.inc.u32", atomic<AtomicInc, u32>, Kind::MEMORY);
  add("atom.dec.u32", atomic<AtomicDec, u32>, Kind::MEMORY);
  add("atom.add.f32", atomic<AtomicAdd, float>, Kind::MEMORY);
  add("atom.add.f64", atomic<AtomicAdd, double>, Kind::MEMORY);
  add("atom.add.f16", atomic<AtomicAddHalf<F16>, u16>, Kind::MEMORY);
  add("atom.add.bf16", atomic<AtomicAddHalf<BF16>, u16>, Kind::MEMORY);
  add("atom.add.f16x2", atomic<AtomicAddHalf<F16>, u32>, Kind::MEMORY);
  add("atom.add.bf16x2", atomic<AtomicAddHalf<BF16>, u32>, Kind::MEMORY);
  add("cp.async", copy_async, Kind::MEMORY);
  add("cp.async.commit_group", commit_group);
  add("cp.async.wait_group", wait_group);
  add("ldmatrix", load_matrix, Kind::CONVERGE);
  add("stmatrix", store_matrix, Kind::CONVERGE);
  add("cvta.shared.u64", lanes<ToGeneric<SHARED_WINDOW>, u64, u64>);
  add("cvta.local.u64", lanes<ToGeneric<LOCAL_WINDOW>, u64, u64>);
  add("cvta.param.u64", lanes<ToGeneric<PARAM_WINDOW>, u64, u64>);
  add("cvta.global.u64", lanes<ToGeneric<0>, u64, u64>);
  add("cvta.const.u64", lanes<ToGeneric<0>, u64, u64>);
  add("cvta.to.shared.u64", lanes<FromGeneric<SHARED_WINDOW>, u64, u64>);
  add("cvta.to.local.u64", lanes<FromGeneric<LOCAL_WINDOW>, u64, u64>);
  add("cvta.to.param.u64", lanes<FromGeneric<PARAM_WINDOW>, u64, u64>);
  add("cvta.to.global.u64", lanes<FromGeneric<0>, u64, u64>);
  add("cvta.to.const.u64", lanes<FromGeneric<0>, u64, u64>);
  add("isspacep", is_space);
  add("fence", fence, Kind::MEMORY);
  add("nop", nothing, Kind::MEMORY);
}

}  // namespace ptx
