// wgmma: products of a warpgroup, four warps, whose factors lie in shared memory.
//
// Every warp computes the sixteen rows that it owns. The values are computed when the instruction is issued; from then
// until a wait for its group nothing else may touch its accumulators and A's registers or write A and B in shared
// memory, and each of these is a finding ("async"). So are: an accumulator written after the last wgmma.fence, and a
// tile that the generic proxy (st, stmatrix, cp.async) wrote without a fence.proxy.async in between. What is read
// counts as read at the wait too, so a later write by another warp must be ordered after it.
//
// Fragments (PTX ISA, "Register Fragments for wgmma"): those of mma.sync, of warp w the rows from 16 (w mod 4) on; with
// accumulators of 32 bits register r holds column 8 (r >> 2) + 2 t + (r & 1).
#include <algorithm>

#include "matrix.h"
#include "memory.h"
#include "register.h"

namespace ptx {

namespace {

constexpr u32 A_IN_REGISTERS = 1, NEGATE_A = 2, NEGATE_B = 4, A_ACROSS = 8, B_ACROSS = 16, HALF = 32;
constexpr u32 UNIT = 16;  // bytes: what a swizzle moves
constexpr u32 ROWS = 16, MOST_COLUMNS = 256, MOST_DEPTH = 16;

// A matrix descriptor (PTX ISA, "Matrix-Descriptor Format"). Layouts, in units of 16 bytes, with W = 2, 4 or 8 units in
// a row of a swizzled pattern: along K, a row has two units; rows are W apart and groups of eight `stride` apart.
// Across (M or N is contiguous), W units are a row, rows of k are W apart, groups of eight k `stride` apart, and the
// next W units `leading` away. Without swizzling eight rows of one unit are together; their groups are `stride` apart
// along K and `leading` across, the two halves of K the other way round.
struct Matrix {
  u32 start, leading, stride;
  u32 width;  // units in a row of the pattern; 1: not swizzled
  bool across;

  Matrix(u64 descriptor, bool across)
      : start(u32(descriptor & 0x3fff) * UNIT),
        leading(u32(descriptor >> 16 & 0x3fff) * UNIT),
        stride(u32(descriptor >> 32 & 0x3fff) * UNIT),
        width(std::array{1u, 8u, 4u, 2u}[descriptor >> 62]),
        across(across) {}

  u32 swizzled(u32 offset) const {
    u32 address = start + offset;
    return address ^ ((address >> 3) & ((width - 1) * UNIT));
  }
  // Row or column m, half of K.
  u32 along(u32 m, u32 half) const {
    return swizzled(m / 8 * stride + (width == 1 ? m % 8 * UNIT + half * leading : (m % 8 * width + half) * UNIT));
  }
  // Eight rows or columns from 8 v on, at k.
  u32 at(u32 v, u32 k) const {
    if (width == 1) return swizzled(v * stride + k / 8 * leading + k % 8 * UNIT);
    return swizzled(v / width * leading + k / 8 * stride + (k % 8 * width + v % width) * UNIT);
  }
};

// Values of a matrix with K along the second axis, and which of them are undefined.
struct Values {
  float value[MOST_COLUMNS][MOST_DEPTH];
  bool undefined[MOST_COLUMNS];  // any of the row
};

class Reader {
  Block& b;
  Warp& w;
  const Ins& i;
  Product& product;

  // False after a finding.
  bool read_unit(u32 address, u8* out, bool& undefined) {
    u32 bits = 0;
    const u32 place = b.place(w.rank, address);
    Access access{b, w, i, 0, PLACE, place, UNIT};
    if (!access.load(out, bits, UNIT)) return false;
    undefined |= bits != 0;
    product.units.push_back(place);
    return access.check_proxy();
  }

 public:
  Reader(Block& b, Warp& w, const Ins& i, Product& product) : b(b), w(w), i(i), product(product) {}

