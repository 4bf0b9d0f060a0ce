#include "isa.h"

#include <atomic>
#include <stdexcept>

#ifdef FASTLM_HAS_UNITS
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlm::cpu {
namespace {

constexpr const char* NAMES[] = {"portable", "x86-64-v3", "x86-64-v4", "avx512-bf16", "amx", "amx-twin"};
constexpr int COUNT = int(sizeof NAMES / sizeof *NAMES);

#ifdef FASTLM_HAS_UNITS
// Linux gives the unit to a process that asks, before its first use.
bool amx_permitted() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

bool find(Isa set) {
  switch (set) {
    case Isa::portable:
    case Isa::amx_twin:
      return true;
#ifdef FASTLM_HAS_CLONES
    case Isa::v3:
      return __builtin_cpu_supports("x86-64-v3");
    case Isa::v4:
      return __builtin_cpu_supports("x86-64-v4");
#endif
#ifdef FASTLM_HAS_UNITS
    case Isa::bf16:
      return find(Isa::v4) && __builtin_cpu_supports("avx512bf16");
    case Isa::amx:
      return find(Isa::bf16) && amx_permitted();
#endif
    default:
      return false;
  }
}

// Whether "auto" may take it. Intel's vdpbf16ps does half of the products of its two float32 units: attention with it
// took 1.5 times as long as with float32 products on an Intel Xeon (LOG.md, 2026-11-30).
bool preferred(Isa set) {
#ifdef FASTLM_HAS_UNITS
  if (set == Isa::bf16 && __builtin_cpu_is("intel")) return false;
#endif
  return set != Isa::amx_twin;
}

struct Sets {
  bool has[COUNT];
  Isa best = Isa::portable;

  Sets() {
    for (int i = 0; i < COUNT; ++i) {
      has[i] = find(Isa(i));
      if (has[i] && preferred(Isa(i))) best = Isa(i);
    }
  }
};

const Sets& sets() {
  static const Sets sets;
  return sets;
}

std::atomic<int>& chosen() {
  static std::atomic<int> chosen{int(sets().best)};
  return chosen;
}

}  // namespace

Isa isa() { return Isa(chosen().load(std::memory_order_relaxed)); }

std::string isa_name() { return NAMES[int(isa())]; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i < COUNT; ++i) {
    if (sets().has[i]) names.push_back(NAMES[i]);
  }
  return names;
}

std::string use_isa(const std::string& name) {
  int set = name == "auto" ? int(sets().best) : -1;
  for (int i = 0; i < COUNT; ++i) {
    if (sets().has[i] && name == NAMES[i]) set = i;
  }
  if (set < 0) {
    std::string known;
    for (const std::string& each : isas()) known += ", " + each;
    throw std::invalid_argument("isa: expected auto" + known + " on this CPU, got " + name);
  }
  return NAMES[chosen().exchange(set)];
}

}  // namespace fastlm::cpu
