// mbarriers and cp.async.bulk, with tensor maps.
//
// A bulk copy that loads is done as late as its mbarrier allows: when a wait is about to find the phase incomplete for
// its bytes alone. Until then its destination may not be touched. A copy that stores is done when a wait for its group
// says so, or at the end of the block; until it is read its source may not be written. Copies are accesses of the async
// proxy: what another proxy wrote needs a fence.proxy.async before.
//
// A wait acquires for all lanes of its warp, though one of them may have executed it.
#include <algorithm>

#include "memory.h"
#include "register.h"

namespace ptx {

namespace {

constexpr u32 UNIT = 16;  // bytes: what a swizzle moves

void join(std::vector<u32>& to, const std::vector<u32>& from) {
  to.resize(std::max(to.size(), from.size()));
  for (size_t k = 0; k < from.size(); ++k) to[k] = std::max(to[k], from[k]);
}

// ---- mbarriers -------------------------------------------------------------------------------------------------

u32 shared_address(Warp& w, const Operand& o, int lane, i64 offset) {
  return u32((address_of(w, o, lane) + u64(offset)) % WINDOW_BYTES);
}

// nullptr after a finding.
Signal* signal_at(Block& b, Warp& w, int lane, u32 address) {
  auto found = b.signals.find(address);
  if (found == b.signals.end()) {
    b.find("async", w, lane, "no mbarrier was initialised at offset " + std::to_string(address) + " of shared memory");
    return nullptr;
  }
  Signal& s = found->second;
  const u32 maker = thread_of(s.made);
  const bool own = maker / LANES == w.id;
  const u32 known = own ? w.lanes_known : w.known[maker / LANES];
  if (!(own && int(maker % LANES) == lane) && time_of(s.made) >= known) {
    b.find("race", w, lane,
           "uses an mbarrier that thread " + std::to_string(maker) + " initialised, and nothing orders the two");
  }
  return &s;
}

void complete_phase(Block& b, Signal& s) {
  if (s.missing || s.bytes) return;
  ++s.phase, ++b.events;
  s.missing = s.count;
  join(s.passed_known, s.known), join(s.passed_proxied, s.proxied);
}

// Sources: address, count. imm: offset of the address.
void init(Block& b, Warp& w, const Ins& i, u32 mask) {
  if (b.undefined(w, i.ops[0], mask, "an address") || b.undefined(w, i.ops[1], mask, "a count")) return;
  for_lanes(mask, [&](int lane) {
    const u32 address = shared_address(w, i.ops[0], lane, i.imm), count = get<u32>(w.at(i.ops[1]), lane);
    Access access{b, w, i, lane, SHARED, address, 8};
    if (count == 0 || count >= 1u << 20) {
      b.find("async", w, lane, "an mbarrier that counts " + std::to_string(count) + " arrivals: expected 1 to 1048575");
      return;
    }
    u8 value[8] = {};
    if (!access.store(value, 0, 8)) return;
    memset(&b.shared_state[address], SIGNAL, 8);
    b.touched = true;
    Signal& s = b.signals[address] = Signal{};
    s.count = s.missing = count;
    s.made = make_entry(b.time, b.id, w.id * LANES + u32(lane), 0);
    s.known.assign(w.known.size(), 0);
  });
}

void invalidate(Block& b, Warp& w, const Ins& i, u32 mask) {
  if (b.undefined(w, i.ops[0], mask, "an address")) return;
  for_lanes(mask, [&](int lane) {
    const u32 address = shared_address(w, i.ops[0], lane, i.imm);
    if (!signal_at(b, w, lane, address)) return;
    b.signals.erase(address);
    memset(&b.shared_state[address], UNWRITTEN, 8);
  });
}

// Results: [the state]. Sources: address, [arrivals or bytes]. aux[0]: 1 arrives, 2 the source is bytes expected;
// aux[1]: relaxed.
void arrive(Block& b, Warp& w, const Ins& i, u32 mask) {
  const Operand* s = i.ops + i.nd;
  if (b.undefined(w, s[0], mask, "an address")) return;
  if (i.ns > 1 && b.undefined(w, s[1], mask, "a count")) return;
  const bool arrives = i.aux[0] & 1, expects = i.aux[0] & 2;
  const u32 now = b.tick();
  for_lanes(mask, [&](int lane) {
    Signal* signal = signal_at(b, w, lane, shared_address(w, s[0], lane, i.imm));
    if (!signal) return;
    const u32 number = i.ns > 1 ? get<u32>(w.at(s[1]), lane) : 1, count = expects ? 1 : number;
    if (expects) signal->bytes += number;
    if (i.nd) {
      put<u64>(w.at(i.ops[0]), lane, u64(signal->phase));
      w.set_undefined(i.ops[0], lane, 0, 0);
    }
    if (!arrives) return;
    if (count == 0 || count > signal->missing) {
      b.find("async", w, lane,
             std::to_string(count) + " arrivals at an mbarrier that misses " + std::to_string(signal->missing) +
                 " of the " + std::to_string(signal->count) + " of its phase");
      throw Stop{};
    }
    if (!i.aux[1]) {
      join(signal->known, w.known), join(signal->proxied, w.proxied);
      signal->known[w.id] = std::max(signal->known[w.id], now);
    }
    signal->missing -= count, ++b.events;
    complete_phase(b, *signal);
  });
}

void load_now(Block& b, const BulkCopy& copy) {
  Warp& w = b.warps[copy.warp];
  const Ins& ins = b.program.code[copy.pc];
  const u32 pc = b.pc;
  b.pc = copy.pc;
  const u32 time = b.tick();
  for (const Piece& p : copy.pieces) {
    u8 value[UNIT] = {};
    u32 undefined = 0;
    if (p.global) Access{b, w, ins, int(copy.lane), GLOBAL, p.global, p.bytes}.load(value, undefined, 1);
    memcpy(&b.shared[p.shared], value, p.bytes);
    for (u32 k = 0; k < p.bytes; ++k) {
      b.shared_state[p.shared + k] = undefined >> k & 1 ? UNDEFINED : WRITTEN;
      if (!b.shared_shadow.writer) continue;
      b.shared_shadow.writer[p.shared + k] = make_entry(time, b.id, u32(b.warps.size()) * LANES, 0);
      b.shared_shadow.writer_pc[p.shared + k] = copy.pc;
      b.shared_shadow.reader[p.shared + k] = 0;
      b.shared_shadow.reader2[p.shared + k] = 0;
    }
  }
  b.touched = true;
  b.pc = pc;
}

u32 size_of(const BulkCopy& copy) {
  u32 bytes = 0;
  for (const Piece& p : copy.pieces) bytes += p.bytes;
  return bytes;
}

// Copies for a phase that lacks nothing but bytes.
void bring(Block& b, u32 address, Signal& s) {
  std::erase_if(b.bulk, [&](const BulkCopy& copy) {
    if (!copy.load || copy.signal != address) return false;
    load_now(b, copy);
    s.bytes -= size_of(copy), ++b.events;
    return true;
  });
  s.known.back() = std::max(s.known.back(), b.tick());
}

// Result: a predicate. Sources: address, the state or the parity. aux[0]: 1 parity, 2 relaxed
void wait(Block& b, Warp& w, const Ins& i, u32 mask) {
  const Operand& d = i.ops[0];
  if (b.undefined(w, i.ops[1], mask, "an address") || b.undefined(w, i.ops[2], mask, "a phase")) return;
  u32 done = 0;
  for_lanes(mask, [&](int lane) {
    const u32 address = shared_address(w, i.ops[1], lane, i.imm);
    Signal* s = signal_at(b, w, lane, address);
    if (!s) return;
    auto passed = [&] {
      if (i.aux[0] & 1) return (s->phase & 1) != (get<u32>(w.at(i.ops[2]), lane) & 1);
      return u64(s->phase) > get<u64>(w.at(i.ops[2]), lane);
    };
    if (!passed() && !s->missing) {
      bring(b, address, *s);
      complete_phase(b, *s);
    }
    if (!passed()) {
      b.waiting = true;
      return;
    }
    done |= 1u << lane;
    if (i.aux[0] & 2) return;
    join(w.known, s->passed_known);
    if (!w.proxied.empty()) join(w.proxied, s->passed_proxied);
    b.tick();
  });
  u32* words = w.at(d);
  *words = (*words & ~mask) | done;
  w.undef[d.reg] &= ~mask;
}

// ---- bulk copies -----------------------------------------------------------------------------------------------

// What ptx.tensor_map makes: a map for cp.async.bulk.tensor. The driver's own is not documented.
struct TensorMap {
  u64 magic, address;
  u32 rank, element;         // bytes
  u64 sizes[5], strides[5];  // elements; bytes, the first is `element`
  u32 box[5];
  u32 swizzle;  // bytes of a pattern's row, or 0
};
static_assert(sizeof(TensorMap) <= 128);
constexpr u64 MAGIC = 0x70616d2d787470ull;

u32 swizzled(u32 address, u32 width) {
  return width ? address ^ ((address >> 3) & (width - 1) & ~(UNIT - 1)) : address;
}

// The pieces of a box whose first element has these coordinates.
std::vector<Piece> tile(const TensorMap& map, const i32* start, u32 shared) {
  std::vector<Piece> pieces;
  u32 rows = 1;
  for (u32 k = 1; k < map.rank; ++k) rows *= map.box[k];
  const u32 row_bytes = map.box[0] * map.element;
  for (u32 row = 0; row < rows; ++row) {
    u64 global = map.address;
    bool inside = true;
    for (u32 k = 1, left = row; k < map.rank; left /= map.box[k], ++k) {
      i64 at = i64(start[k]) + left % map.box[k];
      inside &= at >= 0 && u64(at) < map.sizes[k];
      global += u64(at) * map.strides[k];
    }
    for (u32 byte = 0; byte < row_bytes; byte += UNIT) {
      const u32 to = swizzled(shared + row * row_bytes + byte, map.swizzle);
      const i64 first = start[0] + i64(byte / map.element), many = UNIT / map.element;
      const u64 from = global + u64(first) * map.element;
      if (!inside || first + many <= 0 || first >= i64(map.sizes[0])) {
        pieces.push_back({to, 0, UNIT});
      } else if (first >= 0 && first + many <= i64(map.sizes[0])) {
        pieces.push_back({to, from, UNIT});
      } else {
        for (i64 e = 0; e < many; ++e) {
          const bool in = first + e >= 0 && first + e < i64(map.sizes[0]);
          pieces.push_back({to + u32(e) * map.element, in ? from + u64(e) * map.element : 0, map.element});
        }
      }
    }
  }
  return pieces;
}

// False after a finding.
bool read_map(Block& b, Warp& w, const Ins& i, int lane, u64 address, u32 rank, TensorMap& map) {
  u8 bytes[128] = {};
  for (u32 k = 0; k < 128; k += UNIT) {
    u32 undefined;
    if (!Access{b, w, i, lane, GENERIC, address + k, UNIT}.load(bytes + k, undefined, UNIT)) return false;
  }
  memcpy(&map, bytes, sizeof map);
  if (map.magic == MAGIC && map.rank == rank) return true;
  b.find("async", w, lane,
         map.magic == MAGIC ? "a tensor map of rank " + std::to_string(map.rank) + ", but the copy has " +
                                  std::to_string(rank) + " coordinates"
                            : "reads a tensor map where none is");
  return false;
}

// Sources: shared address, global address or tensor map, mbarrier (of a load), bytes or coordinates.
// aux[0]: 1 load; aux[1]: rank, 0 without a tensor map; aux[2..4]: offsets of the addresses: shared, global, mbarrier
void bulk(Block& b, Warp& w, const Ins& i, u32 mask) {
  const bool load = i.aux[0] & 1;
  const u32 rank = i.aux[1], first = load ? 3 : 2;
  for (u32 k = 0; k < i.ns; ++k) {
    if (b.undefined(w, i.ops[k], mask, k < first ? "an address" : "the size or place of a copy")) return;
  }
  if (b.warps.size() == LANES) {
    b.find("trap", w, std::countr_zero(mask),
           "a bulk copy in a block of 1024 threads, which the interpreter does not know");
    throw Stop{};
  }
  for_lanes(mask, [&](int lane) {
    BulkCopy copy{w.id, u32(lane), b.pc, load, 0, w.bulk_group[lane], false, {}, {}};
    const u32 shared = shared_address(w, i.ops[0], lane, i32(i.aux[2]));
    const u64 global = address_of(w, i.ops[1], lane) + u64(i64(i32(i.aux[3])));
    const u32 alignment = rank ? 128 : UNIT;
    if (shared % alignment) {
      b.find("alignment", w, lane,
             "a bulk copy at offset " + std::to_string(shared) + " of shared memory: not aligned to " +
                 std::to_string(alignment));
      return;
    }
    if (rank) {
      TensorMap map;
      if (!read_map(b, w, i, lane, global, rank, map)) return;
      i32 start[5] = {};
      for (u32 k = 0; k < rank; ++k) start[k] = get<i32>(w.at(i.ops[first + k]), lane);
      copy.pieces = tile(map, start, shared);
      if (!load) std::erase_if(copy.pieces, [](const Piece& p) { return !p.global; });
    } else {
      const u32 bytes = get<u32>(w.at(i.ops[first]), lane);
      if (bytes % UNIT || global % UNIT) {
        b.find("alignment", w, lane,
               "a bulk copy of " + std::to_string(bytes) + " bytes at " + hex(global) + ": not multiples of 16");
        return;
      }
      for (u32 k = 0; k < bytes; k += UNIT) copy.pieces.push_back({shared + k, global + k, UNIT});
    }
    if (load) {
      copy.signal = shared_address(w, i.ops[2], lane, i32(i.aux[4]));
      Signal* s = signal_at(b, w, lane, copy.signal);
      if (!s) return;
      if (!s->fenced) {
        b.find("async", w, lane,
               "an mbarrier without a fence.mbarrier_init or fence.proxy.async after its initialisation");
      }
    }
    for (const Piece& p : copy.pieces) {
      Access access{b, w, i, lane, SHARED, p.shared, p.bytes};
      if (load) {
        Range range;
        if (!access.locate(range, true, 1) || !access.check_proxy()) return;
        if (range.shadow) access.check_write(range, nullptr, 0);
      } else {
        u8 value[UNIT];
        u32 undefined;
        if (!access.load(value, undefined, 1) || !access.check_proxy()) return;
        ++b.reading[p.shared / UNIT];
      }
      if (!p.global) continue;
      Range range;
      if (!Access{b, w, i, lane, GLOBAL, p.global, p.bytes}.locate(range, !load, 1)) return;
    }
    for (const Piece& p : copy.pieces) {
      if (load) memset(&b.shared_state[p.shared], PENDING, p.bytes);
    }
    b.bulk.push_back(std::move(copy));
  });
}

void commit_bulk(Block&, Warp& w, const Ins&, u32 mask) {
  for_lanes(mask, [&](int lane) { ++w.bulk_group[lane]; });
}

// A store's shared memory may be written again.
void read_now(Block& b, BulkCopy& copy) {
  if (copy.read) return;
  copy.read = true;
  Warp& w = b.warps[copy.warp];
  const u32 pc = b.pc;
  b.pc = copy.pc;
  for (const Piece& p : copy.pieces) {
    --b.reading[p.shared / UNIT];
    u8 value[UNIT];
    u32 undefined;
    Access{b, w, b.program.code[copy.pc], int(copy.lane), SHARED, p.shared, p.bytes}.load(value, undefined, 1);
    if (undefined) b.find("unset register", w, int(copy.lane), "copies undefined values to global memory");
    copy.data.insert(copy.data.end(), value, value + p.bytes);
  }
  b.pc = pc;
}

void store_now(Block& b, BulkCopy& copy) {
  read_now(b, copy);
  const u32 pc = b.pc;
  b.pc = copy.pc;
  const u8* from = copy.data.data();
  for (const Piece& p : copy.pieces) {
    const Ins& ins = b.program.code[copy.pc];
    Access{b, b.warps[copy.warp], ins, int(copy.lane), GLOBAL, p.global, p.bytes}.store(from, 0, 1);
    from += p.bytes;
  }
  b.pc = pc;
}

// imm: groups that may stay under way; aux[0]: 1 their shared memory is read, though they may not be done
void wait_bulk(Block& b, Warp& w, const Ins& i, u32 mask) {
  std::erase_if(b.bulk, [&](BulkCopy& copy) {
    const bool mine = !copy.load && copy.warp == w.id && mask >> copy.lane & 1;
    if (!mine || copy.group + u32(i.imm) >= w.bulk_group[copy.lane]) return false;
    if (i.aux[0]) {
      read_now(b, copy);
      return false;
    }
    store_now(b, copy);
    return true;
  });
}

}  // namespace

void fence_signals(Block& b, Warp& w, const Ins&, u32 mask) {
  for (auto& [address, s] : b.signals) {
    const u32 maker = thread_of(s.made);
    const bool own = maker / LANES == w.id && (mask >> maker % LANES & 1 || time_of(s.made) < w.lanes_known);
    s.fenced |= own || time_of(s.made) < w.known[maker / LANES];
  }
}

bool Block::is_bulk(u64 shared) const {
  for (const BulkCopy& copy : bulk) {
    if (!copy.load) continue;
    for (const Piece& p : copy.pieces) {
      if (shared + UNIT > p.shared && shared < p.shared + p.bytes) return true;
    }
  }
  return false;
}

// Every warp waits for an mbarrier whose phase nothing will complete.
void Block::starve() {
  std::string text;
  for (auto& [address, s] : signals) {
    if (text.size() > 600 || (!s.bytes && s.missing == s.count)) continue;
    text += "; the one at offset " + std::to_string(address) + " misses " + std::to_string(s.missing) + " of " +
            std::to_string(s.count) + " arrivals and " + std::to_string(s.bytes) + " bytes";
  }
  for (const Warp& w : warps) {
    if (w.splits.empty()) continue;
    pc = w.splits[0].pc;
    find("divergence", w, std::countr_zero(w.splits[0].mask),
         "threads wait for phases of mbarriers that nothing completes" + text);
    throw Stop{};
  }
}

// A load without a wait never ends. A store may end after its block, but its shared memory is gone then.
void Block::finish_bulk() {
  for (BulkCopy& copy : bulk) {
    pc = copy.pc;
    if (copy.load || !copy.read) {
      find("async", warps[copy.warp], int(copy.lane),
           copy.load ? "the block ends while this copy is under way: wait for its mbarrier first"
                     : "the block ends while this copy reads its shared memory: wait for its group first");
    }
    if (!copy.load) store_now(*this, copy);
  }
}

void register_bulk() {
  add("mbarrier.init", init, Kind::MEMORY);
  add("mbarrier.inval", invalidate, Kind::MEMORY);
  add("mbarrier.arrive", arrive, Kind::MEMORY);
  add("mbarrier.wait", wait, Kind::MEMORY);
  add("fence.mbarrier_init", fence_signals, Kind::MEMORY);
  add("cp.async.bulk", bulk, Kind::MEMORY, nullptr, true);
  add("cp.async.bulk.commit_group", commit_bulk);
  add("cp.async.bulk.wait_group", wait_bulk, Kind::MEMORY);
}

}  // namespace ptx