  // Rows from `first` on.
  template <class T>
  void read(const Matrix& m, u32 first, u32 rows, Values& out) {
    constexpr u32 SIZE = std::is_same_v<T, Tf32> ? 4 : 2, PER_UNIT = UNIT / SIZE;
    std::fill_n(out.undefined, rows, false);
    auto store = [&](u32 row, u32 k, const u8* from) {
      u32 word = 0;
      memcpy(&word, from, SIZE);
      out.value[row][k] = element<T>(word, 0);
    };
    alignas(4) u8 unit[UNIT] = {};
    if (!m.across) {
      for (u32 row = 0; row < rows; ++row) {
        for (u32 half = 0; half < 2; ++half) {
          read_unit(m.along(first + row, half), unit, out.undefined[row]);
          for (u32 k = 0; k < PER_UNIT; ++k) store(row, half * PER_UNIT + k, unit + k * SIZE);
        }
      }
      return;
    }
    for (u32 row = 0; row < rows; row += PER_UNIT) {
      for (u32 k = 0; k < 2 * PER_UNIT; ++k) {
        bool undefined = false;
        read_unit(m.at((first + row) / PER_UNIT, k), unit, undefined);
        for (u32 r = 0; r < PER_UNIT; ++r) {
          store(row + r, k, unit + r * SIZE);
          out.undefined[row + r] |= undefined;
        }
      }
    }
  }
};

// The warps of a warpgroup must issue the same products in the same order.
void issued(Block& b, Warp& w, Issued what) {
  const u32 number = b.local(w) / 4, first = w.rank * b.block_warps + 4 * number;
  Warpgroup& group = b.warpgroups[w.rank * ((b.block_warps + 3) / 4) + number];
  u32 at = w.products_issued++ - group.first;
  if (at == group.issued.size()) {
    group.issued.push_back(what);
  } else if (!(group.issued[at] == what)) {
    const Issued& other = group.issued[at];
    b.find("divergence", w, 0,
           other.pc == what.pc ? "other warps of its warpgroup have other matrix descriptors"
                               : "other warps of its warpgroup execute $pc" + std::to_string(other.pc) + "$ instead");
    throw Stop{};
  }
  if (group.issued.size() < 1024) return;
  u32 least = w.products_issued;
  for (u32 k = first; k < first + 4; ++k) least = std::min(least, b.warps[k].products_issued);
  group.issued.erase(group.issued.begin(), group.issued.begin() + (least - group.first));
  group.first = least;
}

template <class T>
void product(Block& b, Warp& w, const Ins& i, u32) {
  constexpr int E = std::is_same_v<T, Tf32> ? 1 : 2, DEPTH = 8 * E;
  const u32 columns = i.aux[0], flags = i.aux[1];
  const u32 fragments = flags & A_IN_REGISTERS ? 4 : 0;
  const Operand *a = i.ops + i.nd, *bb = a + (fragments ? fragments : 1), *scale = bb + 1;
  if (b.block_warps < b.local(w) / 4 * 4 + 4) {
    b.find("divergence", w, 0, "needs a warpgroup of four warps; the block has " + std::to_string(b.block_warps));
    throw Stop{};
  }
  if (!fragments && b.undefined(w, *a, ALL, "a matrix descriptor")) throw Stop{};
  if (b.undefined(w, *bb, ALL, "a matrix descriptor") || b.undefined(w, *scale, ALL, "a predicate")) throw Stop{};
  const u64 of_a = fragments ? 0 : get<u64>(w.at(*a), 0), of_b = get<u64>(w.at(*bb), 0);
  for (int l = 1; l < LANES; ++l) {
    if (get<u64>(w.at(*bb), l) == of_b && (fragments || get<u64>(w.at(*a), l) == of_a)) continue;
    b.find("divergence", w, l, "has another matrix descriptor than lane 0");
    throw Stop{};
  }
  if ((of_a | of_b) >> 49 & 7) {
    b.find("trap", w, 0, "a matrix descriptor with a base offset, which the interpreter does not know");
    throw Stop{};
  }
  issued(b, w, {b.pc, of_a, of_b});

  Product record{b.pc, w.products_group, {}, {}, {}};
  for (u32 r = 0; r < i.nd; ++r) record.written.push_back(i.ops[r].reg);
  for (u32 r = 0; r < fragments; ++r) record.read.push_back(a[r].reg);
  for (const Product& other : w.products) {
    auto meets = [&](const std::vector<u32>& x, const std::vector<u32>& y) {
      return std::find_first_of(x.begin(), x.end(), y.begin(), y.end()) != x.end();
    };
    bool same = other.written == record.written;  // accumulators pass from one product to the next of their shape
    if ((!same && meets(other.written, record.written)) || meets(other.written, record.read) ||
        meets(other.read, record.written)) {
      b.find("async", w, 0, "uses registers that another wgmma is still writing or reading: wait for its group first",
             -1, other.pc);
    }
  }
  // Not of A's registers: LLVM moves what Triton packs into them past the wgmma.fence, and ptxas moves it back.
  for (u32 reg : record.written) {
    if (w.stale[reg]) b.find("async", w, 0, "adds to $reg$, which was written after the last wgmma.fence", reg);
  }

  static thread_local Values A, B;
  Reader reader(b, w, i, record);
  if (fragments) {
    std::fill_n(A.undefined, ROWS, false);
    for (u32 r = 0; r < 4; ++r) {
      const u32* words = w.at(a[r]);
      for (int l = 0; l < LANES; ++l) {
        const u32 row = u32(l) / 4 + 8 * (r & 1);
        A.undefined[row] |= w.undefined_bytes(a[r], l) != 0;
        for (int k = 0; k < E; ++k) A.value[row][E * (l % 4) + 4 * E * int(r >> 1) + k] = element<T>(words[l], k);
      }
    }
  } else {
    reader.template read<T>(Matrix(of_a, flags & A_ACROSS), b.local(w) % 4 * ROWS, ROWS, A);
  }
  reader.template read<T>(Matrix(of_b, flags & B_ACROSS), 0, columns, B);
  if (flags & NEGATE_A) {
    for (auto& row : A.value) std::transform(row, row + DEPTH, row, std::negate<float>());
  }
  if (flags & NEGATE_B) {
    for (u32 n = 0; n < columns; ++n) std::transform(B.value[n], B.value[n] + DEPTH, B.value[n], std::negate<float>());
  }

  const bool half = flags & HALF, add = w.mask_of(*scale) & 1;
  auto place = [&](u32 r, int l, u32& row, u32& column) {  // of the first element of a register
    row = u32(l) / 4 + 8 * ((half ? r : r >> 1) & 1);
    column = 8 * (r >> (half ? 1 : 2)) + 2 * (u32(l) % 4) + (half ? 0 : r & 1);
  };
  auto multiply = [&](u32 row, u32 column, float sum) {
    const float *x = A.value[row], *y = B.value[column];
    if (b.launch.chip != Chip::EXACT) return truncated<HOPPER>(x, y, 1, DEPTH, sum);
    for (int k = 0; k < DEPTH; ++k) sum = std::fma(x[k], y[k], sum);
    return sum;
  };
  for (u32 r = 0; r < i.nd; ++r) {
    const Operand& d = i.ops[r];
    u32* words = w.at(d);
    const u32 from = w.origin_of(d, b.pc), own = add ? w.undef[d.reg] : 0;
    w.undef[d.reg] = 0;
    for (int l = 0; l < LANES; ++l) {
      u32 row, column;
      place(r, l, row, column);
      bool undefined = own >> l & 1 || A.undefined[row] || B.undefined[column];
      if (half) {
        u32 out = 0;
        for (u32 k = 0; k < 2; ++k) {
          float sum = multiply(row, column + k, add ? to_float<F16>(u16(words[l] >> (16 * k))) : 0.0f);
          out |= u32(round_half<F16>(sum)) << (16 * k);
          undefined |= B.undefined[column + k];
        }
        words[l] = out;
      } else {
        words[l] = std::bit_cast<u32>(canonical(multiply(row, column, add ? std::bit_cast<float>(words[l]) : 0.0f)));
      }
      if (undefined) w.set_undefined(d, l, 0xff, from);
    }
  }

  for (u32 reg : record.written) ++w.flying[reg];
  for (u32 reg : record.read) ++w.flying[reg];
  for (u32 unit : record.units) ++b.reading[unit / UNIT];
  w.products.push_back(std::move(record));
}

void fence_registers(Block&, Warp& w, const Ins&, u32) { std::fill(w.stale.begin(), w.stale.end(), 0); }

void commit_products(Block&, Warp& w, const Ins&, u32) { ++w.products_group; }

// imm: groups that may stay in flight
void wait_products(Block& b, Warp& w, const Ins& i, u32) {
  std::erase_if(w.products, [&](const Product& p) {
    if (p.group + u32(i.imm) >= w.products_group) return false;
    for (u32 reg : p.written) --w.flying[reg];
    for (u32 reg : p.read) --w.flying[reg];
    const u32 pc = b.pc;
    b.pc = p.pc;
    for (u32 unit : p.units) {
      --b.reading[unit / UNIT];
      Access access{b, w, b.program.code[p.pc], 0, PLACE, unit, UNIT};
      Range range;
      if (access.locate(range, false, 1) && range.shadow) access.check_read(range);
    }
    b.pc = pc;
    return true;
  });
}

// What the warp knows to be written is from here on visible to the async proxy.
void fence_proxy(Block& b, Warp& w, const Ins& i, u32 mask) {
  if (w.proxied.empty()) return;
  fence_signals(b, w, i, mask);
  for (size_t k = 0; k < w.proxied.size(); ++k) w.proxied[k] = std::max(w.proxied[k], w.known[k]);
  const u32 now = b.tick();
  w.proxied[w.id] = (mask & w.alive) == w.alive ? now : std::max(w.proxied[w.id], w.lanes_known);
}

}  // namespace

void Block::visit_registers(Warp& w, const Ins& i, u32 mask) {
  for (u32 k = 0; k < i.nd; ++k) w.stale[i.ops[k].reg] = 1;
  if (w.products.empty()) return;
  for (u32 k = 0; k < u32(i.nd + i.ns); ++k) {
    const u32 reg = i.ops[k].reg;
    if (!w.flying[reg]) continue;
    for (const Product& p : w.products) {
      bool written = std::find(p.written.begin(), p.written.end(), reg) != p.written.end();
      if (!written && std::find(p.read.begin(), p.read.end(), reg) == p.read.end()) continue;
      find("async", w, std::countr_zero(mask),
           std::string(k < i.nd ? "writes $reg$, which a wgmma is still " : "reads $reg$, which a wgmma is still ") +
               (written ? "writing" : "reading") + ": wait for its group first",
           reg, p.pc);
      return;
    }
  }
}

void Block::finish_products() {
  for (const Warp& w : warps) {
    const Warpgroup& group = warpgroups[w.rank * ((block_warps + 3) / 4) + local(w) / 4];
    const u32 at = w.products_issued - group.first;
    if (at == group.issued.size()) continue;
    pc = group.issued[at].pc;
    find("divergence", w, 0, "has exited without this wgmma, which other warps of its warpgroup executed");
    return;
  }
}

void register_wgmma() {
  add("wgmma.mma_async.bf16", product<BF16>, Kind::CONVERGE, nullptr, true);
  add("wgmma.mma_async.f16", product<F16>, Kind::CONVERGE, nullptr, true);
  add("wgmma.mma_async.tf32", product<Tf32>, Kind::CONVERGE, nullptr, true);
  add("wgmma.fence", fence_registers, Kind::CONVERGE);
  add("wgmma.commit_group", commit_products, Kind::CONVERGE);
  add("wgmma.wait_group", wait_products, Kind::CONVERGE);
  add("fence.proxy.async", fence_proxy, Kind::MEMORY);
}

}  // namespace ptx
