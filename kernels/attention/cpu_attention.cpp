// C ABI of the vote-weighted attention (see __init__.py for the contract). No torch headers: compiles in
// seconds. Returns 0, kBadRow / kBadSlot when an index would read outside the pool, or kNoMemory (the output is then
// unspecified).
#include <algorithm>
#include <omp.h>
#include "cpu_extend.h"

using namespace keepkv;

namespace {

constexpr int kBadRow = 1, kBadSlot = 2, kBadSpan = 4;

struct Args {  // mirrored field by field by cpp_impl._Args
  const void *q, *k, *v;
  const float* votes;
  const int32_t* table;
  const int64_t *rows, *seq_lens, *extend_lens;
  void* out;
  int64_t q_stride, k_stride, v_stride, votes_stride, table_stride, out_stride;
  int64_t slots, table_rows, table_columns, batch, heads_q, heads_kv, dim, causal, threads;
  const Packed* packed;  // or null
  double scale;
};

template <class T> Pool<T> make_pool(const Args& a) {
  return {static_cast<const T*>(a.k), static_cast<const T*>(a.v), a.votes, a.k_stride, a.v_stride, a.votes_stride,
          a.slots, int(a.heads_kv), int(a.heads_q / a.heads_kv), int(a.dim), float(a.scale), int(a.heads_kv)};
}

bool rows_valid(const Args& a) {
  for (int64_t b = 0; b < a.batch; ++b) {
    if (a.seq_lens[b] < 0 || a.seq_lens[b] > a.table_columns) return false;
    if (a.seq_lens[b] > 0 && (a.rows[b] < 0 || a.rows[b] >= a.table_rows)) return false;
    if (a.extend_lens && (a.extend_lens[b] < 0 || (a.seq_lens[b] && a.extend_lens[b] > a.seq_lens[b]))) return false;
  }
  return true;
}

// Every run inside its span's cells, every slot inside the pool.
bool spans_valid(const Args& a) {
  const Packed& p = *a.packed;
  const int64_t spans = p.first[a.batch], runs = p.layers * a.heads_kv;
  if (!a.votes || p.first[0] != 0 || p.layer < 0 || p.layer >= p.layers) return false;
  for (int64_t s = 0; s < spans; ++s) {
    const int64_t* start = p.start + s * (runs + 1);
    if (start[0] != 0 || start[runs] != (p.at[s + 1] - p.at[s]) * runs) return false;
    for (int64_t r = 0; r < runs; ++r)
      if (start[r + 1] < start[r]) return false;
  }
  return slots_valid(p.slots, int(p.at[spans]), a.slots);
}

// The cells of one kv head of one request, from `begin` on.
struct CellBlock { int64_t request, begin; int head, count; };

template <class T, class O> int run_decode(const Args& a) {
  const Pool<T> p = make_pool<T>(a);
  Pool<T> one = p;  // a pool of single heads
  one.heads_kv = 1;
  const int hq = p.heads_q(), hkv = p.heads_kv, dim = p.dim;
  const int64_t stride = int64_t(hq) * (dim + 2), cell_stride = int64_t(p.group) * (dim + 2);
  // Calling thread's scratch, grown on demand and kept: partial results of all blocks.
  static thread_local std::vector<float> partials;
  static thread_local std::vector<int64_t> first, first_cell;
  static thread_local std::vector<CellBlock> cell_blocks;
  first.assign(a.batch + 1, 0), first_cell.assign(a.batch * hkv + 1, 0), cell_blocks.clear();
  for (int64_t b = 0; b < a.batch; ++b) {
    first[b + 1] = first[b] + (a.seq_lens[b] + kBlock - 1) / kBlock;
    for (int h = 0; h < hkv; ++h) {
      const int64_t cells = packed_cells(a.packed, b, hkv, h);
      for (int64_t i0 = 0; i0 < cells; i0 += kBlock)
        cell_blocks.push_back({b, i0, h, int(cells - i0 < kBlock ? cells - i0 : kBlock)});
      first_cell[b * hkv + h + 1] = int64_t(cell_blocks.size());
    }
  }
  const int64_t blocks = first[a.batch], cells = int64_t(cell_blocks.size());
  const int64_t needed = blocks * stride + cells * cell_stride;
  if (int64_t(partials.size()) < needed) partials.resize(needed);
  const int chunks = blocks >= 2 * a.threads ? 1 : hkv;  // few blocks: one kv head per work unit
  float *part = partials.data(), *cell_part = part + blocks * stride;
  const int64_t *starts = first.data(), *cell_starts = first_cell.data();
  const CellBlock* blocks_of_cells = cell_blocks.data();
  std::atomic<int> error{0};

  auto query = [&](int64_t b, int h0, int h1, float* q) {
    const O* src = static_cast<const O*>(a.q) + b * a.q_stride;
    for (int i = h0 * p.group * dim; i < h1 * p.group * dim; ++i) *q++ = to_float(src[i]);
  };
  auto blocks_of = [&](int64_t unit, std::vector<float>& scratch) {
    int64_t block = unit / chunks;
    int64_t b = std::upper_bound(starts, starts + a.batch + 1, block) - starts - 1;
    int64_t i0 = (block - starts[b]) * kBlock;
    int n = int(a.seq_lens[b] - i0 < kBlock ? a.seq_lens[b] - i0 : kBlock);
    const int32_t* slots = a.table + a.rows[b] * a.table_stride + i0;
    if (!slots_valid(slots, n, p.slots)) { error = kBadSlot; return; }
    int c = int(unit % chunks), h0 = chunks == 1 ? 0 : c, h1 = chunks == 1 ? hkv : c + 1;
    float* q = scratch.data() + size_t(hq + hkv) * kBlock;
    query(b, h0, h1, q + size_t(h0) * p.group * dim);
    auto body = dim % kMaxW == 0 ? decode_block<T, kMaxW, Slots<T>> : decode_block<T, 8, Slots<T>>;
    body(p, q, p.entries(slots), n, h0, h1, part + block * stride, scratch.data());
  };
  auto cells_of = [&](int64_t block, std::vector<float>& scratch, Cells<T>& entries) {
    const CellBlock& c = blocks_of_cells[block];
    float* q = scratch.data() + size_t(hq + hkv) * kBlock;
    query(c.request, c.head, c.head + 1, q);
    entries.fill(*a.packed, p, c.request, c.head, c.begin, c.count);
    auto body = dim % kMaxW == 0 ? decode_block<T, kMaxW, Cells<T>> : decode_block<T, 8, Cells<T>>;
    body(one, q, entries, c.count, 0, 1, cell_part + block * cell_stride, scratch.data());
  };
  auto merge_of = [&](int64_t b, std::vector<float>& scratch) {
    O* out = static_cast<O*>(a.out) + b * a.out_stride;
    for (int h = 0; h < hq; ++h) {
      const int64_t* cell = cell_starts + b * hkv + h / p.group;
      merge_blocks({part + starts[b] * stride + h * (dim + 2), stride, int(starts[b + 1] - starts[b])},
                   {cell_part + cell[0] * cell_stride + h % p.group * (dim + 2), cell_stride, int(cell[1] - cell[0])},
                   dim, out + h * dim, scratch.data());
    }
  };
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && blocks * chunks + cells > 1)
  {
    static thread_local std::vector<float> scratch;
    static thread_local Cells<T> entries;
    guard(error, [&] { scratch.resize(size_t(hq + hkv) * kBlock + size_t(hq) * dim); });
#pragma omp for schedule(dynamic, 1)
    for (int64_t u = 0; u < blocks * chunks + cells; ++u)
      guard(error, [&] {
        if (error) return;
        if (u < cells) cells_of(u, scratch, entries);
        else blocks_of(u - cells, scratch);
      });
#pragma omp for schedule(static)
    for (int64_t b = 0; b < a.batch; ++b) guard(error, [&] { if (!error) merge_of(b, scratch); });
  }
  return error;
}

