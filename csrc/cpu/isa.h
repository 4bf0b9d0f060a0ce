// The instruction set whose functions run: decided at run time, by this CPU or by `use_isa`.
//
// The tables of functions (gemm.cpp, matvec.cpp, units.cpp) select by it, so one process can run and compare all of
// them. FASTLM_CLONES stays as it is: the loader binds each of those functions once, to the best code of this CPU. They
// are plain loops, which give the same results to the rounding in every clone, and calling them through a table would
// cost a table entry for each. A file compiled with -march would be no way out: the linker keeps one copy of an inline
// function of the standard library, and may keep the one with AVX-512 for every caller. The target attribute changes
// only the functions that carry it.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "simd.h"

// The AVX512-BF16 and AMX code needs an assembler and a CPU check that know them.
#if defined(FASTLM_HAS_CLONES) && __GNUC__ >= 11
#define FASTLM_HAS_UNITS
#endif

namespace fastlm::cpu {

// "auto" takes the last one that this CPU has, but avx512-bf16 on no Intel CPU (isa.cpp says why). amx_twin is the code
// of AMX with the matrix unit in plain C++ (tile.h). It is for tests, runs on every CPU, and "auto" never takes it.
enum class Isa : int { portable, v3, v4, bf16, amx, amx_twin };

// The set in use.
Isa isa();

// The set whose code runs where there is none for bfloat16 units.
inline Isa float_isa() { return isa() == Isa::amx_twin ? Isa::portable : std::min(isa(), Isa::v4); }

std::string isa_name();

// The names of the sets that this CPU has, in that order.
std::vector<std::string> isas();

// Sets it for the process, "auto": the best of this CPU. Not while a kernel runs. Returns the name of the set before.
// std::invalid_argument for a name that is not in isas().
std::string use_isa(const std::string& name);

}  // namespace fastlm::cpu
