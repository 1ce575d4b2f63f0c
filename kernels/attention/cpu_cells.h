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

template <class T> INL void prefetch_row(const T* p, int bytes) {
  const char* c = reinterpret_cast<const char*>(p);
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(c + i, 0, 2);
}

// Where entry i of a head finds its key, value and vote: a slot of the row, ...
template <class T> struct Slots {
  static constexpr bool kScattered = true;  // keys, values and votes are fetched ahead, slot by slot
  const T *k, *v;
  const float* votes;
  int64_t k_stride, v_stride, votes_stride;
  const int32_t* slots;
  INL const T* key(int i) const { return k + slots[i] * k_stride; }
  INL const T* value(int i) const { return v + slots[i] * v_stride; }
  INL const float* vote(int i) const { return votes ? votes + slots[i] * votes_stride : nullptr; }
};

// ... or a cell. Votes are read when the list is made, and lie beside each other.
template <class T> struct Cells {
  static constexpr bool kScattered = false;
  std::vector<const T*> keys, values;
  std::vector<float> votes;
  INL const T* key(int i) const { return keys[i]; }
  INL const T* value(int i) const { return values[i]; }
  INL const float* vote(int i) const { return votes.data() + i; }

  // Entries [begin, begin + n) of a head's run.
  template <class P> void fill(const Packed& c, const P& p, int64_t request, int head, int64_t begin, int n) {
    keys.resize(n), values.resize(n), votes.resize(n);
    const int64_t heads = p.heads_all, width = c.layers * heads + 1, run = c.layer * heads + head;
    int made = 0;
    for (int64_t s = c.first[request]; s < c.first[request + 1] && made < n; ++s) {
      const int64_t* start = c.start + s * width;
      const int64_t cells = start[run + 1] - start[run], m = c.at[s + 1] - c.at[s];
      if (begin >= cells) { begin -= cells; continue; }
      const int64_t f = start[run] + begin, left = cells - begin;
      const int end = int(left < n - made ? made + left : n);
      int64_t layer = f / (m * heads), slot = f % (m * heads) / heads, h = f % heads;
      const int32_t* slots = c.slots + c.at[s];
      for (; made < end; ++layer, slot = 0) {
        const T *k = static_cast<const T*>(c.k[layer]), *v = static_cast<const T*>(c.v[layer]);
        const float* vote = c.votes[layer];
        for (; slot < m && made < end; ++slot, h = 0) {
          const int64_t at = slots[slot];
          const T *key = k + at * p.k_stride, *value = v + at * p.v_stride;
          const float* own = vote + at * p.votes_stride;
          const int bytes = int((end - made < heads - h ? end - made : heads - h) * p.dim * sizeof(T));
          prefetch_row(key + h * p.dim, bytes), prefetch_row(value + h * p.dim, bytes);
          for (; h < heads && made < end; ++h, ++made) {
            keys[made] = key + h * p.dim, values[made] = value + h * p.dim, votes[made] = own[h];
          }
        }
      }
      begin = 0;
    }
  }
};

}  // namespace keepkv
