// Packed spans: the cells of m slots, one K and V vector per layer and kv head, shared out in runs (packed.py).
// Cells are numbered over (layer, slot, head); run (l, h) of a span begins at cell start[l * heads + h].
#pragma once
#include <vector>
#include "../cpu_vec.h"

namespace keepkv {

struct Packed {  // mirrored field by field by cpp_impl._Packed; all of one batch and one layer
  const void *const *k, *const *v;  // of each layer
  const float* const* votes;
  const int64_t* first;   // [batch + 1]: the spans of each request
  const int64_t* at;      // [spans + 1]: the slots of each span
  const int32_t* slots;
  const int64_t* start;   // [spans][layers * heads + 1]
  int64_t layers, layer;
};

// Run of a head over all spans of one request.
inline int64_t packed_cells(const Packed* p, int64_t request, int heads, int head) {
  if (!p) return 0;
  int64_t total = 0, width = p->layers * heads + 1, run = p->layer * heads + head;
  for (int64_t s = p->first[request]; s < p->first[request + 1]; ++s)
    total += p->start[s * width + run + 1] - p->start[s * width + run];
  return total;
}

// Where entry i of a head finds its key, value and vote: a slot of the row, ...
template <class T> struct Slots {
  const T *k, *v;
  const float* votes;
  int64_t k_stride, v_stride, votes_stride;
  const int32_t* slots;
  INL const T* key(int i) const { return k + slots[i] * k_stride; }
  INL const T* value(int i) const { return v + slots[i] * v_stride; }
  INL const float* vote(int i) const { return votes ? votes + slots[i] * votes_stride : nullptr; }
};

// ... or a cell.
template <class T> struct Cells {
  std::vector<const T*> keys, values;
  std::vector<const float*> votes;
  INL const T* key(int i) const { return keys[i]; }
  INL const T* value(int i) const { return values[i]; }
  INL const float* vote(int i) const { return votes[i]; }

  // Entries [begin, begin + n) of a head's run.
  template <class P> void fill(const Packed& c, const P& p, int64_t request, int head, int64_t begin, int n) {
    keys.resize(n), values.resize(n), votes.resize(n);
    const int heads = p.heads_all;
    const int64_t width = c.layers * heads + 1, run = c.layer * heads + head;
    int made = 0;
    for (int64_t s = c.first[request]; s < c.first[request + 1] && made < n; ++s) {
      const int64_t* start = c.start + s * width;
      const int64_t cells = start[run + 1] - start[run], each = (c.at[s + 1] - c.at[s]) * heads;
      if (begin >= cells) { begin -= cells; continue; }
      int64_t f = start[run] + begin, left = cells - begin;
      int64_t layer = f / each, slot = f % each / heads, h = f % heads;
      const int32_t* slots = c.slots + c.at[s];
      for (; left > 0 && made < n; --left, ++made) {
        keys[made] = static_cast<const T*>(c.k[layer]) + slots[slot] * p.k_stride + h * p.dim;
        values[made] = static_cast<const T*>(c.v[layer]) + slots[slot] * p.v_stride + h * p.dim;
        votes[made] = c.votes[layer] + slots[slot] * p.votes_stride + h;
        if (++h == heads) {
          h = 0;
          if (++slot * heads == each) slot = 0, ++layer;
        }
      }
      begin = 0;
    }
  }
};

}  // namespace keepkv
