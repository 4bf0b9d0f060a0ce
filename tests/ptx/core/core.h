// The state of a launch, and the interface between the scheduler (execute.cpp) and the instructions (ops_*.cpp).
//
// A warp's registers lie lane by lane: register r of 32 bits is 32 consecutive words, one of 64 bits is 64. An
// instruction is a function over the lanes of an active mask. Predicates are masks of lanes.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

constexpr int LANES = 32;
constexpr u32 ALL = 0xffffffffu;

struct Warp;
struct Block;
struct Ins;

// ---- program ---------------------------------------------------------------------------------------------------

enum Space : u8 { REGISTERS, CONSTANTS, PREDICATES };

// Where an operand lies: `off` words into its space. `reg` numbers it for undefinedness and names; 0 is never
// undefined.
struct Operand {
  u32 off = 0;
  u32 reg = 0;
  u8 space = CONSTANTS;
  u8 width = 4;      // bytes; a predicate has 1
  bool neg = false;  // a predicate read as its complement
};

using Run = void (*)(Block&, Warp&, const Ins&, u32 mask);

// How a lane's undefined bytes pass through an instruction.
enum class Kind : u8 {
  PLAIN,     // computes registers from registers
  MEMORY,    // handles undefined operands by itself
  CONVERGE,  // needs all lanes of its member mask (or of the warp) at once; handles undefined operands by itself
  BRANCH,
  BRANCH_TABLE,
  CALL,
  RETURN,
  EXIT,
  BARRIER,
  WARP_BARRIER,
  CLUSTER_BARRIER,
};

struct Handler {
  Run run = nullptr;
  Run taint = nullptr;  // nullptr: a result is undefined where any operand is
  Kind kind = Kind::PLAIN;
  bool async_proxy = false;
};

struct Ins {
  Run run;
  Run taint;
  Kind kind;
  bool guarded = false;
  bool product = false;  // wgmma.mma_async, which alone may touch registers of products in flight
  Operand guard;
  u8 nd = 0, ns = 0;
  i64 imm = 0;                              // address offset, and other constants
  std::array<u32, 6> aux{};                 // what it means is said where the handler is
  u32 target = 0;                           // of a branch or a call
  const Operand* ops = nullptr;             // nd results, then ns sources
  const std::vector<u32>* table = nullptr;  // targets of brx.idx; labels of a call: (from, to, bytes) copies
};

struct SpecialRegister {
  std::string name;
  Operand operand;
};

struct Program {
  std::vector<Ins> code;
  std::vector<Operand> operands;
  std::vector<std::vector<u32>> tables;
  std::vector<u32> constants;  // LANES copies of every immediate
  u32 words = 0;               // of registers
  u32 predicates = 0, registers = 0;
  u32 local_bytes = 0;  // of a thread: variables, and the parameters of calls
  std::vector<SpecialRegister> special;
  std::vector<std::pair<u32, u32>> locals, shared;  // (offset, bytes) of the variables
  u32 shared_bytes = 0;                             // guard gaps included; dynamic shared memory follows
  bool async_proxy = false;                         // it has wgmma or bulk copies
};

std::unordered_map<std::string, Handler>& handlers();

// ---- findings --------------------------------------------------------------------------------------------------

struct Finding {
  std::string kind, message;
  u32 pc = 0, block = 0, thread = 0;
  i64 reg = -1;     // a register that the message is about
  i64 origin = -1;  // pc of an earlier access, or of the first use of an undefined register
  u64 count = 1;
};

struct Stop {};  // thrown when enough has been found

// ---- memory ----------------------------------------------------------------------------------------------------

// Per byte: was it written, and is what was written defined? PENDING: a copy has not been waited for. SIGNAL: of an
// mbarrier.
enum State : u8 { UNWRITTEN = 0, WRITTEN = 1, UNDEFINED = 2, HOLE = 4, SIGNAL = 0x40, PENDING = 0x80 };

// An access in a shadow: time (29 bits) | cluster (20) | thread of it (12) | strong in its block only | strong |
// read-only, or written by a compare-and-swap. 0 is none.
using Entry = u64;
constexpr Entry READ_ONLY = 1, SWAPPED = 1, STRONG = 2, IN_BLOCK = 4;
inline Entry make_entry(u32 time, u32 block, u32 thread, Entry flags) {
  return u64(time) << 35 | u64(block & 0xfffff) << 15 | u64(thread) << 3 | flags;
}
inline u32 time_of(Entry e) { return u32(e >> 35); }
inline u32 block_of(Entry e) { return u32(e >> 15) & 0xfffff; }
inline u32 thread_of(Entry e) { return u32(e >> 3) & 0xfff; }