template <class T, class O> int run_extend(const Args& a) {
  const Pool<T> p = make_pool<T>(a);
  std::vector<int64_t> start(a.batch + 1, 0);
  for (int64_t b = 0; b < a.batch; ++b) start[b + 1] = start[b] + a.extend_lens[b];
  // Enough units for the threads, but not below 48 rows: packing would cost as much as the products.
  std::vector<Unit> units;
  for (int64_t rows = 192;; rows /= 2) {
    units.clear();
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t r1 = a.extend_lens[b] * p.group; r1 > 0; r1 = (r1 - 1) / rows * rows)  // longest rows first
        for (int h = 0; h < p.heads_kv; ++h) units.push_back({b, (r1 - 1) / rows * rows, r1, h});
    if (rows <= 48 || int64_t(units.size()) >= 4 * a.threads) break;
  }
  std::atomic<int> error{0};
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && units.size() > 1)
  {
    static thread_local Scratch<T> scratch;
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < units.size(); ++i) {
      const Unit& u = units[i];
      const int64_t b = u.request, len = a.seq_lens[b];
      O* out = static_cast<O*>(a.out) + start[b] * a.out_stride;
      if (len == 0) {  // padding row: its queries see nothing
        for (int64_t r = u.row0; r < u.row1; ++r)
          for (int d = 0; d < p.dim; ++d)
            from_float(0.0f, out + r / p.group * a.out_stride + (u.head * p.group + r % p.group) * p.dim + d);
        continue;
      }
      const int32_t* slots = a.table + a.rows[b] * a.table_stride;
      if (!slots_valid(slots, int(len), p.slots)) { error = kBadSlot; continue; }
      guard(error, [&] {
        extend_unit<T, O>(p, static_cast<const O*>(a.q) + start[b] * a.q_stride, a.q_stride, out, a.out_stride, slots,
                          len, a.extend_lens[b], a.causal != 0, a.packed, u, scratch);
      });
    }
  }
  return error;
}

