// Thread-block clusters: barrier.cluster, addresses of other blocks' shared memory, and when it may be touched.
//
// The blocks of a cluster run as one Block, so races, initialisation and bounds are checked across them as within one.
// Two checks are a cluster's own. A block must be known to have started before another touches its shared memory: the
// warp has passed a barrier.cluster, or knows of something that the block did. And it must not have exited: what
// touched its memory must be ordered before the exit of one of its threads at least, whatever the schedule was here.
#include "memory.h"
#include "register.h"

namespace ptx {

namespace {

constexpr u32 AT_CLUSTER = 16;  // as the number of a barrier: those of a block are 0 to 15
constexpr u64 OFFSET = (u64(1) << RANK_SHIFT) - 1;

// Sources: an address of shared memory, a rank. aux[0]: 1 a generic address
template <class T>
void map_address(Block& b, Warp& w, const Ins& i, u32 mask) {
  if (b.undefined(w, i.ops[1], mask, "an address") || b.undefined(w, i.ops[2], mask, "a block's rank")) return;
  for_lanes(mask, [&](int lane) {
    const u64 address = address_of(w, i.ops[1], lane) + u64(i.imm);
    const u32 rank = get<u32>(w.at(i.ops[2]), lane);
    if (rank >= b.ranks) {
      b.find("bounds", w, lane,
             "maps to block " + std::to_string(rank) + " of a cluster of " + std::to_string(b.ranks));
      throw Stop{};
    }
    const u64 window = i.aux[0] ? SHARED_WINDOW : 0;
    put<T>(w.at(i.ops[0]), lane, T(window + (u64(rank + 1) << RANK_SHIFT | (address & OFFSET))));
  });
  w.undef[i.ops[0].reg] &= ~mask;
}

// Source: an address.
void rank_of_address(Block& b, Warp& w, const Ins& i, u32 mask) {
  if (b.undefined(w, i.ops[1], mask, "an address")) return;
  for_lanes(mask, [&](int lane) {
    const u32 part = u32((address_of(w, i.ops[1], lane) + u64(i.imm)) % WINDOW_BYTES >> RANK_SHIFT);
    put<u32>(w.at(i.ops[0]), lane, part ? part - 1 : w.rank);
  });
  w.undef[i.ops[0].reg] &= ~mask;
}

}  // namespace

u32 Block::place_of(Warp& w, int lane, u64 address, bool across) {
  const u64 part = address % WINDOW_BYTES >> RANK_SHIFT, rank = part ? part - 1 : w.rank;
  if (rank >= ranks && part <= 16) {
    find("bounds", w, lane,
         "an address in block " + std::to_string(rank) + " of a cluster of " + std::to_string(ranks));
    return NOWHERE;
  }
  if (rank < ranks && rank != w.rank && !across) {
    find("bounds", w, lane, "an address in another block of the cluster, where only one of the own is allowed");
    return NOWHERE;
  }
  return rank < ranks ? place(u32(rank), address & OFFSET) : u32(std::min<u64>(address % WINDOW_BYTES, NOWHERE - 1024));
}

std::pair<const char*, const char*> Block::unreachable(Warp& w, int lane, u32 rank, bool visits) {
  if (rank == w.rank) return {nullptr, nullptr};
  Member& other = members[rank];
  if (!other.alive) return {"bounds", ", which has exited: it has to wait at a barrier.cluster first"};
  bool started = w.phases > 0;
  for (u32 k = rank * block_warps; !started && k < (rank + 1) * block_warps; ++k) started = w.known[k] > 0;
  if (!started) return {"race", ", and nothing says that it has started: a barrier.cluster has to come before"};
  if (visits) other.visits[w.id] = {time, pc, lane}, touched = true;
  return {nullptr, nullptr};
}

// ---- barrier.cluster

// aux[0]: 1 wait, else arrive; aux[1]: aligned; aux[2]: relaxed
void Block::cluster_barrier(Warp& w, int current, const Ins& i) {
  Split& s = w.splits[size_t(current)];
  const int lane = std::countr_zero(s.mask);
  if (i.aux[1] && !gather(w, s)) return;
  if (i.aux[0]) {
    if (s.mask & ~(w.arrived | w.passed)) {
      find("divergence", w, lane, "waits at barrier.cluster without having arrived");
      throw Stop{};
    }
    if (s.mask & ~w.passed)
      s.state = Split::BARRIER, s.wait = AT_CLUSTER;
    else
      pass_cluster(w, s);
    return;
  }
  if (s.mask & (w.arrived | w.passed)) {
    find("divergence", w, lane, "arrives at barrier.cluster again before it has waited");
    throw Stop{};
  }
  w.arrived |= s.mask;
  ++s.pc, ++events;
  if (!i.aux[2]) {
    const u32 now = tick();
    join(cluster.known, w.known), join(cluster.proxied, w.proxied);
    cluster.known[w.id] = now;
  } else {
    join(cluster.known, w.fenced);
  }
  complete_cluster();
}

// If all threads that have not exited have arrived, the phase is complete.
void Block::complete_cluster() {
  bool any = false;
  for (const Warp& w : warps) {
    if (w.alive & ~w.arrived) return;
    any |= w.arrived != 0;
  }
  if (!any) return;
  std::swap(cluster.passed_known, cluster.known), std::swap(cluster.passed_proxied, cluster.proxied);
  cluster.known.clear(), cluster.proxied.clear();
  ++events;
  for (Warp& w : warps) w.passed = w.alive & w.arrived, w.arrived = 0;
  for (Warp& w : warps) {
    for (Split& s : w.splits) {
      if (s.state == Split::BARRIER && s.wait == AT_CLUSTER) pass_cluster(w, s);
    }
  }
}

void Block::pass_cluster(Warp& w, Split& s) {
  w.passed &= ~s.mask;
  ++w.phases;
  join(w.known, cluster.passed_known);
  if (!w.proxied.empty()) join(w.proxied, cluster.passed_proxied);
  if ((s.mask & w.alive) == w.alive)
    w.lanes_known = tick();
  else
    order_lanes(w, s.mask);
  s.state = Split::READY;
  ++s.pc;
}

// ---- exits

// Threads of a warp have exited; perhaps all of their block have now.
void Block::exited(Warp& w) {
  complete_cluster();
  if (ranks == 1 || !w.splits.empty()) return;
  Member& m = members[w.rank];
  join(m.known, w.known);
  m.known[w.id] = tick();
  if (--m.alive) return;
  const u32 before = pc;
  for (Warp& other : warps) {
    const Member::Visit& visit = m.visits[other.id];
    if (!visit.time || visit.time < m.known[other.id]) continue;
    pc = visit.pc;
    find("race", other, visit.lane,
         "touches the shared memory of block " + std::to_string(number(id, w.rank)) +
             " of its cluster, and nothing keeps that block from exiting before: a barrier.cluster has to come after");
  }
  for (const BulkCopy& copy : bulk) {
    for (const Piece& p : copy.pieces) {
      const bool from = copy.load && copy.source == Source::SHARED_MEMORY && rank_of(u32(p.other)) == w.rank;
      if (!from && !(copy.load && rank_of(p.shared) == w.rank)) continue;
      pc = copy.pc;
      find("async", warps[copy.warp], int(copy.lane),
           "block " + std::to_string(number(id, w.rank)) +
               " exits while this copy is under way in its shared memory: " + "wait for its mbarrier first");
      break;
    }
  }
  pc = before;
}

void register_cluster() {
  add("mapa.u32", map_address<u32>, Kind::MEMORY);
  add("mapa.u64", map_address<u64>, Kind::MEMORY);
  add("getctarank", rank_of_address, Kind::MEMORY);
  add("barrier.cluster", nullptr, Kind::CLUSTER_BARRIER);
}

}  // namespace ptx
