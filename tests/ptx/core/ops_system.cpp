// Calls to what the device runtime provides, traps, clocks.
//
// Parameters of calls lie in local memory, at places that the decoder chose.
#include <algorithm>

#include "memory.h"
#include "register.h"

namespace ptx {

namespace {

u64 local_value(Warp& w, const Block& b, int lane, u32 offset, u32 bytes) {
  u64 v = 0;
  memcpy(&v, &w.local[size_t(lane) * b.program.local_bytes + offset], bytes);
  return v;
}

u64 read_generic(Block& b, Warp& w, const Ins& i, int lane, u64 address, u32 bytes) {
  u64 value = 0;
  u32 undefined;
  Access{b, w, i, lane, GENERIC, address, bytes}.load(reinterpret_cast<u8*>(&value), undefined, 1);
  return value;
}

std::string read_string(Block& b, Warp& w, const Ins& i, int lane, u64 address) {
  std::string text;
  while (text.size() < 4096) {
    char c = char(read_generic(b, w, i, lane, address + text.size(), 1));
    if (!c) break;
    text += c;
  }
  return text;
}

// int vprintf(format, arguments): arguments are packed as C aligns them. aux[0..2]: format, arguments, result
void print(Block& b, Warp& w, const Ins& i, u32 mask) {
  for_lanes(mask, [&](int lane) {
    std::string format = read_string(b, w, i, lane, local_value(w, b, lane, i.aux[0], 8));
    u64 at = local_value(w, b, lane, i.aux[1], 8);
    auto next = [&](u32 bytes) {
      at = (at + bytes - 1) / bytes * bytes;
      u64 v = read_generic(b, w, i, lane, at, bytes);
      at += bytes;
      return v;
    };
    std::string out;
    for (size_t k = 0; k < format.size();) {
      if (format[k] != '%') {
        out += format[k++];
        continue;
      }
      if (k + 1 < format.size() && format[k + 1] == '%') {
        out += '%', k += 2;
        continue;
      }
      size_t end = std::min(format.find_first_of("diouxXeEfFgGaAcsp", k), format.size() - 1);
      std::string spec = format.substr(k, end - k + 1);
      k = end + 1;
      char type = spec.back(), text[512];
      bool wide = spec.find_first_of("lzjt") != std::string::npos;
      std::erase_if(spec, [](char c) { return std::strchr("lhzjt", c) != nullptr; });
      if (std::strchr("eEfFgGaA", type)) {
        snprintf(text, sizeof text, spec.c_str(), std::bit_cast<double>(next(8)));
      } else if (type == 's') {
        snprintf(text, sizeof text, spec.c_str(), read_string(b, w, i, lane, next(8)).c_str());
      } else if (type == 'p') {
        snprintf(text, sizeof text, "%s", hex(next(8)).c_str());
      } else if (wide) {
        spec.insert(spec.size() - 1, "ll");
        snprintf(text, sizeof text, spec.c_str(), static_cast<long long>(next(8)));
      } else {
        snprintf(text, sizeof text, spec.c_str(), int(next(4)));
      }
      out += text;
    }
    if (b.printed.size() < 1 << 20) b.printed += out;
    u32 result = u32(out.size());
    memcpy(&w.local[size_t(lane) * b.program.local_bytes + i.aux[2]], &result, 4);
    memset(&w.local_state[size_t(lane) * b.program.local_bytes + i.aux[2]], WRITTEN, 4);
  });
}

// __assertfail(message, file, line, function, size of a char): aux[0..3] are the places of the first four.
void assert_failed(Block& b, Warp& w, const Ins& i, u32 mask) {
  int lane = std::countr_zero(mask);
  auto text = [&](u32 k) { return read_string(b, w, i, lane, local_value(w, b, lane, i.aux[k], 8)); };
  std::string message = text(0), file = text(1), function = text(3);
  b.find("assert", w, lane,
         "assertion failed: " + message + " (" + file + ":" + std::to_string(local_value(w, b, lane, i.aux[2], 4)) +
             ", " + function + ")");
  throw Stop{};
}

void trap(Block& b, Warp& w, const Ins&, u32 mask) {
  b.find("trap", w, std::countr_zero(mask), "trap");
  throw Stop{};
}

// aux: from, to, bytes, in local memory
void copy_parameter(Block& b, Warp& w, const Ins& i, u32 mask) {
  for_lanes(mask, [&](int lane) {
    size_t base = size_t(lane) * b.program.local_bytes;
    memcpy(&w.local[base + i.aux[1]], &w.local[base + i.aux[0]], i.aux[2]);
    memcpy(&w.local_state[base + i.aux[1]], &w.local_state[base + i.aux[0]], i.aux[2]);
  });
}

// A function's variables are new at every call. aux: offset, bytes
void fresh_locals(Block& b, Warp& w, const Ins& i, u32 mask) {
  for_lanes(mask, [&](int lane) {
    memset(&w.local_state[size_t(lane) * b.program.local_bytes + i.aux[0]], UNWRITTEN, i.aux[1]);
  });
}

void clock(Block& b, Warp& w, const Ins& i, u32 mask) {
  u64 now = b.executed += 16;
  for_lanes(mask, [&](int l) {
    if (i.ops[0].width == 8)
      put<u64>(w.at(i.ops[0]), l, now);
    else
      put<u32>(w.at(i.ops[0]), l, u32(now));
  });
}

}  // namespace

void register_system() {
  add("vprintf", print, Kind::MEMORY);
  add("__assertfail", assert_failed, Kind::MEMORY);
  add("trap", trap, Kind::MEMORY);
  add("copy.parameter", copy_parameter, Kind::MEMORY);
  add("fresh.locals", fresh_locals, Kind::MEMORY);
  add("clock", clock);
  add("bra", nullptr, Kind::BRANCH);
  add("brx.idx", nullptr, Kind::BRANCH_TABLE);
  add("call", nullptr, Kind::CALL);
  add("ret", nullptr, Kind::RETURN);
  add("exit", nullptr, Kind::EXIT);
  add("barrier", nullptr, Kind::BARRIER);
  add("bar.warp.sync", nullptr, Kind::WARP_BARRIER);
}

}  // namespace ptx