// A word that threads of this process share; a plain load and store on any machine.
template <class T>
struct Slot {
  T value;
  operator T() const { return __atomic_load_n(&value, __ATOMIC_RELAXED); }
  void operator=(T v) { __atomic_store_n(&value, v, __ATOMIC_RELAXED); }
};

// The last writer and two readers since of every granule of a region, and, where blocks run side by side, the blocks
// that touched it.
struct Shadow {
  template <class T>
  using Array = std::unique_ptr<Slot<T>[], decltype(&free)>;
  Array<Entry> writer{nullptr, free}, reader{nullptr, free}, reader2{nullptr, free}, claim{nullptr, free};
  Array<u32> writer_pc{nullptr, free}, reader_pc{nullptr, free};
  u32 shift = 0;  // log2 of the granule's bytes
  void allocate(size_t bytes, u32 granule_shift, bool side_by_side) {
    shift = granule_shift;
    size_t n = (bytes >> shift) + 2;  // calloc: pages nobody touches cost nothing
    for (auto* p : {&writer, &reader, &reader2}) p->reset(static_cast<Slot<Entry>*>(calloc(n, sizeof(Entry))));
    for (auto* p : {&writer_pc, &reader_pc}) p->reset(static_cast<Slot<u32>*>(calloc(n, sizeof(u32))));
    claim.reset(side_by_side ? static_cast<Slot<Entry>*>(calloc(n, sizeof(Entry))) : nullptr);
  }
  void clear(size_t bytes) {
    size_t n = (bytes >> shift) + 2;
    for (auto* p : {&writer, &reader, &reader2}) memset(static_cast<void*>(p->get()), 0, n * sizeof(Entry));
  }
};

struct Buffer {
  u64 begin = 0, end = 0;  // device addresses
  u8* host = nullptr;
  u8* state = nullptr;  // nullptr: all written
  bool writable = true;
  std::string name;
  Shadow shadow;
};

constexpr u64 SHARED_WINDOW = 0x7000'0000'0000, LOCAL_WINDOW = 0x7100'0000'0000, PARAM_WINDOW = 0x7200'0000'0000;
constexpr u64 WINDOW_BYTES = 0x100'0000'0000;

// CLUSTER: .shared::cluster. PLACE: by the offset in Block::shared, for what has found it already.
enum Memory : u32 { GLOBAL, SHARED, LOCAL, PARAM, GENERIC, CLUSTER, PLACE };

// A shared address of another block of the cluster, as mapa makes it: the block's rank + 1 from this bit on.
constexpr u32 RANK_SHIFT = 24;
constexpr u32 MOST_WARPS = 128;  // of a cluster

// ---- warps -----------------------------------------------------------------------------------------------------

// Lanes of a warp at one place.
struct Split {
  enum State : u8 { READY, CONVERGING, WARP_BARRIER, BARRIER };
  u32 mask = 0, pc = 0;
  State state = READY;
  u32 wait = 0;            // barrier number, or member mask
  std::vector<u32> stack;  // return addresses
  bool joins(const Split& o) const { return pc == o.pc && stack == o.stack; }
};

struct AsyncCopy {
  u32 lane, group, shared;
  u64 global;
  u32 bytes, source_bytes, pc;
};

// A wgmma.mma_async of a warp that no wait has completed.
struct Product {
  u32 pc, group;
  std::vector<u32> written, read;  // registers: the accumulators, A's fragments
  std::vector<u32> units;          // shared addresses of the 16-byte units of A and B
};

// An mbarrier. What orders: every arrival releases what its warp knows, a wait that succeeds acquires it.
struct Signal {
  u32 count = 0;         // arrivals of a phase
  u32 missing = 0;       // of the phase under way
  i64 bytes = 0;         // that copies still have to bring
  u32 phase = 0;         // phases completed
  Entry made = 0;        // by whom and when
  bool fenced = false;   // visible to the async proxy
  u32 fenced_phase = 0;  // cluster barriers that the fencing warp had passed
  std::vector<u32> known, proxied, passed_known, passed_proxied;
};

// A part of a bulk copy: at most 16 bytes, to or from this offset of Block::shared. `other` is an address of global
// memory, where 0 stands for zeros, or the offset that a copy from shared memory reads.
struct Piece {
  u32 shared;
  u64 other;
  u32 bytes;
};

