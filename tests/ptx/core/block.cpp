// The state of a block: how it starts, what is found in it, how undefined values pass through registers.
#include <algorithm>

#include "core.h"

namespace ptx {

namespace {

using Triple = std::array<u32, 3>;

Triple split(u32 number, const Triple& extent) {
  return {number % extent[0], number / extent[0] % extent[1], number / extent[0] / extent[1]};
}

u32 special_value(const std::string& name, const Launch& launch, const Block& b, const Warp& w, u32 lane) {
  const u32 warp = b.local(w), thread = warp * LANES + lane;
  const Triple &n = launch.block, &g = launch.grid, &c = launch.cluster;
  if (name == "%laneid") return lane;
  if (name == "%warpid") return warp;
  if (name == "%nwarpid") return b.block_warps;
  if (name == "%lanemask_eq") return 1u << lane;
  if (name == "%lanemask_lt") return (1u << lane) - 1;
  if (name == "%lanemask_le") return ((1u << lane) - 1) | 1u << lane;
  if (name == "%lanemask_gt") return ~(((1u << lane) - 1) | 1u << lane);
  if (name == "%lanemask_ge") return ~((1u << lane) - 1);
  if (name == "%dynamic_smem_size") return launch.dynamic_shared;
  if (name == "%total_smem_size") return launch.program->shared_bytes + launch.dynamic_shared;
  if (name == "%cluster_ctarank") return w.rank;
  if (name == "%cluster_nctarank") return b.ranks;
  if (name == "%is_explicit_cluster") return b.ranks > 1;
  u32 axis = u32(name.back() - 'x');
  std::string base = name.substr(0, name.size() - 2);
  if (base == "%tid") return split(thread, n)[axis];
  if (base == "%ntid") return n[axis];
  if (base == "%ctaid") return split(b.number(b.id, w.rank), g)[axis];
  if (base == "%nctaid") return g[axis];
  if (base == "%clusterid") return split(b.number(b.id, w.rank), g)[axis] / c[axis];
  if (base == "%nclusterid") return g[axis] / c[axis];
  if (base == "%cluster_ctaid") return split(w.rank, c)[axis];
  if (base == "%cluster_nctaid") return c[axis];
  return 0;  // %smid, %nsmid, %gridid and the like: one multiprocessor, one grid
}

// A bit is undefined where it depends on an undefined one: x & 0 and x | ~0 do not. By bytes.
template <bool AND>
void taint_logic(Block& b, Warp& w, const Ins& i, u32 mask) {
  const Operand &x = i.ops[1], &y = i.ops[2];
  for_lanes(mask, [&](int l) {
    u8 u = w.undefined_bytes(x, l), v = w.undefined_bytes(y, l), out = 0;
    if (x.space == PREDICATES || y.space == PREDICATES) {
      bool xv = w.mask_of(x) >> l & 1, yv = w.mask_of(y) >> l & 1;
      out = (u && (v || yv == AND)) || (v && xv == AND);
    } else {
      u64 xv = x.width == 8 ? get<u64>(w.at(x), l) : get<u32>(w.at(x), l);
      u64 yv = y.width == 8 ? get<u64>(w.at(y), l) : get<u32>(w.at(y), l);
      for (int k = 0; k < 8; ++k) {
        u8 absorbing = AND ? 0 : 0xff, xb = u8(xv >> 8 * k), yb = u8(yv >> 8 * k);
        bool xu = u >> k & 1, yu = v >> k & 1;
        out |= u8((xu && (yu || yb != absorbing)) || (yu && xb != absorbing)) << k;
      }
    }
    w.set_undefined(i.ops[0], l, out, w.origin_of(u ? x : y, b.pc));
  });
}
}  // namespace

void taint_and(Block& b, Warp& w, const Ins& i, u32 mask) { taint_logic<true>(b, w, i, mask); }
void taint_or(Block& b, Warp& w, const Ins& i, u32 mask) { taint_logic<false>(b, w, i, mask); }

void taint_any(Block& b, Warp& w, const Ins& i, u32 mask) {
  for_lanes(mask, [&](int l) {
    u32 from = 0;
    for (u32 k = 0; k < i.ns; ++k) {
      const Operand& s = i.ops[i.nd + k];
      if (!from && w.undefined_bytes(s, l)) from = w.origin_of(s, b.pc);
    }
    for (u32 k = 0; k < i.nd; ++k) w.set_undefined(i.ops[k], l, from ? 0xff : 0, from);
  });
}

void taint_bytes(Block& b, Warp& w, const Ins& i, u32 mask) {
  for_lanes(mask, [&](int l) {
    u8 u = 0;
    u32 from = 0;
    for (u32 k = 0; k < i.ns; ++k) {
      u8 bytes = w.undefined_bytes(i.ops[i.nd + k], l);
      if (bytes) from = w.origin_of(i.ops[i.nd + k], b.pc);
      u |= bytes;
    }
    w.set_undefined(i.ops[0], l, u, from);
  });
}

void taint_halves(Block& b, Warp& w, const Ins& i, u32 mask) {
  taint_bytes(b, w, i, mask);
  for_lanes(mask, [&](int l) {
    u8 u = w.undefined_bytes(i.ops[0], l);
    if (u) w.set_undefined(i.ops[0], l, u8((u & 3 ? 3 : 0) | (u & 12 ? 12 : 0)), w.origin[i.ops[0].reg]);
  });
}

u32 Block::number(u32 cluster, u32 rank) const {
  if (ranks == 1) return cluster;
  const Triple &g = launch.grid, &c = launch.cluster;
  const Triple outer = split(cluster, {g[0] / c[0], g[1] / c[1], g[2] / c[2]}), inner = split(rank, c);
  return outer[0] * c[0] + inner[0] + g[0] * (outer[1] * c[1] + inner[1] + g[1] * (outer[2] * c[2] + inner[2]));
}

Block::Block(Launch& l) : launch(l), program(*l.program) {
  const u32 threads = l.block[0] * l.block[1] * l.block[2];
  block_warps = (threads + LANES - 1) / LANES;
  ranks = l.cluster[0] * l.cluster[1] * l.cluster[2];
  bytes = program.shared_bytes + l.dynamic_shared;
  stride = (bytes / 1024 + 2) * 1024;  // more than a KB behind each block that belongs to none
  warps.resize(ranks * block_warps);
  for (u32 k = 0; k < warps.size(); ++k) {
    Warp& w = warps[k];
    w.id = k, w.rank = k / block_warps;
    const u32 left = threads - k % block_warps * LANES;
    w.initial = left >= LANES ? ALL : (1u << left) - 1;
    w.storage.resize(program.words + 16);
    w.predicates.resize(program.predicates + 1);
    w.bases[REGISTERS] = reinterpret_cast<u32*>((reinterpret_cast<uintptr_t>(w.storage.data()) + 63) & ~uintptr_t(63));
    w.bases[CONSTANTS] = const_cast<u32*>(program.constants.data());
    w.bases[PREDICATES] = w.predicates.data();
    w.partial.resize(program.registers);
    w.origin.resize(program.registers);
    w.detail.resize(size_t(program.registers) * LANES);
    w.local.resize(size_t(program.local_bytes) * LANES);
  }
  shared.resize(ranks > 1 ? ranks * stride : bytes);
  if (l.races && !shared.empty()) shared_shadow.allocate(shared.size(), 0, false);
  hints.resize(program.code.size());
  counts.resize(program.code.size());
  if (!l.conflicts.empty()) conflicts.resize(program.code.size());
}

void Block::reset(u32 number) {
  id = number;
  time = 1, fence_time = 0, touched = false, executed = 0;
  known.clear(), read_before_fence.clear(), printed.clear(), held.clear();
  barriers.assign(ranks, {});
  cluster = {};
  if (ranks > 1) {
    members.assign(ranks, {block_warps, std::vector<u32>(warps.size() + 1), std::vector<Member::Visit>(warps.size())});
  }
  signals.clear(), bulk.clear(), events = 0;
  shared_state.assign(shared.size(), HOLE);
  for (u32 rank = 0; rank < ranks; ++rank) {
    u8* states = shared_state.data() + place(rank, 0);
    for (auto [offset, size] : program.shared) memset(states + offset, UNWRITTEN, size);
    if (launch.dynamic_shared) memset(states + program.shared_bytes, UNWRITTEN, launch.dynamic_shared);
  }
  if (shared_shadow.writer) shared_shadow.clear(shared.size());
  if (program.async_proxy) {
    reading.assign(shared.size() / 16 + 1, 0);
    warpgroups.assign(ranks * ((block_warps + 3) / 4), {});
  }
  for (Warp& w : warps) {
    w.alive = w.initial;
    w.splits.assign(1, Split{w.initial, 0, Split::READY, 0, {}});
    w.undef.assign(program.registers, ALL);
    w.undef[0] = 0;
    std::fill(w.partial.begin(), w.partial.end(), 0);
    std::fill(w.origin.begin(), w.origin.end(), 0);
    w.local_state.assign(w.local.size(), HOLE);
    for (auto [offset, bytes] : program.locals) {
      for (size_t l = 0; l < LANES; ++l) memset(&w.local_state[l * program.local_bytes + offset], UNWRITTEN, bytes);
    }
    w.copies.clear();
    w.group.fill(0), w.bulk_group.fill(0);
    w.known.assign(warps.size() + 1, 0);
    w.lanes_known = 0;
    w.fenced.clear();
    w.pairs_known.reset();
    w.turns = 0, w.carry = 0;
    w.arrived = w.passed = w.phases = 0;
    if (program.async_proxy) {
      w.proxied.assign(warps.size() + 1, 0);
      w.products.clear();
      w.products_group = w.products_issued = 0;
      w.flying.assign(program.registers, 0);
      w.stale.assign(program.registers, 0);
    }
    for (const SpecialRegister& s : program.special) {
      for (u32 l = 0; l < LANES; ++l) {
        u32 value = special_value(s.name, launch, *this, w, l);
        if (s.operand.space == PREDICATES)
          *w.at(s.operand) = value ? ALL : 0;
        else if (s.operand.width == 8)
          put<u64>(w.at(s.operand), l, value);
        else
          put<u32>(w.at(s.operand), l, value);
      }
      w.undef[s.operand.reg] = 0;
    }
  }
}

void Block::add(Finding finding) {
  auto [it, fresh] = findings.try_emplace({finding.pc, finding.kind}, finding);
  ++it->second.count;
  if (findings.size() >= launch.max_findings) throw Stop{};
}

void Block::find(const char* kind, const Warp& w, int lane, std::string message, i64 reg, i64 origin) {
  Finding finding{kind, std::move(message), pc, number(id, w.rank), local(w) * LANES + u32(lane), reg, origin, 0};
  if (finding.kind == "race") {
    std::erase_if(held, [&](const Finding& f) { return f.pc == pc || i64(f.pc) == origin; });
  }
  for (; !held.empty() && finding.kind != "race"; held.pop_back()) add(held.back());
  add(std::move(finding));
}

// A finding that waits for the end of the block, or for another one.
void Block::hold(const char* kind, const Warp& w, int lane, std::string message) {
  for (const Finding& f : held) {
    if (f.pc == pc) return;
  }
  held.push_back({kind, std::move(message), pc, number(id, w.rank), local(w) * LANES + u32(lane), -1, -1, 0});
}

void Block::find_undefined(Warp& w, const Operand& o, u32 mask, const char* use) {
  int lane = std::countr_zero(w.undef[o.reg] & mask);
  u32 from = w.origin[o.reg];
  find("unset register", w, lane,
       std::string("uses $reg$, which ") + (from ? "was computed from one that nothing wrote" : "nothing wrote") +
           ", as " + use,
       o.reg, from ? i64(from) - 1 : -1);
}

}  // namespace ptx
