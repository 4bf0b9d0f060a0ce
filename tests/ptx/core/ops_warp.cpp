// What the lanes of a warp do together: shuffles, votes, matches, reductions. The scheduler has brought all members of
// the mask here (Kind::CONVERGE); aux[5] - 1 is the source that holds it.
#include <algorithm>

#include "register.h"

namespace ptx {

namespace {

void put_mask(Warp& w, const Operand& d, u32 mask, u32 value) {
  *w.at(d) = (*w.at(d) & ~mask) | (value & mask);
  w.undef[d.reg] &= ~mask;
}
void put_uniform(Warp& w, const Operand& d, u32 mask, u32 value) {
  for_lanes(mask, [&](int l) { w.at(d)[l] = value; });
  w.undef[d.reg] &= ~mask;
}

// Sources a, b, c, members; results d [, p]. aux[0]: 0 up, 1 down, 2 bfly, 3 idx. A lane that reads one that is not
// here gets an undefined value.
void shfl(Block& b, Warp& w, const Ins& i, u32 mask) {
  const Operand *s = i.ops + i.nd, &d = i.ops[0];
  if (b.undefined(w, s[1], mask, "a lane") || b.undefined(w, s[2], mask, "a lane")) return;
  const u32 *a = w.at(s[0]), *offsets = w.at(s[1]), *limits = w.at(s[2]);
  u32 out[LANES], within = 0;
  int from[LANES];
  for_lanes(mask, [&](int lane) {
    int offset = offsets[lane] & 31, limit = limits[lane] & 31, segment = limits[lane] >> 8 & 31;
    int last = (lane & segment) | (limit & ~segment), first = lane & segment, j = 0;
    bool in = false;
    switch (i.aux[0]) {
      case 0:
        j = lane - offset, in = j >= last;
        break;
      case 1:
        j = lane + offset, in = j <= last;
        break;
      case 2:
        j = lane ^ offset, in = j <= last;
        break;
      default:
        j = first | (offset & ~segment), in = j <= last;
    }
    from[lane] = in ? j : lane;
    within |= u32(in) << lane;
    out[lane] = a[from[lane]];
  });
  u32 source_undefined = w.undef[s[0].reg];
  u8 bytes[LANES] = {};
  if ((source_undefined & mask) || mask != ALL) {
    for_lanes(mask, [&](int lane) { bytes[lane] = mask >> from[lane] & 1 ? w.undefined_bytes(s[0], from[lane]) : 15; });
  }
  u32 origin = w.origin_of(s[0], b.pc);
  w.undef[d.reg] &= ~mask;
  for_lanes(mask, [&](int lane) {
    w.at(d)[lane] = out[lane];
    if (bytes[lane]) w.set_undefined(d, lane, bytes[lane], origin);
  });
  if (i.nd > 1) put_mask(w, i.ops[1], mask, within);
}

// Source p [, members]. aux[0]: 0 all, 1 any, 2 uni, 3 ballot
void vote(Block& b, Warp& w, const Ins& i, u32 mask) {
  const Operand& p = i.ops[1];
  if (b.undefined(w, p, mask, "a vote")) return;
  u32 votes = w.mask_of(p) & mask;
  if (i.aux[0] == 3) return put_uniform(w, i.ops[0], mask, votes);
  bool result = i.aux[0] == 0 ? votes == mask : i.aux[0] == 1 ? votes != 0 : votes == 0 || votes == mask;
  put_mask(w, i.ops[0], mask, result ? ALL : 0);
}

// Lanes with the same value. aux[0]: 1 all of them must (and the second result says so)
template <class T>
void match(Block& b, Warp& w, const Ins& i, u32 mask) {
  const Operand& a = i.ops[i.nd];
  if (b.undefined(w, a, mask, "a match")) return;
  T values[LANES];
  for_lanes(mask, [&](int l) { values[l] = get<T>(w.at(a), l); });
  u32 result[LANES], all = ALL;
  for_lanes(mask, [&](int l) {
    u32 same = 0;
    for_lanes(mask, [&](int k) { same |= u32(values[k] == values[l]) << k; });
    result[l] = same;
    if (same != mask) all = 0;
  });
  for_lanes(mask, [&](int l) { w.at(i.ops[0])[l] = i.aux[0] ? mask & all : result[l]; });
  w.undef[i.ops[0].reg] &= ~mask;
  if (i.nd > 1) put_mask(w, i.ops[1], mask, all);
}

struct Add {
  template <class T>
  static T f(T a, T b) {
    return T(u32(a) + u32(b));
  }
};
struct Min {
  template <class T>
  static T f(T a, T b) {
    return std::min(a, b);
  }
};
struct Max {
  template <class T>
  static T f(T a, T b) {
    return std::max(a, b);
  }
};
struct And {
  template <class T>
  static T f(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T f(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T f(T a, T b) {
    return a ^ b;
  }
};

template <class F, class T>
void redux(Block& b, Warp& w, const Ins& i, u32 mask) {
  const Operand& a = i.ops[1];
  if (b.undefined(w, a, mask, "a reduction")) return;
  bool first = true;
  T result{};
  for_lanes(mask, [&](int l) {
    T x = get<T>(w.at(a), l);
    result = first ? x : F::template f<T>(result, x);
    first = false;
  });
  put_uniform(w, i.ops[0], mask, u32(result));
}

void activemask(Block&, Warp& w, const Ins& i, u32 mask) { put_uniform(w, i.ops[0], mask, mask); }

// Results: the leader's lane, and whether this is it.
void elect(Block&, Warp& w, const Ins& i, u32 mask) {
  u32 leader = u32(std::countr_zero(mask));
  put_uniform(w, i.ops[0], mask, leader);
  put_mask(w, i.ops[1], mask, 1u << leader);
}

}  // namespace

void register_warp() {
  add("shfl", shfl, Kind::CONVERGE);
  add("vote", vote, Kind::CONVERGE);
  add("match.b32", match<u32>, Kind::CONVERGE);
  add("match.b64", match<u64>, Kind::CONVERGE);
  add("redux.add.u32", redux<Add, u32>, Kind::CONVERGE);
  add("redux.add.s32", redux<Add, i32>, Kind::CONVERGE);
  add("redux.min.u32", redux<Min, u32>, Kind::CONVERGE);
  add("redux.min.s32", redux<Min, i32>, Kind::CONVERGE);
  add("redux.max.u32", redux<Max, u32>, Kind::CONVERGE);
  add("redux.max.s32", redux<Max, i32>, Kind::CONVERGE);
  add("redux.and.b32", redux<And, u32>, Kind::CONVERGE);
  add("redux.or.b32", redux<Or, u32>, Kind::CONVERGE);
  add("redux.xor.b32", redux<Xor, u32>, Kind::CONVERGE);
  add("elect", elect, Kind::CONVERGE);
  add("activemask", activemask);
}

}  // namespace ptx
