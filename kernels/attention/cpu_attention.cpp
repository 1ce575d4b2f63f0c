// C ABI of the vote-weighted attention (see __init__.py for the contract). No torch headers: compiles in
// seconds. Returns 0, kBadRow / kBadSlot when an index would read outside the pool, or kNoMemory (the output is then
// unspecified).
#include <algorithm>
#include <omp.h>
#include "cpu_extend.h"

using namespace keepkv;

namespace {

constexpr int kBadRow = 1, kBadSlot = 2;

struct Args {  // mirrored field by field by cpp_impl._Args
  const void *q, *k, *v;
  const float* votes;
  const int32_t* table;
  const int64_t *rows, *seq_lens, *extend_lens;
  void* out;
  int64_t q_stride, k_stride, v_stride, votes_stride, table_stride, out_stride;
  int64_t slots, table_rows, table_columns, batch, heads_q, heads_kv, dim, causal, threads;
  double scale;
};

template <class T> Pool<T> make_pool(const Args& a) {
  return {static_cast<const T*>(a.k), static_cast<const T*>(a.v), a.votes, a.k_stride, a.v_stride, a.votes_stride,
          a.slots, int(a.heads_kv), int(a.heads_q / a.heads_kv), int(a.dim), float(a.scale)};
}

bool rows_valid(const Args& a) {
  for (int64_t b = 0; b < a.batch; ++b) {
    if (a.seq_lens[b] < 0 || a.seq_lens[b] > a.table_columns) return false;
    if (a.seq_lens[b] > 0 && (a.rows[b] < 0 || a.rows[b] >= a.table_rows)) return false;
    if (a.extend_lens && (a.extend_lens[b] < 0 || (a.seq_lens[b] && a.extend_lens[b] > a.seq_lens[b]))) return false;
  }
  return true;
}

template <class T, class O> int run_decode(const Args& a) {
  const Pool<T> p = make_pool<T>(a);
  const int hq = p.heads_q(), hkv = p.heads_kv, dim = p.dim;
  const int64_t stride = int64_t(hq) * (dim + 2);
  // Calling thread's scratch, grown on demand and kept: partial results of all blocks.
  static thread_local std::vector<float> partials;
  static thread_local std::vector<int64_t> first;
  first.assign(a.batch + 1, 0);
  for (int64_t b = 0; b < a.batch; ++b) first[b + 1] = first[b] + (a.seq_lens[b] + kBlock - 1) / kBlock;
  const int64_t blocks = first[a.batch];
  if (int64_t(partials.size()) < blocks * stride) partials.resize(blocks * stride);
  const int chunks = blocks >= 2 * a.threads ? 1 : hkv;  // few blocks: one kv head per work unit
  float* part = partials.data();
  const int64_t* starts = first.data();
  std::atomic<int> error{0};

  auto blocks_of = [&](int64_t unit, std::vector<float>& scratch) {
    int64_t block = unit / chunks;
    int64_t b = std::upper_bound(starts, starts + a.batch + 1, block) - starts - 1;
    int64_t i0 = (block - starts[b]) * kBlock;
    int n = int(a.seq_lens[b] - i0 < kBlock ? a.seq_lens[b] - i0 : kBlock);
    const int32_t* slots = a.table + a.rows[b] * a.table_stride + i0;
    if (!slots_valid(slots, n, p.slots)) { error = kBadSlot; return; }
    int c = int(unit % chunks), h0 = chunks == 1 ? 0 : c, h1 = chunks == 1 ? hkv : c + 1;
    scratch.resize(size_t(hq + hkv) * kBlock + size_t(hq) * dim);
    float* q = scratch.data() + size_t(hq + hkv) * kBlock;
    const O* src = static_cast<const O*>(a.q) + b * a.q_stride;
    for (int i = h0 * p.group * dim; i < h1 * p.group * dim; ++i) q[i] = to_float(src[i]);
    auto body = dim % kMaxW == 0 ? decode_block<T, kMaxW> : decode_block<T, 8>;
    body(p, q, slots, n, h0, h1, part + block * stride, scratch.data());
  };
  auto merge_of = [&](int64_t b, std::vector<float>& scratch) {
    scratch.resize(size_t(hq + hkv) * kBlock + size_t(hq) * dim);
    O* out = static_cast<O*>(a.out) + b * a.out_stride;
    for (int h = 0; h < hq; ++h)
      merge_blocks(part + starts[b] * stride + h * (dim + 2), stride, int(starts[b + 1] - starts[b]), dim,
                   out + h * dim, scratch.data());
  };
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && blocks * chunks > 1)
  {
    static thread_local std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t u = 0; u < blocks * chunks; ++u) guard(error, [&] { blocks_of(u, scratch); });
#pragma omp for schedule(static)
    for (int64_t b = 0; b < a.batch; ++b) guard(error, [&] { merge_of(b, scratch); });
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
    static thread_local Scratch scratch;
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
                          len, a.extend_lens[b], a.causal != 0, u, scratch);
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
  std::atomic<int> error{0};
  guard(error, [&] { error = kv_bf16 ? dispatch<bf16>(a, q_bf16) : dispatch<float>(a, q_bf16); });
  return error;
}