// Where a copy that completes at an mbarrier comes from. VALUES: st.async, from registers.
enum class Source : u8 { GLOBAL_MEMORY, SHARED_MEMORY, VALUES };

// A cp.async.bulk, until what it signals is waited for.
struct BulkCopy {
  u32 warp, lane, pc;
  bool load = false;  // to shared memory
  Source source = Source::GLOBAL_MEMORY;
  u32 signal = 0;     // a load's mbarrier
  u32 group = 0;      // a store's
  bool read = false;  // a store that has read its shared memory, into `data`
  std::vector<Piece> pieces{};
  std::vector<u8> data{};
};

struct Warp {
  u32 id = 0;    // in the cluster
  u32 rank = 0;  // of its block in the cluster
  u32 initial = 0, alive = 0;
  std::vector<Split> splits;
  u32* bases[3] = {};
  std::vector<u32> storage;
  std::vector<u32> predicates;
  // Undefined lanes of every register; where `partial`, `detail` tells the bytes, else all of them are undefined.
  std::vector<u32> undef, partial, origin;
  std::vector<u8> detail;
  u32 carry = 0;  // the condition code register, a lane a bit
  std::vector<u8> local, local_state;
  std::vector<AsyncCopy> copies;
  std::array<u32, LANES> group{};
  std::array<u32, LANES> bulk_group{};
  // Time up to which this warp knows what the others did; up to which all its lanes know each other; pairs of lanes.
  // The entry behind the last warp's is that of bulk copies.
  std::vector<u32> known;
  u32 lanes_known = 0;
  std::unique_ptr<std::array<std::array<u32, LANES>, LANES>> pairs_known;
  // What it knew at its last fence beyond the block, itself included: a relaxed arrival after that passes it on.
  std::vector<u32> fenced;
  // Of every warp, the time up to which its writes passed a fence.proxy.async that this warp knows of.
  std::vector<u32> proxied;
  std::vector<Product> products;
  u32 products_group = 0;  // commit groups so far
  u32 products_issued = 0;
  std::vector<u8> flying;       // per register: products in flight that have it
  std::vector<u8> stale;        // per register: written since the last wgmma.fence
  u32 turns = 0;                // steps taken while diverged
  u32 arrived = 0, passed = 0;  // lanes at barrier.cluster before its wait: its phase is incomplete, complete
  u32 phases = 0;               // cluster barriers passed

  template <class T = u32>
  T* at(const Operand& o) {
    return reinterpret_cast<T*>(bases[o.space] + o.off);
  }
  u32 mask_of(const Operand& o) { return *at(o) ^ (o.neg ? ALL : 0); }

  u8 undefined_bytes(const Operand& o, int lane) const {
    if (!(undef[o.reg] >> lane & 1)) return 0;
    u8 whole = u8((1u << o.width) - 1);
    return partial[o.reg] >> lane & 1 ? detail[o.reg * LANES + lane] & whole : whole;
  }
  void set_undefined(const Operand& o, int lane, u8 bytes, u32 from) {
    u32 bit = 1u << lane;
    if (!bytes) {
      undef[o.reg] &= ~bit;
      return;
    }
    undef[o.reg] |= bit;
    partial[o.reg] |= bit;
    detail[o.reg * LANES + lane] = bytes;
    origin[o.reg] = from;
  }
  // The instruction that first read an undefined register, which is the origin of what was computed from it.
  u32 origin_of(const Operand& o, u32 pc) const { return origin[o.reg] ? origin[o.reg] : pc + 1; }
};

struct BarrierState {
  u32 expected = 0, arrived = 0, waiting = 0;
  std::vector<u32> known, proxied;
  u32 votes = 0, pc = 0;  // of bar.red
};

// What barrier.cluster hands on: of the phase under way, and of the last one.
struct ClusterBarrier {
  std::vector<u32> known, proxied, passed_known, passed_proxied;
};

// A block of a cluster, as the others meet it.
struct Member {
  struct Visit {
    u32 time = 0, pc = 0;
    int lane = 0;
  };
  u32 alive = 0;              // warps that have not exited
  std::vector<u32> known;     // what they knew when they exited, together
  std::vector<Visit> visits;  // by other blocks' warps, the last of each
};

// The arithmetic that PTX leaves open. EXACT: as close as can be. The others: approximations with the largest errors
// that the ISA allows, all upwards, all downwards or scattered (ops_approximate.cpp), and mma's sums truncated
// (ops_matrix.cpp).
enum Chip : u32 { EXACT, HIGH, LOW, SCATTERED };

