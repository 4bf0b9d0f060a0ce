// Comparisons, predicates, selection, moves.
#include "register.h"

namespace ptx {

namespace {

// ---- comparisons, predicates -----------------------------------------------------------------------------------

struct Eq {
  template <class T>
  static bool f(T a, T b) {
    return a == b;
  }
};
struct Ne {
  template <class T>
  static bool f(T a, T b) {
    return a != b;
  }
};
struct Lt {
  template <class T>
  static bool f(T a, T b) {
    return a < b;
  }
};
struct Le {
  template <class T>
  static bool f(T a, T b) {
    return a <= b;
  }
};
struct Gt {
  template <class T>
  static bool f(T a, T b) {
    return a > b;
  }
};
struct Ge {
  template <class T>
  static bool f(T a, T b) {
    return a >= b;
  }
};

template <class F, class T>
u32 compare(const u32* a, const u32* b) {
  u8 bits[LANES];
  for (int l = 0; l < LANES; ++l) bits[l] = F::template f<T>(get<T>(a, l), get<T>(b, l));
  u32 mask = 0;
  for (int k = 0; k < 4; ++k) {
    u64 eight;
    memcpy(&eight, bits + 8 * k, 8);
    mask |= u32(eight * 0x0102040810204080ull >> 56) << (8 * k);
  }
  return mask;
}

u32 combine(u32 op, u32 a, u32 c) { return op == 1 ? a & c : op == 2 ? a | c : op == 3 ? a ^ c : a; }

// Results p (and q, of the complement). aux[0]: 0, or and/or/xor with the third source, a predicate.
void put_predicates(Warp& w, const Ins& i, u32 mask, u32 result) {
  u32 c = i.ns > 2 ? w.mask_of(i.ops[i.nd + 2]) : 0;
  for (u32 k = 0; k < i.nd; ++k) {
    u32 *d = w.at(i.ops[k]), value = combine(i.aux[0], k ? ~result : result, c);
    *d = (*d & ~mask) | (value & mask);
  }
}
template <class F, class T>
void setp(Block&, Warp& w, const Ins& i, u32 mask) {
  put_predicates(w, i, mask, compare<F, T>(w.at(i.ops[i.nd]), w.at(i.ops[i.nd + 1])));
}
// aux[1]: the value of true
template <class F, class T>
void set(Block&, Warp& w, const Ins& i, u32 mask) {
  u32 result = compare<F, T>(w.at(i.ops[1]), w.at(i.ops[2]));
  result = combine(i.aux[0], result, i.ns > 2 ? w.mask_of(i.ops[3]) : 0);
  u32* d = w.at(i.ops[0]);
  for_lanes(mask, [&](int l) { d[l] = result >> l & 1 ? i.aux[1] : 0; });
}

template <class F>
void predicate_op(Block&, Warp& w, const Ins& i, u32 mask) {
  u32 a = w.mask_of(i.ops[1]), b = i.ns > 1 ? w.mask_of(i.ops[2]) : 0;
  u32* d = w.at(i.ops[0]);
  *d = (*d & ~mask) | (F::f(a, b) & mask);
}
struct PredAnd {
  static u32 f(u32 a, u32 b) { return a & b; }
};
struct PredOr {
  static u32 f(u32 a, u32 b) { return a | b; }
};
struct PredXor {
  static u32 f(u32 a, u32 b) { return a ^ b; }
};
struct PredNot {
  static u32 f(u32 a, u32) { return ~a; }
};
struct PredMov {
  static u32 f(u32 a, u32) { return a; }
};

template <class T>
void selp(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32 *a = w.at(i.ops[1]), *b = w.at(i.ops[2]);
  u32* d = w.at(i.ops[0]);
  u32 p = w.mask_of(i.ops[3]);
  T out[LANES];
  for (int l = 0; l < LANES; ++l) out[l] = p >> l & 1 ? get<T>(a, l) : get<T>(b, l);
  for (int l = 0; l < LANES; ++l) {
    if (mask >> l & 1) put<T>(d, l, out[l]);
  }
}
void taint_selp(Block& b, Warp& w, const Ins& i, u32 mask) {
  u32 p = w.mask_of(i.ops[3]);
  for_lanes(mask, [&](int l) {
    const Operand& from = i.ops[p >> l & 1 ? 1 : 2];
    bool choice = w.undef[i.ops[3].reg] >> l & 1;
    w.set_undefined(i.ops[0], l, choice ? 0xff : w.undefined_bytes(from, l),
                    w.origin_of(choice ? i.ops[3] : from, b.pc));
  });
}
template <class T, class C>
struct Slct {
  static T f(T a, T b, C c) { return c >= C(0) ? a : b; }
};

// ---- moves -----------------------------------------------------------------------------------------------------

template <class T>
void mov(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32* s = w.at(i.ops[1]);
  u32* d = w.at(i.ops[0]);
  for (int l = 0; l < LANES; ++l) {
    if (mask >> l & 1) put<T>(d, l, get<T>(s, l));
  }
}
// aux[0]: bytes of a part
void pack(Block&, Warp& w, const Ins& i, u32 mask) {
  u32* d = w.at(i.ops[0]);
  u32 size = i.aux[0];
  u64 part = size == 8 ? ~0ull : (1ull << 8 * size) - 1;
  for_lanes(mask, [&](int l) {
    u64 v = 0;
    for (u32 k = 0; k < i.ns; ++k) v |= (get<u32>(w.at(i.ops[1 + k]), l) & part) << (8 * size * k);
    if (i.ops[0].width == 8)
      put<u64>(d, l, v);
    else
      d[l] = u32(v);
  });
}
void taint_pack(Block& b, Warp& w, const Ins& i, u32 mask) {
  u32 size = i.aux[0];
  for_lanes(mask, [&](int l) {
    u32 u = 0, from = 0;
    for (u32 k = 0; k < i.ns; ++k) {
      u32 part = w.undefined_bytes(i.ops[1 + k], l) & ((1u << size) - 1);
      if (part) from = w.origin_of(i.ops[1 + k], b.pc);
      u |= part << (size * k);
    }
    w.set_undefined(i.ops[0], l, u8(u), from);
  });
}
void unpack(Block&, Warp& w, const Ins& i, u32 mask) {
  const Operand& s = i.ops[i.nd];
  u32 size = i.aux[0];
  u64 part = (1ull << 8 * size) - 1;
  for_lanes(mask, [&](int l) {
    u64 v = s.width == 8 ? get<u64>(w.at(s), l) : get<u32>(w.at(s), l);
    for (u32 k = 0; k < i.nd; ++k) {
      put<u32>(w.at(i.ops[k]), l, u32(v >> (8 * size * k) & part));
    }
  });
}
void taint_unpack(Block& b, Warp& w, const Ins& i, u32 mask) {
  const Operand& s = i.ops[i.nd];
  u32 size = i.aux[0];
  for_lanes(mask, [&](int l) {
    u32 u = w.undefined_bytes(s, l), from = w.origin_of(s, b.pc);
    for (u32 k = 0; k < i.nd; ++k) {
      w.set_undefined(i.ops[k], l, u8(u >> (size * k) & ((1u << size) - 1)), from);
    }
  });
}

template <class F, class T>
void comparison(const std::string& op, const std::string& type) {
  add("setp." + op + "." + type, setp<F, T>);
  add("set." + op + "." + type, set<F, T>);
}
template <class T>
void comparisons_of(const char* type) {
  comparison<Eq, T>("eq", type);
  comparison<Ne, T>("ne", type);
  comparison<Lt, T>("lt", type);
  comparison<Le, T>("le", type);
  comparison<Gt, T>("gt", type);
  comparison<Ge, T>("ge", type);
}

template <class T>
void moves_of(const char* type) {
  std::string t = std::string(".") + type;
  add("selp" + t, selp<T>, Kind::PLAIN, taint_selp);
  add("slct" + t + ".s32", lanes<Slct<T, i32>, T, T, T, i32>);
  add("slct" + t + ".f32", lanes<Slct<T, float>, T, T, T, float>);
  add("mov" + t, mov<T>, Kind::PLAIN, taint_bytes);
}

}  // namespace

void register_move() {
  comparisons_of<u16>("u16");
  comparisons_of<i16>("s16");
  comparisons_of<u32>("u32");
  comparisons_of<i32>("s32");
  comparisons_of<u64>("u64");
  comparisons_of<i64>("s64");
  moves_of<u16>("b16");
  moves_of<u32>("b32");
  moves_of<u64>("b64");
  add("and.pred", predicate_op<PredAnd>, Kind::PLAIN, taint_and);
  add("or.pred", predicate_op<PredOr>, Kind::PLAIN, taint_or);
  add("xor.pred", predicate_op<PredXor>);
  add("not.pred", predicate_op<PredNot>);
  add("mov.pred", predicate_op<PredMov>);
  add("pack", pack, Kind::PLAIN, taint_pack);
  add("unpack", unpack, Kind::PLAIN, taint_unpack);
}

}  // namespace ptx
