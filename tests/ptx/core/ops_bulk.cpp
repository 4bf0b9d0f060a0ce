// mbarriers and cp.async.bulk, with tensor maps.
//
// A bulk copy that loads is done as late as its mbarrier allows: when a wait is about to find the phase incomplete for
// its bytes alone. Until then its destination may not be touched. A copy that stores is done when a wait for its group
// says so, or at the end of the block; until it is read its source may not be written. Copies are accesses of the async
// proxy: what another proxy wrote needs a fence.proxy.async before.
//
// A wait acquires for all lanes of its warp, though one of them may have executed it.
//
// Across a cluster: a multicast is a copy for each block of its mask, with that block's mbarrier. Copies from shared
// memory to another block's, and st.async, are loads too, done as late.
#include "memory.h"
#include "register.h"

namespace ptx {

namespace {

constexpr u32 UNIT = 16;  // bytes: what a swizzle moves

// ---- mbarriers -------------------------------------------------------------------------------------------------

u32 place_of(Block& b, Warp& w, const Operand& o, int lane, i64 offset, bool across = false) {
  return b.place_of(w, lane, address_of(w, o, lane) + u64(offset), across);
}

// Whether the block of a place of shared memory can be touched.
bool reaches(Block& b, Warp& w, int lane, u32 place, bool visits) {
  const u32 rank = b.rank_of(place);
  const auto [kind, why] =
      rank < b.ranks ? b.unreachable(w, lane, rank, visits) : std::pair<const char*, const char*>{};
  if (!kind) return true;
  b.find(kind, w, lane, "uses shared memory of block " + std::to_string(b.number(b.id, rank)) + why);
  return false;
}

// nullptr after a finding.
Signal* signal_at(Block& b, Warp& w, int lane, u32 place) {
  if (place == NOWHERE) return nullptr;
  auto found = b.signals.find(place);
  if (found == b.signals.end()) {
    const u32 rank = b.rank_of(place);
    b.find("async", w, lane,
           "no mbarrier was initialised at offset " + std::to_string(b.offset_of(place)) + " of shared memory" +
               (rank == w.rank || rank >= b.ranks ? "" : " of block " + std::to_string(b.number(b.id, rank))));
    return nullptr;
  }
  Signal& s = found->second;
  const u32 maker = thread_of(s.made);
  const bool own = maker / LANES == w.id, fenced = s.fenced && s.fenced_phase < w.phases;
  const u32 known = own ? w.lanes_known : w.known[maker / LANES];
  if (!(own && int(maker % LANES) == lane) && time_of(s.made) >= known && !fenced) {
    b.find("race", w, lane,
           "uses an mbarrier that thread " + std::to_string(maker % (b.block_warps * LANES)) +
               " initialised, and nothing orders the two");
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
    const u32 address = place_of(b, w, i.ops[0], lane, i.imm), count = get<u32>(w.at(i.ops[1]), lane);
    if (address == NOWHERE) return;
    Access access{b, w, i, lane, PLACE, address, 8};
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
    const u32 address = place_of(b, w, i.ops[0], lane, i.imm);
    if (!signal_at(b, w, lane, address)) return;
    b.signals.erase(address);
    memset(&b.shared_state[address], UNWRITTEN, 8);
  });
}

// Results: [the state]. Sources: address, [arrivals or bytes]. aux[0]: 1 arrives, 2 the source is bytes expected;
// aux[1]: relaxed; aux[2]: of any block of the cluster.
void arrive(Block& b, Warp& w, const Ins& i, u32 mask) {
  const Operand* s = i.ops + i.nd;
  if (b.undefined(w, s[0], mask, "an address")) return;
  if (i.ns > 1 && b.undefined(w, s[1], mask, "a count")) return;
  const bool arrives = i.aux[0] & 1, expects = i.aux[0] & 2;
  for_lanes(mask, [&](int lane) {
    const u32 place = place_of(b, w, s[0], lane, i.imm, i.aux[2]);
    if (place == NOWHERE || !reaches(b, w, lane, place, true)) return;
    Signal* signal = signal_at(b, w, lane, place);
    if (!signal) return;
    const u32 now = b.tick();
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
    } else {
      join(signal->known, w.fenced);
    }
    signal->missing -= count, ++b.events;
    complete_phase(b, *signal);
  });
}

