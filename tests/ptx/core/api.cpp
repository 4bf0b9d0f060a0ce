// The C interface that native.py loads: programs and launches as flat arrays of integers. A Python binding library
// would take longer to compile than all of the interpreter's instructions.
#include <algorithm>
#include <thread>

#include "core.h"
#include "register.h"

using namespace ptx;

namespace {

constexpr char FIELD = '\x1f', RECORD = '\x1e';

std::vector<std::string> split(const char* text) {
  std::vector<std::string> out;
  for (const char* end; *text; text = *end ? end + 1 : end) {
    end = strchr(text, RECORD);
    if (!end) end = text + strlen(text);
    out.emplace_back(text, end);
  }
  return out;
}

void register_all() {
  if (!handlers().empty()) return;
  register_integer();
  register_move();
  register_float();
  register_approximate();
  register_half();
  register_convert();
  register_memory();
  register_warp();
  register_matrix();
  register_wgmma();
  register_bulk();
  register_cluster();
  register_system();
}

Operand make_operand(const i64* o) {  // space, words, register, bytes, negated
  return {u32(o[1]), u32(o[2]), u8(o[0]), u8(o[3]), o[4] != 0};
}

struct Result {
  std::string findings, printed;
};

void run_blocks(Launch& launch, u32 blocks, u32 workers) {
  const size_t n = launch.program->code.size();
  launch.counts.assign(n, 0);
  if (!launch.conflicts.empty()) launch.conflicts.assign(n, 0);
  launch.printed.assign(blocks, "");
  launch.findings.clear(), launch.released.clear();
  launch.first_bad = ALL, launch.contended = false;
  std::atomic<u32> next{0};
  auto work = [&] {
    Block state(launch);
    for (u32 k; !launch.contended && (k = next++) < blocks;) {
      // With one finding wanted it is that of the first block in order, whatever the number of workers.
      if (launch.max_findings == 1 && k > launch.first_bad) break;
      state.run(k);
      launch.printed[k] = std::move(state.printed);
      if (state.findings.empty()) continue;
      std::lock_guard lock(launch.mutex);
      launch.first_bad = std::min<u32>(launch.first_bad, k);
      for (auto& [key, finding] : state.findings) {
        auto [it, fresh] = launch.findings.try_emplace(key, finding);
        if (fresh) continue;
        u64 count = it->second.count + finding.count;
        if (finding.block < it->second.block) it->second = finding;
        it->second.count = count;
      }
      state.findings.clear();
    }
    std::lock_guard lock(launch.mutex);
    for (size_t k = 0; k < state.counts.size(); ++k) launch.counts[k] += state.counts[k];
    for (size_t k = 0; k < state.conflicts.size(); ++k) launch.conflicts[k] += state.conflicts[k];
  };
  std::vector<std::thread> threads;
  for (u32 k = 1; k < workers; ++k) threads.emplace_back(work);
  work();
  for (auto& t : threads) t.join();
}

// Blocks on `workers` threads. If there is anything to report then, it is done over, in order, from the memory that was
// there before: what is found must not depend on the workers.
void run(Launch& launch, u32 workers, const std::vector<u32>& granules) {
  const auto &g = launch.grid, &c = launch.cluster;
  const u32 blocks = g[0] * g[1] * g[2] / (c[0] * c[1] * c[2]);  // or clusters
  workers = std::min(workers, blocks);
  auto allocate = [&](bool side_by_side) {
    for (size_t k = 0; launch.races && k < granules.size(); ++k) {
      Buffer& b = launch.buffers[k];
      b.shadow.allocate(b.end - b.begin, granules[k], side_by_side);
    }
  };
  std::vector<std::pair<u8*, std::vector<u8>>> before;
  for (const Buffer& b : launch.buffers) {
    if (workers < 2 || !b.writable) continue;
    before.emplace_back(b.host, std::vector<u8>(b.host, b.host + (b.end - b.begin)));
    if (b.state) before.emplace_back(b.state, std::vector<u8>(b.state, b.state + (b.end - b.begin)));
  }
  allocate(workers > 1);
  run_blocks(launch, blocks, workers);
  if (workers < 2 || (!launch.contended && launch.findings.empty())) return;
  for (auto& [to, bytes] : before) std::copy(bytes.begin(), bytes.end(), to);
  allocate(false);
  run_blocks(launch, blocks, 1);
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API const char* ptx_handlers() {
  static std::string names;
  register_all();
  if (names.empty()) {
    for (auto& [name, handler] : handlers()) names += name + RECORD;
  }
  return names.c_str();
}

// header: instructions, words, predicates, registers, local bytes, shared bytes, local variables, shared variables
// code: of every instruction its handler's index in `names`, its guard's operand + 1, its first operand, results,
//   sources, imm, aux[6], target, first table entry, table entries
// ranges: (offset, bytes) of the local, then of the shared variables; special: an operand for every special name
API void* ptx_program(const i64* header, const i64* code, const i64* operands, const i64* tables, const char* names,
                      const u8* constants, u64 constant_bytes, const i64* ranges, const char* special,
                      const i64* special_operands) {
  auto* p = new Program;
  p->words = u32(header[1]), p->predicates = u32(header[2]), p->registers = u32(header[3]);
  p->local_bytes = u32(header[4]), p->shared_bytes = u32(header[5]);
  for (i64 k = 0; k < header[6] + header[7]; ++k) {
    (k < header[6] ? p->locals : p->shared).emplace_back(ranges[2 * k], ranges[2 * k + 1]);
  }
  p->constants.resize(constant_bytes / 4 + 1);
  memcpy(p->constants.data(), constants, constant_bytes);
  for (auto& name : split(special)) {
    p->special.push_back({name, make_operand(special_operands)});
    special_operands += 5;
  }
  std::vector<Handler> used;
  for (auto& name : split(names)) used.push_back(handlers().at(name));
  std::vector<size_t> first;
  for (i64 k = 0; k < header[0]; ++k, code += 15) {
    const Handler& h = used[size_t(code[0])];
    Ins i{};
    i.run = h.run, i.taint = h.taint, i.kind = h.kind, i.product = h.async_proxy && h.kind == Kind::CONVERGE;
    p->async_proxy |= h.async_proxy;
    if (code[1]) i.guarded = true, i.guard = make_operand(operands + 5 * (code[1] - 1));
    i.nd = u8(code[3]), i.ns = u8(code[4]);
    first.push_back(p->operands.size());
    for (i64 o = code[2]; o < code[2] + i.nd + i.ns; ++o) p->operands.push_back(make_operand(operands + 5 * o));
    i.imm = code[5];
    for (int a = 0; a < 6; ++a) i.aux[size_t(a)] = u32(code[6 + a]);
    i.target = u32(code[12]);
    p->tables.emplace_back(tables + code[13], tables + code[13] + code[14]);
    p->code.push_back(i);
  }
  for (size_t k = 0; k < p->code.size(); ++k) {
    p->code[k].ops = p->operands.data() + first[k];
    p->code[k].table = &p->tables[k];
  }
  return p;
}

API void ptx_program_free(void* program) { delete static_cast<Program*>(program); }

// config: grid x y z, block x y z, dynamic shared bytes, workers, most instructions, most findings, races, conflicts,
// Chip, cluster x y z
// buffers: device address, bytes, host address, address of the byte states or 0, writable, granule shift
API void* ptx_launch(const void* program, const i64* config, const u8* params, u64 param_bytes, const i64* buffers,
                     const char* buffer_names, u64* counts, u64* conflicts) {
  Launch launch;
  launch.program = static_cast<const Program*>(program);
  for (size_t k = 0; k < 3; ++k) launch.grid[k] = u32(config[k]), launch.block[k] = u32(config[3 + k]);
  launch.dynamic_shared = u32(config[6]);
  launch.max_instructions = u64(config[8]), launch.max_findings = u32(config[9]);
  launch.races = config[10] != 0, launch.chip = Chip(config[12]);
  for (size_t k = 0; k < 3; ++k) launch.cluster[k] = u32(config[13 + k]);
  launch.params.assign(params, params + param_bytes);
  std::vector<u32> granules;
  for (auto& name : split(buffer_names)) {
    Buffer b;
    b.begin = u64(buffers[0]), b.end = b.begin + u64(buffers[1]);
    b.host = reinterpret_cast<u8*>(buffers[2]), b.state = reinterpret_cast<u8*>(buffers[3]);
    b.writable = buffers[4] != 0, b.name = name;
    granules.push_back(u32(buffers[5]));
    launch.buffers.push_back(std::move(b));
    buffers += 6;
  }
  const size_t n = launch.program->code.size();
  if (config[11]) launch.conflicts.resize(n);
  run(launch, u32(config[7]), granules);
  std::copy(launch.counts.begin(), launch.counts.end(), counts);
  std::copy(launch.conflicts.begin(), launch.conflicts.end(), conflicts);
  auto* result = new Result;
  for (auto& [key, f] : launch.findings) {
    result->findings += f.kind + FIELD + f.message;
    for (i64 v : {i64(f.pc), i64(f.block), i64(f.thread), f.reg, f.origin, i64(f.count)}) {
      result->findings += FIELD + std::to_string(v);
    }
    result->findings += RECORD;
  }
  for (auto& text : launch.printed) result->printed += text;
  return result;
}

API const char* ptx_findings(const void* result) { return static_cast<const Result*>(result)->findings.c_str(); }
API const char* ptx_printed(const void* result) { return static_cast<const Result*>(result)->printed.c_str(); }
API void ptx_result_free(void* result) { delete static_cast<Result*>(result); }
