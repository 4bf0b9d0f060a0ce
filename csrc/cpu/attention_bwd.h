// What backward in float (attention_bwd.cpp) and on the bfloat16 units (attention_units_bwd.cpp) share: where the
// gradients of a task go.
#pragma once

#include "attention_tile.h"

namespace fastlm::cpu {

// dk and dv of a task's keys, (sk, ld), before their factors: a.scale, and scale_v.
struct KeyGradients {
  const float *dk, *dv;
  int64_t ld;
  float scale_v;
};

// To dk and dv, by write(from, factor, to), or to the partials of heads that share keys.
template <class T, class Write>
void write_key_gradients(const Attention& a, const AttentionBackward& g, const Sequence& s, int64_t head,
                         const KeyGradients& x, Write write) {
  const int64_t row = a.heads * a.d, at = s.row_k * row + head * a.d;
  if (a.heads == a.kv_heads) {
    write(x.dk, a.scale, static_cast<T*>(g.dk) + at);
    write(x.dv, x.scale_v, static_cast<T*>(g.dv) + at);
  } else {
    float* partial = g.partial + at;
    write_rows(x.dk, x.ld, s.sk, a.d, a.scale, partial, row);
    write_rows(x.dv, x.ld, s.sk, a.d, x.scale_v, partial + a.rows_k() * row, row);
  }
}

// A task's gradient of the table, from dbias.
inline void add_table(const Attention& a, const Buckets& buckets, const AttentionBackward& g, const Sequence& s,
                      int64_t head, const float* dbias) {
  float* dtable = g.dtable_partial + s.b * a.buckets() * a.heads + head;
  for (int64_t bucket = 0; bucket < a.buckets(); ++bucket) dtable[bucket * a.heads] = 0.0f;
  for (int64_t t = 0; t < s.sq + s.sk - 1; ++t) dtable[buckets.at(s, t) * a.heads] += dbias[t];
}

}  // namespace fastlm::cpu