// What the warps of a warpgroup have to execute alike: a wgmma.mma_async and its matrices in shared memory.
struct Issued {
  u32 pc;
  u64 a, b;
  bool operator==(const Issued&) const = default;
};
struct Warpgroup {
  std::vector<Issued> issued;  // from number `first` on
  u32 first = 0;
};

// What the blocks of a launch share.
struct Launch {
  const Program* program = nullptr;
  std::vector<Buffer> buffers;  // by address
  std::array<u32, 3> grid{}, block{}, cluster{1, 1, 1};
  std::vector<u8> params;
  u32 dynamic_shared = 0;
  u64 max_instructions = 0;
  u32 max_findings = 1;
  bool races = true;
  Chip chip = EXACT;
  std::vector<u64> counts;           // executions of every instruction, per warp
  std::vector<u64> conflicts;        // extra shared-memory wavefronts of every instruction
  std::vector<std::string> printed;  // per block
  std::mutex mutex;
  std::map<std::pair<u32, std::string>, Finding> findings;  // of the first block in order that has any
  std::atomic<u32> first_bad{ALL};
  std::atomic<bool> contended{false};  // blocks that ran side by side touched the same memory, and one wrote it
  // Releases at an address: what each block had done by then.
  std::unordered_map<u64, std::unordered_map<u32, u32>> released;
};

// A block of threads, or a cluster of them, whose warps and shared memory lie one block's behind the other's: what
// orders warps, and what checks their accesses, then spans the cluster.
struct Block {
  Launch& launch;
  const Program& program;
  u32 id = 0;                 // of the cluster
  u32 ranks = 1;              // blocks of the cluster
  u32 block_warps = 0;        // warps of a block
  u32 bytes = 0, stride = 0;  // of a block's shared memory, and from one to the next
  u32 time = 1;
  bool touched = false;  // memory was accessed at `time`
  std::vector<Warp> warps;
  std::vector<u8> shared, shared_state;
  Shadow shared_shadow;
  std::vector<u16> reading;           // per 16-byte unit of shared memory: products in flight that read it
  std::vector<Warpgroup> warpgroups;  // block by block
  std::map<u32, Signal> signals;      // mbarriers by their place in `shared`
  std::vector<BulkCopy> bulk;
  u64 events = 0;                                      // arrivals, completed phases, released barriers, exits
  bool waiting = false;                                // the instruction that ran found its mbarrier's phase incomplete
  std::vector<std::array<BarrierState, 16>> barriers;  // of each block
  ClusterBarrier cluster;
  std::vector<Member> members;
  std::vector<u32> hints;  // the buffer that each instruction met last
  std::vector<u64> counts, conflicts;
  std::unordered_map<u32, u32> known;  // other blocks, up to a time, through acquire and release
  std::unordered_map<u32, u32> read_before_fence;
  u32 fence_time = 0;
  u64 executed = 0;
  std::string printed;
  std::map<std::pair<u32, std::string>, Finding> findings;
  std::vector<Finding> held;  // reads of unwritten shared memory, which a later write may show to be races
  u32 pc = 0;                 // of the instruction that runs

  explicit Block(Launch& l);
  void run(u32 number);
  void find(const char* kind, const Warp& w, int lane, std::string message, i64 reg = -1, i64 origin = -1);
  void hold(const char* kind, const Warp& w, int lane, std::string message);
  void add(Finding finding);
  void find_undefined(Warp& w, const Operand& o, u32 mask, const char* use);
  // True if a lane of `mask` holds an undefined value, which is a finding.
  bool undefined(Warp& w, const Operand& o, u32 mask, const char* use) {
    if (!(w.undef[o.reg] & mask)) return false;
    find_undefined(w, o, mask, use);
    return true;
  }
  // A moment that orders accesses before it against those after.
  u32 tick() {
    if (touched) ++time, touched = false;
    return time;
  }
  void order_lanes(Warp& w, u32 members);
  void reset(u32 number);
  bool turn(Warp& w);
  int choose(Warp& w);
  void step(Warp& w, int current);
  void branch(Warp& w, int current, const u32* targets);
  void leave(Warp& w, int current, u32 mask);
  std::vector<std::pair<u32, u32>> groups(Warp& w, const Operand& o, u32 mask);
  void converge(Warp& w, int current, const Ins& i);
  void barrier(Warp& w, int current, const Ins& i);
  void warp_barrier(Warp& w, int current, const Ins& i);
  bool gather(Warp& w, Split& s);
  void release(u32 rank, u32 number);
  void cluster_barrier(Warp& w, int current, const Ins& i);
  void complete_cluster();
  void pass_cluster(Warp& w, Split& s);
  void exited(Warp& w);
  void deadlock();
  void starve();
  void visit_registers(Warp& w, const Ins& i, u32 mask);
  void finish_products();
  void finish_bulk();
  bool is_bulk(u64 shared) const;  // a bulk copy is writing this byte of shared memory