template <class T> int dispatch(const Args& a, int q_bf16) {
  if (a.extend_lens) return q_bf16 ? run_extend<T, bf16>(a) : run_extend<T, float>(a);
  return q_bf16 ? run_decode<T, bf16>(a) : run_decode<T, float>(a);
}

}  // namespace

extern "C" int keepkv_attention(const void* args, int q_bf16, int kv_bf16) {
  const Args& a = *static_cast<const Args*>(args);
  if (!rows_valid(a)) return kBadRow;
  if (a.packed && !spans_valid(a)) return kBadSpan;
  std::atomic<int> error{0};
  guard(error, [&] { error = kv_bf16 ? dispatch<bf16>(a, q_bf16) : dispatch<float>(a, q_bf16); });
  return error;
}

struct CutArgs {  // mirrored field by field by cpp_impl._Cut
  const int32_t *table, *span_of;
  const int64_t *rows, *lens;
  int32_t *raw, *slots;
  int64_t *raw_lens, *first, *at, *spans;
  int64_t table_stride, raw_stride, table_rows, table_columns, pool, batch;
};

// Each row's slots of one token each, and its packed spans: neighbours with the same number in span_of, 0 for none.
extern "C" int keepkv_cut(const void* args) {
  const CutArgs& a = *static_cast<const CutArgs*>(args);
  int64_t made = 0, slots = 0;
  a.first[0] = a.at[0] = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t len = a.lens[b];
    if (len < 0 || len > a.table_columns || (len > 0 && (a.rows[b] < 0 || a.rows[b] >= a.table_rows))) return kBadRow;
    const int32_t* row = a.table + a.rows[b] * a.table_stride;
    if (!slots_valid(row, int(len), a.pool)) return kBadSlot;
    int32_t* raw = a.raw + b * a.raw_stride;
    int64_t count = 0;
    int32_t open = 0;
    for (int64_t i = 0; i < len; ++i) {
      const int32_t span = a.span_of[row[i]];
      if (span == 0) raw[count++] = row[i];
      if (span != open && span != 0) a.spans[made] = span, a.at[made++] = slots;
      if (span != 0) a.slots[slots++] = row[i];
      open = span;
    }
    a.raw_lens[b] = count, a.first[b + 1] = made;
  }
  a.at[made] = slots;
  return 0;
}

struct GatherArgs {  // mirrored field by field by cpp_impl._Gather
  const Packed* packed;
  const int64_t* layers;
  void* keys;    // [layers][heads][room][dim]
  float* votes;  // [layers][heads][room]
  int64_t count, heads, dim, room, k_stride, votes_stride;
};

namespace {

// Keys and votes of the cells of request 0, the rest of `room` filled up with zero keys without a vote.
template <class T> void gather_cells(const GatherArgs& a) {
  Pool<T> p{};
  p.k_stride = p.v_stride = a.k_stride, p.votes_stride = a.votes_stride, p.dim = int(a.dim), p.heads_all = int(a.heads);
  Cells<T> cells;
  for (int64_t run = 0; run < a.count * a.heads; ++run) {
    Packed packed = *a.packed;
    packed.layer = a.layers[run / a.heads];
    const int head = int(run % a.heads);
    int64_t n = packed_cells(&packed, 0, p.heads_all, head);
    n = n < a.room ? n : a.room;
    cells.fill(packed, p, 0, head, 0, int(n));
    T* keys = static_cast<T*>(a.keys) + run * a.room * a.dim;
    float* votes = a.votes + run * a.room;
    for (int64_t i = 0; i < n; ++i) {
      std::memcpy(keys + i * a.dim, cells.key(int(i)), sizeof(T) * a.dim);
      votes[i] = *cells.vote(int(i));
    }
    std::memset(static_cast<void*>(keys + n * a.dim), 0, sizeof(T) * (a.room - n) * a.dim);
    for (int64_t i = n; i < a.room; ++i) votes[i] = kNegInf;
  }
}

}  // namespace

extern "C" int keepkv_gather_cells(const void* args, int kv_bf16) {
  const GatherArgs& a = *static_cast<const GatherArgs*>(args);
  std::atomic<int> error{0};
  guard(error, [&] { kv_bf16 ? gather_cells<bf16>(a) : gather_cells<float>(a); });
  return error;
}
