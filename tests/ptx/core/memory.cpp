// Address spaces, and the checks of every access: bounds, alignment, initialisation, races.
#include "memory.h"

#include <algorithm>

namespace ptx {

namespace {

const char* SPACE_NAMES[] = {"global", "shared", "local", "parameter"};

bool ordered(const Block& b, const Warp& w, int lane, Entry e) {
  if (block_of(e) != (b.id & 0xfffff)) {
    auto known = b.known.find(block_of(e));
    return known != b.known.end() && time_of(e) < known->second;
  }
  u32 thread = thread_of(e), warp = thread / LANES, other = thread % LANES;
  if (warp != w.id) return time_of(e) < w.known[warp];
  if (int(other) == lane) return true;
  u32 known = w.lanes_known;
  if (w.pairs_known) known = std::max(known, (*w.pairs_known)[lane][other]);
  return time_of(e) < known;
}

std::string thread_name(const Block& b, const Warp& w, Entry e) {
  const u32 cluster = block_of(e), warp = thread_of(e) / LANES;
  if (warp == b.warps.size() && cluster == (b.id & 0xfffff)) return "a bulk copy";
  const u32 rank = std::min(warp / b.block_warps, b.ranks - 1);
  std::string name = "thread " + std::to_string(thread_of(e) - rank * b.block_warps * LANES);
  if (cluster == (b.id & 0xfffff) && rank == w.rank) return name;
  return name + " of block " + std::to_string(b.number(cluster, rank));
}

}  // namespace

std::string hex(u64 v) {
  char text[24];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

std::string Access::where() const {
  std::string text = std::to_string(bytes) + " byte" + (bytes == 1 ? "" : "s");
  u32 at = space;
  u64 offset = address;
  if (at == GENERIC) {
    u64 window = address / WINDOW_BYTES * WINDOW_BYTES;
    at = window == SHARED_WINDOW ? SHARED : window == LOCAL_WINDOW ? LOCAL : window == PARAM_WINDOW ? PARAM : GLOBAL;
    if (at != GLOBAL) offset -= window;
  }
  if (at == SHARED || at == CLUSTER || at == PLACE) {
    const u64 part = at == PLACE ? block.rank_of(u32(offset)) + 1 : offset >> RANK_SHIFT;
    const bool mapped = part && part <= block.ranks;
    if (at == PLACE) offset = block.offset_of(u32(offset));
    if (at != PLACE && mapped) offset &= (u64(1) << RANK_SHIFT) - 1;
    text += " of shared memory at offset " + std::to_string(i64(offset));
    return mapped && part - 1 != warp.rank ? text + " of block " + std::to_string(block.number(block.id, u32(part - 1)))
                                           : text;
  }
  if (at != GLOBAL) return text + " of " + SPACE_NAMES[at] + " memory at offset " + std::to_string(i64(offset));
  // The buffer it lies in, or the nearest one.
  const Buffer* nearest = nullptr;
  u64 distance = ~0ull;
  for (const Buffer& buffer : block.launch.buffers) {
    u64 d = address < buffer.begin ? buffer.begin - address : address >= buffer.end ? address - buffer.end + 1 : 0;
    if (d < distance) nearest = &buffer, distance = d;
  }
  if (!nearest || distance > (1u << 30)) return text + " of global memory at " + hex(address);
  u64 size = nearest->end - nearest->begin;
  return text + " at byte " + std::to_string(i64(address - nearest->begin)) + " of " + nearest->name + " (" +
         std::to_string(size) + " bytes)";
}

bool Access::locate(Range& range, bool write, u32 alignment) const {
  auto fail = [&](const char* kind, const std::string& why) {
    block.find(kind, warp, lane, (write ? "writes " : "reads ") + where() + why);
    return false;
  };
  if (address % alignment) return fail("alignment", ": not aligned to " + std::to_string(alignment));
  u32 at = space;
  u64 a = address;
  if (at == GENERIC) {
    at = GLOBAL;
    if (a >= SHARED_WINDOW && a < PARAM_WINDOW + WINDOW_BYTES) {
      at = a < LOCAL_WINDOW ? SHARED : a < PARAM_WINDOW ? LOCAL : PARAM;
      a %= WINDOW_BYTES;
    }
  }
  switch (at) {
    case GLOBAL: {
      auto& buffers = block.launch.buffers;
      u32& hint = block.hints[block.pc];
      if (hint >= buffers.size() || a < buffers[hint].begin || a >= buffers[hint].end) {
        auto after = std::upper_bound(buffers.begin(), buffers.end(), a,
                                      [](u64 v, const Buffer& buffer) { return v < buffer.begin; });
        if (after == buffers.begin() || a >= (after - 1)->end) return fail("bounds", ": outside every buffer");
        hint = u32(after - buffers.begin()) - 1;
      }
      Buffer& buffer = buffers[hint];
      if (bytes > buffer.end - a) return fail("bounds", ": it runs past the end");
      if (write && !buffer.writable) return fail("bounds", ", which is read-only");
      range.offset = a - buffer.begin;
      range.data = buffer.host + range.offset;
      range.state = buffer.state ? buffer.state + range.offset : nullptr;
      range.shadow = buffer.shadow.writer ? &buffer.shadow : nullptr;
      break;
    }
    case SHARED:
    case CLUSTER:
    case PLACE: {
      if (at != PLACE) {
        const u64 part = a >> RANK_SHIFT, rank = part ? part - 1 : warp.rank;
        const u64 offset = a & ((u64(1) << RANK_SHIFT) - 1);
        if (rank >= block.ranks && part <= 16) {
          return fail("bounds", ": the cluster has " + std::to_string(block.ranks) + " blocks");
        }
        if (rank >= block.ranks || offset > block.bytes || bytes > block.bytes - offset) {
          return fail("bounds", ": the block has " + std::to_string(block.bytes));
        }
        if (rank != warp.rank && space == SHARED) {
          return fail("bounds", " without .shared::cluster: it is another block's");
        }
        const auto [kind, why] = block.unreachable(warp, lane, u32(rank), true);
        if (kind) return fail(kind, why);
        a = block.place(u32(rank), offset);
      } else if (block.rank_of(u32(a)) >= block.ranks || block.offset_of(u32(a)) > block.bytes ||
                 bytes > block.bytes - block.offset_of(u32(a))) {
        return fail("bounds", ": the block has " + std::to_string(block.bytes));
      }
      if (write && !block.reading.empty()) {
        for (u64 unit = a / 16; unit <= (a + bytes - 1) / 16; ++unit) {
          if (block.reading[unit])
            return fail("async", " that a wgmma or a bulk copy is still reading: wait for its group first");
        }
      }
      range = {&block.shared[a], &block.shared_state[a], block.shared_shadow.writer ? &block.shared_shadow : nullptr, a,
               true};
      break;
    }
    case LOCAL: {
      u64 size = block.program.local_bytes;
      if (a > size || bytes > size - a) return fail("bounds", ": the thread has " + std::to_string(size));
      range.data = &warp.local[lane * size + a];
      range.state = &warp.local_state[lane * size + a];
      break;
    }
    default:
      if (write) return fail("bounds", ", which is read-only");
      if (a > block.launch.params.size() || bytes > block.launch.params.size() - a) {
        return fail("bounds", ": the kernel has " + std::to_string(block.launch.params.size()));
      }
      range.data = &block.launch.params[a];
  }
  if (range.state) {
    u8 any = 0;
    for (u32 k = 0; k < bytes; ++k) any |= range.state[k];
    if (any & HOLE) return fail("bounds", at == GLOBAL ? ": not part of the tensor" : ": outside every variable");
    if (any & SIGNAL) return fail("async", ", where an mbarrier is");
    if (any & PENDING) {
      return fail("async", block.is_bulk(range.offset)
                               ? " that a bulk copy is still writing: wait for its mbarrier first"
                               : " that a cp.async is still writing: wait for its group first");
    }
  }
  return true;
}

Entry Access::entry(Entry more) const {
  Entry strong = flags & VOLATILE ? flags & CTA ? STRONG | IN_BLOCK : STRONG : 0;
  return make_entry(block.time, block.id, warp.id * LANES + u32(lane), strong | more);
}

namespace {

bool same_thread(Entry a, Entry b) { return block_of(a) == block_of(b) && thread_of(a) == thread_of(b); }

// Both are atomic to each other.
bool both_strong(const Block& block, Entry a, Entry b) {
  const u32 threads = block.block_warps * LANES;
  const bool together = block_of(a) == block_of(b) && thread_of(a) / threads == thread_of(b) / threads;
  return a & b & STRONG && (together || !((a | b) & IN_BLOCK));
}

// How far apart two threads are: what orders close ones need not order distant ones.
int distance(Entry a, Entry b) {
  if (block_of(a) != block_of(b)) return 3;
  u32 x = thread_of(a), y = thread_of(b);
  return x / LANES != y / LANES ? 2 : x != y;
}

template <class T>
bool uniform(const Slot<T>* a, u64 n) {
  T differ = 0;
  for (u64 k = 1; k < n; ++k) differ |= a[k] ^ a[0];
  return !differ;
}

}  // namespace

// Blocks side by side: of two that touch a granule, the later one sees it here, whatever the timing. Then all of the
// launch is done over, in order. A claim: the writing block + 1 (21 bits) | the reading block + 1 (21) | several read.
void Access::claim(const Range& range, bool write) const {
  Shadow& s = *range.shadow;
  constexpr u64 ONE = (1u << 21) - 1;
  constexpr int WRITER = 1, READER = 22;
  u64 me = (block.id & 0xfffff) + 1;
  for (u64 k = range.offset >> s.shift; k <= (range.offset + bytes - 1) >> s.shift; ++k) {
    u64 old = s.claim[k];
    for (;;) {
      u64 writer = old >> WRITER & ONE, reader = old >> READER & ONE;
      if ((writer && writer != me) || (write && ((reader && reader != me) || old & 1))) {
        block.launch.contended = true;
        throw Stop{};
      }
      u64 next = write ? old | me << WRITER : reader && reader != me ? old | 1 : old | me << READER;
      if (next == old ||
          __atomic_compare_exchange_n(&s.claim[k].value, &old, next, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        break;
      }
    }
  }
}

void Access::check_read(const Range& range) const {
  Shadow& s = *range.shadow;
  if (s.claim) claim(range, false);
  block.touched = true;
  bool once = flags & NONCOHERENT;
  Entry mine = entry(once ? READ_ONLY : 0);
  u64 first = range.offset >> s.shift, n = ((range.offset + bytes - 1) >> s.shift) - first + 1;
  Slot<Entry>*writer = &s.writer[first], *reader = &s.reader[first], *reader2 = &s.reader2[first];

  auto visit = [&](u64 k, Entry& new_reader, Entry& new_reader2) {
    Entry w = writer[k];
    if (w && !both_strong(block, w, mine) && !(w & STRONG && w & SWAPPED)) {
      if (once || !ordered(block, warp, lane, w)) {
        block.find("race", warp, lane,
                   "reads " + where() + (once ? " with ld.global.nc, but the kernel writes it: " : ": ") +
                       (same_thread(w, mine) ? "the same thread" : thread_name(block, warp, w)) + " wrote it" +
                       (once ? "" : ", and nothing orders the two"),
                   -1, s.writer_pc[first + k]);
      }
    }
    auto stale = [&](Entry e) { return !e || same_thread(e, mine) || ordered(block, warp, lane, e); };
    new_reader = reader[k], new_reader2 = reader2[k];
    Entry keep = (new_reader | new_reader2) & READ_ONLY;
    if (stale(new_reader))
      new_reader = mine | keep;
    else if (stale(new_reader2) || distance(new_reader, mine) >= distance(new_reader, new_reader2))
      new_reader2 = mine | keep;
  };
  Slot<u32>* pcs = &s.reader_pc[first];
  if (uniform(writer, n) && uniform(reader, n) && uniform(reader2, n)) {
    Entry a, b;
    visit(0, a, b);
    if (a == reader[0] && b == reader2[0]) return;
    for (u64 k = 0; k < n; ++k) reader[k] = a, reader2[k] = b, pcs[k] = block.pc;
  } else {
    for (u64 k = 0; k < n; ++k) {
      Entry a, b;
      visit(k, a, b);
      reader[k] = a, reader2[k] = b, pcs[k] = block.pc;
    }
  }
}

void Access::check_write(const Range& range, const u8* in, u32 undefined) const {
  Shadow& s = *range.shadow;
  if (s.claim) claim(range, true);
  // Both compilers let several lanes store one value.
  auto same_value = [&] {
    if (!in || undefined || memcmp(in, range.data, bytes)) return false;
    for (u32 k = 0; range.state && k < bytes; ++k) {
      if (range.state[k] != WRITTEN) return false;
    }
    return true;
  };
  block.touched = true;
  bool swap = flags & SWAP;
  Entry mine = entry(swap ? SWAPPED : 0);
  u64 first = range.offset >> s.shift, n = ((range.offset + bytes - 1) >> s.shift) - first + 1;
  Slot<Entry>*writer = &s.writer[first], *reader = &s.reader[first], *reader2 = &s.reader2[first];

  auto visit = [&](u64 k) {
    for (auto [e, write] : {std::pair<Entry, bool>{writer[k], true}, {reader[k], false}, {reader2[k], false}}) {
      if (!e) continue;
      bool once = !write && e & READ_ONLY;
      if (!once && (both_strong(block, e, mine) || (swap && !write) || ordered(block, warp, lane, e))) continue;
      if (write && same_value()) continue;
      block.find("race", warp, lane,
                 "writes " + where() + ": " + thread_name(block, warp, e) + (write ? " wrote it" : " read it") +
                     (once ? " with ld.global.nc, which needs memory that the kernel does not write"
                           : ", and nothing orders the two"),
                 -1, write ? s.writer_pc[first + k] : s.reader_pc[first + k]);
    }
  };
  bool same = uniform(writer, n) && uniform(reader, n) && uniform(reader2, n);
  for (u64 k = 0; k < (same ? 1 : n); ++k) visit(k);
  Slot<u32>* pcs = &s.writer_pc[first];
  for (u64 k = 0; k < n; ++k) writer[k] = mine, reader[k] = 0, reader2[k] = 0, pcs[k] = block.pc;
}

bool Access::load(u8* out, u32& undefined, u32 alignment) const {
  Range range;
  undefined = 0;
  memset(out, 0, bytes);
  if (!locate(range, false, alignment)) return false;
  if (range.state) {
    bool unwritten = false;
    for (u32 k = 0; k < bytes; ++k) {
      unwritten |= range.state[k] == UNWRITTEN;
      undefined |= u32(range.state[k] == UNDEFINED) << k;
    }
    if (unwritten && range.shared)
      block.hold("uninitialised", warp, lane, "reads " + where() + ", which nothing wrote");
    else if (unwritten)
      block.find("uninitialised", warp, lane, "reads " + where() + ", which nothing wrote");
  }
  if (range.shadow) check_read(range);
  memcpy(out, range.data, bytes);
  if (flags & ACQUIRE) acquire_release(range.shared ? SHARED_WINDOW + address : address);
  return true;
}

bool Access::store(const u8* in, u32 undefined, u32 alignment) const {
  Range range;
  if (!locate(range, true, alignment)) return false;
  if (flags & RELEASE) acquire_release(range.shared ? SHARED_WINDOW + address : address);
  if (range.shadow) check_write(range, in, undefined);
  memcpy(range.data, in, bytes);
  if (range.state) {
    for (u32 k = 0; k < bytes; ++k) range.state[k] = undefined >> k & 1 ? UNDEFINED : WRITTEN;
  }
  return true;
}

bool Access::check_proxy() const {
  const auto& writers = block.shared_shadow.writer;
  for (u32 k = 0; writers && k < bytes; ++k) {
    Entry e = writers[address + k];
    if (!e || thread_of(e) / LANES == block.warps.size()) continue;
    if (time_of(e) < warp.proxied[thread_of(e) / LANES]) continue;
    block.find("async", warp, lane,
               "uses " + where() + " through the async proxy, but " + thread_name(block, warp, e) +
                   " wrote it and no fence.proxy.async came in between",
               -1, block.shared_shadow.writer_pc[address + k]);
    return false;
  }
  return true;
}

// Blocks order each other through memory: a release (or a fence, then a strong write) publishes what the block did, an
// acquire (or a strong read, then a fence) takes it over. Per block, not per thread.
void Access::acquire_release(u64 key) const {
  if (flags & CTA) return;
  Launch& launch = block.launch;
  std::lock_guard lock(launch.mutex);
  auto& published = launch.released[key];
  if (flags & ACQUIRE) {
    for (auto [other, time] : published) block.known[other] = std::max(block.known[other], time);
  } else {
    for (auto [other, time] : published) {
      block.read_before_fence[other] = std::max(block.read_before_fence[other], time);
    }
  }
  u32 time = flags & RELEASE ? block.tick() : block.fence_time;
  if (time) {
    for (auto [other, at] : block.known) published[other] = std::max(published[other], at);
    u32& own = published[block.id & 0xfffff];
    own = std::max(own, time);
  }
}

void complete_copies(Block& b, Warp& w, u32 mask, u32 pending_groups, bool uncommitted) {
  std::erase_if(w.copies, [&](const AsyncCopy& c) {
    bool done = mask >> c.lane & 1 && (uncommitted || c.group + pending_groups < w.group[c.lane]);
    if (!done) return false;
    u8 value[16] = {};
    u32 undefined = 0, pc = b.pc;
    b.pc = c.pc;
    const Ins& ins = b.program.code[c.pc];
    memset(&b.shared_state[c.shared], WRITTEN, c.bytes);
    if (c.source_bytes) {
      Access read{b, w, ins, int(c.lane), GLOBAL, c.global, c.source_bytes};
      read.load(value, undefined, 1);
    }
    Access write{b, w, ins, int(c.lane), PLACE, c.shared, c.bytes};
    write.store(value, undefined, 1);
    b.pc = pc;
    return true;
  });
}

}  // namespace ptx
