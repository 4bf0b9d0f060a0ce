// Reads and writes of one lane, with every check on the way.
#pragma once

#include "core.h"

namespace ptx {

enum AccessFlags : u32 {
  SIGNED = 1,
  VOLATILE = 2,  // volatile, relaxed or atomic: two such accesses do not race
  NONCOHERENT = 4,
  ACQUIRE = 8,
  RELEASE = 16,
  SWAP = 32,  // a compare-and-swap: plain reads of the same address, which seed its loop, do not race with it
  CTA = 64,   // VOLATILE, ACQUIRE and RELEASE hold among the threads of the block alone
};

// Bytes of memory that a lane may touch.
struct Range {
  u8* data = nullptr;
  u8* state = nullptr;       // nullptr: all written
  Shadow* shadow = nullptr;  // nullptr: no other thread can reach it
  u64 offset = 0;            // in the shadow
  bool shared = false;
};

// A lane's memory operation: who, where, how much.
struct Access {
  Block& block;
  Warp& warp;
  const Ins& ins;
  int lane;
  u32 space;
  u64 address;
  u32 bytes;
  u32 flags = 0;

  // False, after a finding, if the lane must not touch it.
  bool locate(Range& range, bool write, u32 alignment) const;
  // `undefined`: a bit for every byte that was written with an undefined value.
  bool load(u8* out, u32& undefined, u32 alignment) const;
  bool store(const u8* in, u32 undefined, u32 alignment) const;
  Entry entry(Entry more) const;
  void claim(const Range& range, bool write) const;
  void check_read(const Range& range) const;
  void check_write(const Range& range, const u8* in, u32 undefined) const;
  void acquire_release(u64 key) const;
  // For the async proxy, at a PLACE: False, after a finding, where another proxy's write has no fence.proxy.async after
  // it.
  bool check_proxy() const;
  std::string where() const;
};

inline u64 address_of(Warp& w, const Operand& o, int lane) {
  return o.width == 8 ? get<u64>(w.at(o), lane) : get<u32>(w.at(o), lane);
}

// mbarriers that this warp knows of become visible to bulk copies.
void fence_signals(Block& b, Warp& w, const Ins& i, u32 mask);
void complete_copies(Block& b, Warp& w, u32 mask, u32 pending_groups, bool uncommitted);

}  // namespace ptx
