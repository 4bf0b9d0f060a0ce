// The scheduler: blocks, warps, diverged lanes, barriers, branches and calls.
//
// Lanes of a warp that took different ways are Splits. The one furthest behind in the program runs first, so that the
// others meet it where the ways join again; should it spin, the others get their turn. An instruction that needs lanes
// together (Kind::CONVERGE) waits for them. Warps take turns.
#include <algorithm>

#include "memory.h"

namespace ptx {

namespace {

constexpr u32 QUANTUM = 1 << 14;      // instructions of a warp's turn
constexpr u32 PATIENCE = 1 << 12;     // instructions before diverged lanes change their order
constexpr u32 PATIENT_ROUNDS = 8;     // before waits for mbarriers count as endless
constexpr u32 EVERYONE = 0xffff0000;  // a barrier's expected count: all threads of the block

std::string lanes_text(u32 mask) {
  std::string text;
  for (int l = 0; l < LANES; ++l) {
    if (!(mask >> l & 1)) continue;
    int end = l;
    while (end + 1 < LANES && mask >> (end + 1) & 1) ++end;
    text += (text.empty() ? "" : ",") + std::to_string(l) + (end > l ? "-" + std::to_string(end) : "");
    l = end;
  }
  return text;
}

}  // namespace

std::unordered_map<std::string, Handler>& handlers() {
  static std::unordered_map<std::string, Handler> table;
  return table;
}

void Block::order_lanes(Warp& w, u32 members) {
  u32 now = tick();
  if ((members & w.alive) == w.alive) {
    w.lanes_known = now;
    return;
  }
  if (!w.pairs_known) {
    w.pairs_known = std::make_unique<std::array<std::array<u32, LANES>, LANES>>();
    for (auto& row : *w.pairs_known) row.fill(0);
  }
  std::array<u32, LANES> joined{};
  for_lanes(members, [&](int l) {
    for (int m = 0; m < LANES; ++m) joined[m] = std::max(joined[m], (*w.pairs_known)[l][m]);
  });
  for_lanes(members, [&](int l) { joined[l] = now; });
  for_lanes(members, [&](int l) { (*w.pairs_known)[l] = joined; });
}

// ---- choosing what runs ----------------------------------------------------------------------------------------

// The split to run, after joining those that meet; -1 if all wait.
int Block::choose(Warp& w) {
  auto& splits = w.splits;
  for (size_t a = 0; a + 1 < splits.size(); ++a) {
    for (size_t b = splits.size() - 1; b > a; --b) {
      bool both = splits[a].state <= Split::CONVERGING && splits[b].state <= Split::CONVERGING;
      if (!both || !splits[a].joins(splits[b])) continue;
      splits[a].mask |= splits[b].mask;
      splits[a].state = Split::READY;
      splits.erase(splits.begin() + long(b));
    }
  }
  int best = -1;
  bool last = ++w.turns / PATIENCE % 2;
  for (size_t k = 0; k < splits.size(); ++k) {
    const Split& s = splits[k];
    if (s.state != Split::READY) continue;
    if (best < 0) {
      best = int(k);
      continue;
    }
    const Split& t = splits[size_t(best)];
    bool ahead = s.stack.size() != t.stack.size() ? s.stack.size() > t.stack.size() : s.pc < t.pc;
    if (ahead != last) best = int(k);
  }
  if (best >= 0) return best;
  // Lanes that the others waited for may have exited.
  for (size_t k = 0; k < splits.size(); ++k) {
    Split& s = splits[k];
    u32 members = s.wait & w.alive, here = s.mask;
    if (s.state == Split::WARP_BARRIER) {
      here = 0;
      for (const Split& t : splits) {
        if (t.state == Split::WARP_BARRIER && t.wait == s.wait) here |= t.mask;
      }
    } else if (s.state != Split::CONVERGING)
      continue;
    if (members & ~here) continue;
    if (s.state == Split::CONVERGING) {
      s.state = Split::READY;
    } else {
      u32 wait = s.wait;
      order_lanes(w, wait);
      for (Split& t : splits) {
        if (t.state == Split::WARP_BARRIER && t.wait == wait) t.state = Split::READY, ++t.pc;
      }
    }
    return choose(w);
  }
  return -1;
}

// Runs a warp until it waits, ends, or has had its quantum. False if it could do nothing.
bool Block::turn(Warp& w) {
  u32 steps = 0;
  waiting = false;
  while (steps < QUANTUM && !w.splits.empty() && !waiting) {
    int current = choose(w);
    if (current < 0) break;
    do {
      step(w, current);
      ++steps;
      if (waiting) break;
    } while (w.splits.size() == 1 && w.splits[0].state == Split::READY && steps < QUANTUM && (current = 0, true));
  }
  executed += steps;
  if (executed > launch.max_instructions && !w.splits.empty()) {
    pc = w.splits[0].pc;
    find("timeout", w, std::countr_zero(w.splits[0].mask),
         "still runs after " + std::to_string(executed) + " instructions of the block");
    throw Stop{};
  }
  return steps > 0;
}

void Block::run(u32 number) {
  reset(number);
  try {
    u32 idle = 0;  // rounds in which every warp waited for an mbarrier, and nothing happened
    for (bool any = true; any;) {
      bool progress = false, waits = true;
      const u64 before = events;
      any = false;
      for (Warp& w : warps) {
        if (w.splits.empty()) continue;
        any = true;
        bool ran = turn(w);
        progress |= ran, waits &= !ran || waiting;
      }
      if (any && !progress) deadlock();
      idle = any && waits && events == before ? idle + 1 : 0;
      if (idle == PATIENT_ROUNDS) starve();
    }
    if (program.async_proxy) finish_products();
    finish_bulk();
    for (; !held.empty(); held.pop_back()) add(held.back());
  } catch (const Stop&) {
  }
}

// All that is left waits for lanes that never come.
void Block::deadlock() {
  u32 exited = 0;
  std::string text;
  const Warp* first = nullptr;
  for (const Warp& w : warps) {
    exited += u32(std::popcount(w.initial & ~w.alive));
    for (const Split& s : w.splits) {
      if (!first) first = &w, pc = s.pc;
      if (text.size() < 600) {
        text += (ranks > 1 ? "; block " + std::to_string(number(id, w.rank)) + " warp " : "; warp ") +
                std::to_string(local(w)) + " lanes " + lanes_text(s.mask) + " at $pc" + std::to_string(s.pc) + "$";
      }
    }
  }
  find("divergence", *first, std::countr_zero(first->splits[0].mask),
       "threads wait for others that do not come here" + text +
           (exited ? "; " + std::to_string(exited) + " threads have exited" : ""));
  throw Stop{};
}

// ---- control -----------------------------------------------------------------------------------------------------

// Sends every lane of the split to its own place.
void Block::branch(Warp& w, int current, const u32* targets) {
  Split from = w.splits[size_t(current)];
  bool first = true;
  for (u32 left = from.mask; left;) {
    u32 target = targets[std::countr_zero(left)], same = 0;
    for_lanes(left, [&](int l) { same |= u32(targets[l] == target) << l; });
    left &= ~same;
    Split to{same, target, Split::READY, 0, from.stack};
    if (first)
      w.splits[size_t(current)] = std::move(to);
    else
      w.splits.push_back(std::move(to));
    first = false;
  }
}

// Exit, or return from a function.
void Block::leave(Warp& w, int current, u32 mask) {
  Split& s = w.splits[size_t(current)];
  if (program.code[s.pc].kind == Kind::RETURN && !s.stack.empty()) {
    s.pc = s.stack.back();
    s.stack.pop_back();
    return;
  }
  w.alive &= ~mask;
  ++events;
  w.splits.erase(w.splits.begin() + current);
  exited(w);
}

// Lanes of a split by their member mask, which must be the same for all of its members that are here.
std::vector<std::pair<u32, u32>> Block::groups(Warp& w, const Operand& o, u32 mask) {
  std::vector<std::pair<u32, u32>> out;  // lanes, member mask
  if (undefined(w, o, mask, "a member mask")) throw Stop{};
  const u32* masks = w.at(o);
  for (u32 left = mask; left;) {
    int first = std::countr_zero(left);
    u32 members = masks[first], lanes = 0;
    for_lanes(left, [&](int l) { lanes |= u32(masks[l] == members) << l; });
    left &= ~lanes;
    for_lanes((members & mask) | lanes, [&](int l) {
      if (!(members >> l & 1)) {
        find("divergence", w, l, "executes this, but its member mask " + hex(members) + " leaves it out");
      } else if (masks[l] != members) {
        find("divergence", w, l,
             "has the member mask " + hex(masks[l]) + ", but lane " + std::to_string(first) + " " + hex(members));
      }
    });
    out.emplace_back(lanes, members);
  }
  return out;
}

// Runs the instruction for the lanes whose fellow members are all here; the others wait.
void Block::converge(Warp& w, int current, const Ins& i) {
  Split& s = w.splits[size_t(current)];
  std::vector<std::pair<u32, u32>> sets{{s.mask, w.initial}};
  if (i.aux[5]) {
    sets = groups(w, i.ops[i.nd + i.aux[5] - 1], s.mask);
  } else if (w.alive != ALL) {
    find("divergence", w, std::countr_zero(s.mask),
         "needs all 32 lanes of the warp; lanes " + lanes_text(~w.alive) +
             (w.initial == ALL ? " have exited" : " are not there"));
  }
  u32 done = 0, wait = 0;
  for (auto [lanes, members] : sets) {
    if (members & w.alive & ~lanes) {
      wait |= members;
    } else {
      i.run(*this, w, i, lanes);
      done |= lanes;
    }
  }
  Split later = s;
  later.mask &= ~done, later.state = Split::CONVERGING, later.wait = wait;
  if (!done) {
    s = std::move(later);
    return;
  }
  s.mask = done;
  ++s.pc;
  if (later.mask) w.splits.push_back(std::move(later));
}

void Block::warp_barrier(Warp& w, int current, const Ins& i) {
  Split from = w.splits[size_t(current)];
  w.splits.erase(w.splits.begin() + current);
  for (auto [lanes, members] : groups(w, i.ops[0], from.mask)) {
    if (members & w.initial & ~w.alive) {
      find("divergence", w, std::countr_zero(lanes),
           "waits for lanes " + lanes_text(members & w.initial & ~w.alive) + ", which have exited");
    }
    w.splits.push_back({lanes, from.pc, Split::WARP_BARRIER, members, from.stack});
  }
}

// Whether all lanes of the warp are at an aligned barrier. If not, this split waits for the others.
bool Block::gather(Warp& w, Split& s) {
  if (w.alive != w.initial) {
    find("divergence", w, std::countr_zero(s.mask),
         "waits at a barrier that lanes " + lanes_text(w.initial & ~w.alive) +
             " of its warp, which have exited, do not reach");
  }
  if (!(w.alive & ~s.mask)) return true;
  s.state = Split::CONVERGING, s.wait = w.alive;
  return false;
}

// aux[0]: 0 sync, 1 arrive, 2 red; aux[1]: aligned; aux[2]: there is a count; aux[3]: popc, and, or.
// Sources: the barrier, [the count], [the predicate].
void Block::barrier(Warp& w, int current, const Ins& i) {
  Split& s = w.splits[size_t(current)];
  const Operand* source = i.ops + i.nd;
  int lane = std::countr_zero(s.mask);
  for (u32 k = 0; k < i.ns; ++k) {
    if (undefined(w, source[k], s.mask, "an operand of a barrier")) throw Stop{};
  }
  if (i.aux[1] && !gather(w, s)) return;
  u32 number = w.at(source[0])[lane], expected = i.aux[2] ? w.at(source[1])[lane] : EVERYONE;
  if (number > 15 || (i.aux[2] && (expected == 0 || expected % LANES))) {
    find("divergence", w, lane, "barrier " + std::to_string(number) + " with a count of " + std::to_string(expected));
    throw Stop{};
  }
  if (expected == EVERYONE) expected = block_warps * LANES;
  BarrierState& b = barriers[w.rank][number];
  if (b.arrived == 0) {
    b = {};
    b.expected = expected, b.pc = pc;
    b.known.assign(w.known.size(), 0);
    b.proxied = b.known;
  } else if (b.expected != expected) {
    find("divergence", w, lane,
         "barrier " + std::to_string(number) + " with a count of " + std::to_string(expected) + ", but $pc" +
             std::to_string(b.pc) + "$ counts " + std::to_string(b.expected));
  }
  u32 now = tick();
  join(b.known, w.known), join(b.proxied, w.proxied);
  b.known[w.id] = now;
  // Lanes that do not exist have arrived with the first that does.
  b.arrived += u32(std::popcount(s.mask)) + (s.mask & 1 ? u32(LANES - std::popcount(w.initial)) : 0);
  if (b.arrived > b.expected) {
    find("divergence", w, lane,
         "more threads arrive at barrier " + std::to_string(number) + " than the " + std::to_string(b.expected) +
             " that it counts");
  }
  if (i.aux[0] == 2) b.votes += u32(std::popcount(w.mask_of(source[1 + i.aux[2]]) & s.mask));
  if (i.aux[0] == 1)
    ++s.pc;
  else
    s.state = Split::BARRIER, s.wait = number;
  if (b.arrived >= b.expected) release(w.rank, number);
}

void Block::release(u32 rank, u32 number) {
  BarrierState& b = barriers[rank][number];
  u32 now = tick();
  for (u32 k = rank * block_warps; k < (rank + 1) * block_warps; ++k) {
    Warp& w = warps[k];
    for (Split& s : w.splits) {
      if (s.state != Split::BARRIER || s.wait != number) continue;
      const Ins& i = program.code[s.pc];
      if (i.aux[0] == 2) {
        const Operand& d = i.ops[0];
        const u32 missing = block_warps * LANES - launch.block[0] * launch.block[1] * launch.block[2];
        const u32 members = b.expected - missing;
        bool result = i.aux[3] == 1 ? b.votes == members : b.votes > 0;
        if (i.aux[3] == 0)
          for_lanes(s.mask, [&](int l) { w.at(d)[l] = b.votes; });
        else
          *w.at(d) = (*w.at(d) & ~s.mask) | (result ? s.mask : 0);
        w.undef[d.reg] &= ~s.mask;
      }
      join(w.known, b.known);
      if (!w.proxied.empty()) join(w.proxied, b.proxied);
      if ((s.mask & w.alive) == w.alive)
        w.lanes_known = now;
      else
        order_lanes(w, s.mask);
      s.state = Split::READY;
      ++s.pc;
    }
  }
  b = {};
  ++events;
}

void Block::step(Warp& w, int current) {
  Split& s = w.splits[size_t(current)];
  pc = s.pc;
  const Ins& i = program.code[pc];
  u32 mask = s.mask;
  if (i.guarded) {
    if (w.undef[i.guard.reg] & mask) undefined(w, i.guard, mask, "a predicate");
    mask &= w.mask_of(i.guard);
    if (!mask) {
      ++s.pc;
      return;
    }
    if (mask != s.mask && i.kind > Kind::MEMORY) {  // the others go on
      u32 targets[LANES];
      for (int l = 0; l < LANES; ++l) targets[l] = mask >> l & 1 ? (i.kind == Kind::BRANCH ? i.target : pc) : pc + 1;
      ++counts[pc];
      branch(w, current, targets);
      return;
    }
  }
  ++counts[pc];
  if (program.async_proxy && !i.product) visit_registers(w, i, mask);
  switch (i.kind) {
    case Kind::PLAIN: {
      u32 unset = 0;
      for (u32 k = 0; k < i.ns; ++k) unset |= w.undef[i.ops[i.nd + k].reg];
      if (unset & mask)
        (i.taint ? i.taint : taint_any)(*this, w, i, mask);
      else
        for (u32 k = 0; k < i.nd; ++k) w.undef[i.ops[k].reg] &= ~mask;
      i.run(*this, w, i, mask);
      ++s.pc;
      break;
    }
    case Kind::MEMORY:
      i.run(*this, w, i, mask);
      ++s.pc;
      break;
    case Kind::CONVERGE:
      converge(w, current, i);
      break;
    case Kind::BRANCH:
      s.pc = i.target;
      break;
    case Kind::BRANCH_TABLE: {
      if (undefined(w, i.ops[0], mask, "a branch")) throw Stop{};
      u32 targets[LANES] = {};
      for_lanes(mask, [&](int l) {
        u32 index = w.at(i.ops[0])[l];
        if (index >= i.table->size()) {
          find("bounds", w, l, "branches to entry " + std::to_string(index) + " of " + std::to_string(i.table->size()));
          throw Stop{};
        }
        targets[l] = (*i.table)[index];
      });
      branch(w, current, targets);
      break;
    }
    case Kind::CALL:
      s.stack.push_back(pc + 1);
      s.pc = i.target;
      break;
    case Kind::RETURN:
    case Kind::EXIT:
      leave(w, current, mask);
      break;
    case Kind::BARRIER:
      barrier(w, current, i);
      break;
    case Kind::WARP_BARRIER:
      warp_barrier(w, current, i);
      break;
    case Kind::CLUSTER_BARRIER:
      cluster_barrier(w, current, i);
      break;
  }
}

}  // namespace ptx