  u32 number(u32 cluster, u32 rank) const;  // of a block in the launch
  u32 local(const Warp& w) const { return w.id - w.rank * block_warps; }
  u32 rank_of(u32 place) const { return ranks > 1 ? place / stride : 0; }
  u32 offset_of(u32 place) const { return ranks > 1 ? place % stride : place; }
  // In `shared`. An offset past the end stays past the end of its block.
  u32 place(u32 rank, u64 offset) const {
    return ranks > 1 ? rank * stride + u32(std::min<u64>(offset, stride - 16)) : u32(offset);
  }
  // The place of a shared address, or NOWHERE after a finding. across: it may be in another block.
  u32 place_of(Warp& w, int lane, u64 address, bool across);
  // Why a warp must not touch the shared memory of a block of its cluster: the kind of the finding and its reason, or
  // nullptr. visits: the block must not exit before.
  std::pair<const char*, const char*> unreachable(Warp& w, int lane, u32 rank, bool visits);
};

// ---- values ----------------------------------------------------------------------------------------------------

template <class T>
inline T get(const u32* p, int lane) {
  if constexpr (sizeof(T) == 8) {
    u64 v;
    memcpy(&v, reinterpret_cast<const u64*>(p) + lane, 8);
    return std::bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 4) {
    return std::bit_cast<T>(p[lane]);
  } else if constexpr (sizeof(T) == 2) {
    return std::bit_cast<T>(u16(p[lane]));
  } else {
    return std::bit_cast<T>(u8(p[lane]));
  }
}

// Narrow integers are extended to 32 bits as their sign says.
template <class T>
inline void put(u32* p, int lane, T v) {
  if constexpr (sizeof(T) == 8) {
    u64 bits = std::bit_cast<u64>(v);
    memcpy(reinterpret_cast<u64*>(p) + lane, &bits, 8);
  } else if constexpr (sizeof(T) == 4) {
    p[lane] = std::bit_cast<u32>(v);
  } else {
    p[lane] = u32(i32(v));
  }
}

template <class F>
inline void for_lanes(u32 mask, F&& f) {
  for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
}

// D = F::f(S...) over the active lanes. A result may be one of the operands.
template <class F, class D, class... S, size_t... I>
inline void map_lanes(Warp& w, const Ins& i, u32 mask, std::index_sequence<I...>) {
  const u32* s[] = {w.at(i.ops[i.nd + I])...};
  u32* d = w.at(i.ops[0]);
  if (mask == ALL) {
#pragma GCC ivdep
    for (int l = 0; l < LANES; ++l) put<D>(d, l, F::f(get<S>(s[I], l)...));
  } else {
    for_lanes(mask, [&](int l) { put<D>(d, l, F::f(get<S>(s[I], l)...)); });
  }
}
template <class F, class D, class... S>
void lanes(Block&, Warp& w, const Ins& i, u32 mask) {
  map_lanes<F, D, S...>(w, i, mask, std::index_sequence_for<S...>{});
}

// How undefined lanes pass through an instruction: any byte makes all of the result undefined, or
void taint_any(Block&, Warp&, const Ins&, u32);
void taint_bytes(Block&, Warp&, const Ins&, u32);   // byte by byte: mov, xor, not
void taint_halves(Block&, Warp&, const Ins&, u32);  // packed pairs of 16 bits
void taint_and(Block&, Warp&, const Ins&, u32);     // but for bytes that the other operand settles
void taint_or(Block&, Warp&, const Ins&, u32);

std::string hex(u64 v);

constexpr u32 NOWHERE = ~0u;

// Of times by warp, the later ones.
inline void join(std::vector<u32>& to, const std::vector<u32>& from) {
  to.resize(std::max(to.size(), from.size()));
  for (size_t k = 0; k < from.size(); ++k) to[k] = std::max(to[k], from[k]);
}

}  // namespace ptx