// A copy from shared memory reads it when it completes, which another warp's wait says.
void read_for_copy(Block& b, u32 place, u32 bytes, u8* value, u32& undefined, Entry entry, u32 pc) {
  --b.reading[place / UNIT];
  memcpy(value, &b.shared[place], bytes);
  for (u32 k = 0; k < bytes; ++k) {
    undefined |= u32(b.shared_state[place + k] == UNDEFINED) << k;
    if (!b.shared_shadow.writer) continue;
    auto& reader = b.shared_shadow.reader[place + k] ? b.shared_shadow.reader2 : b.shared_shadow.reader;
    reader[place + k] = entry;
    b.shared_shadow.reader_pc[place + k] = pc;
  }
}

void load_now(Block& b, const BulkCopy& copy) {
  Warp& w = b.warps[copy.warp];
  const Ins& ins = b.program.code[copy.pc];
  const u32 pc = b.pc;
  b.pc = copy.pc;
  const u32 time = b.tick();
  const Entry entry = make_entry(time, b.id, u32(b.warps.size()) * LANES, 0);
  const u8* values = copy.data.data();
  for (const Piece& p : copy.pieces) {
    u8 value[UNIT] = {};
    u32 undefined = 0;
    if (copy.source == Source::VALUES) {
      memcpy(value, values, p.bytes);
      values += p.bytes;
    } else if (copy.source == Source::SHARED_MEMORY) {
      read_for_copy(b, u32(p.other), p.bytes, value, undefined, entry, copy.pc);
    } else if (p.other) {
      Access{b, w, ins, int(copy.lane), GLOBAL, p.other, p.bytes}.load(value, undefined, 1);
    }
    memcpy(&b.shared[p.shared], value, p.bytes);
    for (u32 k = 0; k < p.bytes; ++k) {
      b.shared_state[p.shared + k] = undefined >> k & 1 ? UNDEFINED : WRITTEN;
      if (!b.shared_shadow.writer) continue;
      b.shared_shadow.writer[p.shared + k] = entry;
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
    const u32 address = place_of(b, w, i.ops[1], lane, i.imm);
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

// Of a copy that an mbarrier completes: the places of the mbarriers, by the blocks of the mask or the destination's.
// Empty after a finding.
std::vector<std::pair<u32, u32>> destinations(Block& b, Warp& w, int lane, u32 to, u32 signal, const u32* targets) {
  std::vector<std::pair<u32, u32>> out;
  if (to == NOWHERE || signal == NOWHERE) return out;
  if (!targets) {
    if (b.rank_of(to) != b.rank_of(signal)) {
      b.find("async", w, lane, "the mbarrier of a copy lies in another block than its destination");
      return out;
    }
    out.emplace_back(to, signal);
    return out;
  }
  const u32 all = *targets & 0xffff;
  if (!all || all >> b.ranks) {
    b.find("bounds", w, lane,
           "a multicast to the blocks of mask " + hex(all) + ", in a cluster of " + std::to_string(b.ranks));
    return out;
  }
  for (u32 rank = 0; rank < b.ranks; ++rank) {
    if (all >> rank & 1) out.emplace_back(b.place(rank, b.offset_of(to)), b.place(rank, b.offset_of(signal)));
  }
  return out;
}

// False after a finding.
bool can_signal(Block& b, Warp& w, int lane, const BulkCopy& copy) {
  if (!reaches(b, w, lane, copy.signal, false)) return false;
  const Signal* s = signal_at(b, w, lane, copy.signal);
  if (s && !s->fenced && copy.source != Source::VALUES) {
    b.find("async", w, lane, "an mbarrier without a fence.mbarrier_init or fence.proxy.async after its initialisation");
  }
  return s;
}

// Begins a copy, after its checks.
void begin(Block& b, Warp& w, const Ins& i, int lane, BulkCopy copy) {
  if (copy.load && !can_signal(b, w, lane, copy)) return;
  for (const Piece& p : copy.pieces) {
    Access access{b, w, i, lane, PLACE, p.shared, p.bytes};
    u8 value[UNIT];
    u32 undefined;
    if (copy.load) {
      Range range;
      if (!access.locate(range, true, 1)) return;
      if (copy.source != Source::VALUES && !access.check_proxy()) return;
      if (range.shadow) access.check_write(range, nullptr, 0);
      if (copy.source == Source::SHARED_MEMORY) {
        const Access from{b, w, i, lane, PLACE, p.other, p.bytes};
        Range source;  // it is read when the copy completes: this thread has not read it
        if (!from.locate(source, false, 1) || !from.check_proxy()) return;
        if (std::count(source.state, source.state + p.bytes, UNWRITTEN)) {
          b.hold("uninitialised", w, lane, "reads " + from.where() + ", which nothing wrote");
        }
        ++b.reading[p.other / UNIT];
      }
    } else {
      if (!access.load(value, undefined, 1) || !access.check_proxy()) return;
      ++b.reading[p.shared / UNIT];
    }
    if (copy.source != Source::GLOBAL_MEMORY || !p.other) continue;
    Range range;
    if (!Access{b, w, i, lane, GLOBAL, p.other, p.bytes}.locate(range, !copy.load, 1)) return;
  }
  for (const Piece& p : copy.pieces) {
    if (copy.load) memset(&b.shared_state[p.shared], PENDING, p.bytes);
  }
  b.bulk.push_back(std::move(copy));
}

constexpr u32 LOAD = 1, FROM_SHARED = 2, MULTICAST = 4;

// Sources: shared address, global address or tensor map (or the shared address that is read), mbarrier (of a load),
// bytes or coordinates, [the mask of a multicast]. aux[0]: LOAD, FROM_SHARED, MULTICAST; aux[1]: rank, 0 without a
// tensor map; aux[2..4]: offsets of the addresses: shared, other, mbarrier
void bulk(Block& b, Warp& w, const Ins& i, u32 mask) {
  const bool load = i.aux[0] & LOAD, from_shared = i.aux[0] & FROM_SHARED;
  const u32 rank = i.aux[1], first = load ? 3 : 2;
  for (u32 k = 0; k < i.ns; ++k) {
    if (b.undefined(w, i.ops[k], mask, k < first ? "an address" : "the size or place of a copy")) return;
  }
  if (b.warps.size() >= MOST_WARPS) {
    b.find("trap", w, std::countr_zero(mask),
           "a bulk copy in a cluster of 4096 threads, which the interpreter does not know");
    throw Stop{};
  }
  for_lanes(mask, [&](int lane) {
    BulkCopy copy{w.id, u32(lane), b.pc};
    copy.load = load, copy.source = from_shared ? Source::SHARED_MEMORY : Source::GLOBAL_MEMORY;
    copy.group = w.bulk_group[lane];
    const u32 shared = place_of(b, w, i.ops[0], lane, i32(i.aux[2]), load);
    if (shared == NOWHERE) return;
    const u64 other = from_shared ? place_of(b, w, i.ops[1], lane, i32(i.aux[3]))
                                  : address_of(w, i.ops[1], lane) + u64(i64(i32(i.aux[3])));
    if (from_shared && other == NOWHERE) return;
    const u32 alignment = rank ? 128 : UNIT;
    if (shared % alignment) {
      b.find("alignment", w, lane,
             "a bulk copy at offset " + std::to_string(b.offset_of(shared)) + " of shared memory: not aligned to " +
                 std::to_string(alignment));
      return;
    }
    if (rank) {
      TensorMap map;
      if (!read_map(b, w, i, lane, other, rank, map)) return;
      i32 start[5] = {};
      for (u32 k = 0; k < rank; ++k) start[k] = get<i32>(w.at(i.ops[first + k]), lane);
      copy.pieces = tile(map, start, shared);
      if (!load) std::erase_if(copy.pieces, [](const Piece& p) { return !p.other; });
    } else {
      const u32 bytes = get<u32>(w.at(i.ops[first]), lane);
      if (bytes % UNIT || other % UNIT) {
        b.find("alignment", w, lane,
               "a bulk copy of " + std::to_string(bytes) + " bytes at " + hex(other) + ": not multiples of 16");
        return;
      }
      for (u32 k = 0; k < bytes; k += UNIT) copy.pieces.push_back({shared + k, other + k, UNIT});
    }
    if (!load) return begin(b, w, i, lane, std::move(copy));
    const u32 targets = i.aux[0] & MULTICAST ? get<u32>(w.at(i.ops[i.ns - 1]), lane) : 0;
    const u32 signal = place_of(b, w, i.ops[2], lane, i32(i.aux[4]), true);
    for (auto [to, its_signal] : destinations(b, w, lane, shared, signal, i.aux[0] & MULTICAST ? &targets : nullptr)) {
      BulkCopy one = copy;
      one.signal = its_signal;
      for (Piece& p : one.pieces) p.shared += to - shared;
      begin(b, w, i, lane, std::move(one));
    }
  });
}

// st.async. Sources: address, mbarrier, values. imm, aux[0]: offsets of the addresses; aux[1]: bytes of a value
void store_async(Block& b, Warp& w, const Ins& i, u32 mask) {
  for (u32 k = 0; k < i.ns; ++k) {
    if (b.undefined(w, i.ops[k], mask, k < 2 ? "an address" : "the value of st.async")) return;
  }
  const u32 size = i.aux[1], bytes = size * u32(i.ns - 2);
  for_lanes(mask, [&](int lane) {
    BulkCopy copy{w.id, u32(lane), b.pc};
    copy.load = true, copy.source = Source::VALUES;
    const u32 to = place_of(b, w, i.ops[0], lane, i.imm, true);
    const u32 signal = place_of(b, w, i.ops[1], lane, i32(i.aux[0]), true);
    if (to != NOWHERE && to % bytes) {
      b.find("alignment", w, lane,
             "st.async at offset " + std::to_string(b.offset_of(to)) + " of shared memory: not aligned to " +
                 std::to_string(bytes));
      return;
    }
    if (destinations(b, w, lane, to, signal, nullptr).empty()) return;
    copy.signal = signal;
    copy.pieces.push_back({to, 0, bytes});
    for (u32 k = 2; k < i.ns; ++k) {
      const u64 value = i.ops[k].width == 8 ? get<u64>(w.at(i.ops[k]), lane) : get<u32>(w.at(i.ops[k]), lane);
      const u8* from = reinterpret_cast<const u8*>(&value);
      copy.data.insert(copy.data.end(), from, from + size);
    }
    begin(b, w, i, lane, std::move(copy));
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
    Access{b, w, b.program.code[copy.pc], int(copy.lane), PLACE, p.shared, p.bytes}.load(value, undefined, 1);
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
    Access{b, b.warps[copy.warp], ins, int(copy.lane), GLOBAL, p.other, p.bytes}.store(from, 0, 1);
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
    if (s.fenced || !(own || time_of(s.made) < w.known[maker / LANES])) continue;
    s.fenced = true, s.fenced_phase = w.phases;
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
    text += "; the one at offset " + std::to_string(offset_of(address)) +
            (ranks > 1 ? " of block " + std::to_string(number(id, rank_of(address))) : "") + " misses " +
            std::to_string(s.missing) + " of " + std::to_string(s.count) + " arrivals and " + std::to_string(s.bytes) +
            " bytes";
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
  add("st.async", store_async, Kind::MEMORY, nullptr, true);
  add("cp.async.bulk.commit_group", commit_bulk);
  add("cp.async.bulk.wait_group", wait_bulk, Kind::MEMORY);
}

}  // namespace ptx
