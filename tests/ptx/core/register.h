// The table of instructions: the decoder (decode.py) asks for a handler by name.
#pragma once

#include "core.h"

namespace ptx {

inline void add(const std::string& name, Run run, Kind kind = Kind::PLAIN, Run taint = nullptr,
                bool async_proxy = false) {
  handlers()[name] = Handler{run, taint, kind, async_proxy};
}

void register_integer();
void register_move();
void register_float();
void register_approximate();
void register_half();
void register_convert();
void register_memory();
void register_warp();
void register_matrix();
void register_wgmma();
void register_bulk();
void register_cluster();
void register_system();

}  // namespace ptx
