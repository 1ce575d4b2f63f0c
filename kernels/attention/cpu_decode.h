// Decode: one query per request. The KV of a request is cut into blocks of kBlock keys, counted from its
// start. A block's result depends on its own keys alone and blocks are merged in order, so the bits of a
// request's output do not depend on batch neighbours, slot placement or thread count.
#pragma once
#include "cpu_cells.h"

namespace keepkv {

constexpr int kBlock = 256;

template <class T> struct Pool {
  const T *k, *v;
  const float* votes;  // log votes, or null for plain attention
  int64_t k_stride, v_stride, votes_stride, slots;
  int heads_kv, group, dim;  // group: query heads per kv head
  float scale;
  int heads_all;  // kv heads of a slot: heads_kv, or more where a pool of single heads is looked at (cells)
  int heads_q() const { return heads_kv * group; }
  Slots<T> entries(const int32_t* row) const { return {k, v, votes, k_stride, v_stride, votes_stride, row}; }
};

INL bool slots_valid(const int32_t* slots, int n, int64_t limit) {
  bool ok = true;
  for (int i = 0; i < n; ++i) ok &= slots[i] >= 0 && slots[i] < limit;
  return ok;
}

// out[g][j] = q[g] . k[j] for KT keys and GC heads that share each key load.
template <class T, int W, int KT, int GC>
INL void dot_tile(const T* const* keys, int64_t offset, const float* q, int dim, float* out) {
  vf<W> acc[GC][KT] = {};
  for (int d = 0; d < dim; d += W) {
    vf<W> qv[GC];
    for (int g = 0; g < GC; ++g) qv[g] = load<W>(q + g * dim + d);
    for (int j = 0; j < KT; ++j) {
      vf<W> kv = load<W>(keys[j] + offset + d);
      for (int g = 0; g < GC; ++g) acc[g][j] += qv[g] * kv;
    }
  }
  for (int g = 0; g < GC; ++g)
    for (int j = 0; j < KT; j += 4) hsum4<W>(acc[g] + j, out + g * kBlock + j);
}

// acc[g][d0 : d0 + NV*W] += sum_j weight[g][j] * v[j], in key order.
template <class T, int W, int NV, int GC>
INL void weigh_tile(const T* const* rows, int n, int64_t offset, const float* weight, int width, float* acc) {
  vf<W> a[GC][NV];
  for (int g = 0; g < GC; ++g)
    for (int c = 0; c < NV; ++c) a[g][c] = load<W>(acc + g * width + c * W);
  for (int j = 0; j < n; ++j) {
    vf<W> vv[NV];
    for (int c = 0; c < NV; ++c) vv[c] = load<W>(rows[j] + offset + c * W);
    for (int g = 0; g < GC; ++g)
      for (int c = 0; c < NV; ++c) a[g][c] += weight[g * kBlock + j] * vv[c];
  }
  for (int g = 0; g < GC; ++g)
    for (int c = 0; c < NV; ++c) store<W>(acc + g * width + c * W, a[g][c]);
}

template <class T, int W, int GC>
INL void weigh_row(const T* const* rows, int n, int64_t offset, const float* weight, int width, int dim,
                   float* acc) {
  int d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) weigh_tile<T, W, 4, GC>(rows, n, offset + d, weight, width, acc + d);
  for (; d < dim; d += W) weigh_tile<T, W, 1, GC>(rows, n, offset + d, weight, width, acc + d);
}

// One block of n <= kBlock keys, kv heads [h0, h1). part: [heads_q][dim + 2] receives the unnormalised sum,
// the maximum and the denominator. scratch: heads_q * kBlock logits, then heads_kv * kBlock votes.
template <class T, int W, class E>
void decode_block(const Pool<T>& p, const float* q, const E& entries, int n, int h0, int h1, float* part,
                  float* scratch) {
  constexpr int KT = W == 16 ? 8 : 4;  // KT * 3 heads of accumulators fill the register file
  const int dim = p.dim, G = p.group, width = dim + 2;
  const int row_bytes = (h1 - h0) * dim * int(sizeof(T));
  float* logits = scratch;
  float* bias = scratch + int64_t(p.heads_q()) * kBlock;
  const int padded = (n + W - 1) / W * W;
  for (int h = h0; h < h1; ++h)
    for (int i = n; i < padded; ++i) bias[h * kBlock + i] = kNegInf;

  for (int i0 = 0; i0 < n; i0 += KT) {
    const T* keys[KT];
    for (int j = 0; j < KT; ++j) {
      int i = i0 + j < n ? i0 + j : n - 1;  // past the end: any valid key, its logit is discarded
      keys[j] = entries.key(i);
    }
    for (int j = 0; j < KT; ++j) {
      int i = i0 + j + KT;
      if (E::kScattered && i < n) prefetch_row(entries.key(i) + h0 * dim, row_bytes);
    }
    if (p.votes && E::kScattered)  // like the keys, read behind the products
      for (int j = 0; j < KT && i0 + j < n; ++j) __builtin_prefetch(entries.vote(i0 + j) + h0, 0, 2);
    for (int h = h0; h < h1; ++h)
      for (int g = 0; g < G;) {
        const float* qg = q + (h * G + g) * dim;
        float* out = logits + (h * G + g) * kBlock + i0;
        int left = G - g;
        if (left == 3 || left > 4) dot_tile<T, W, KT, 3>(keys, h * dim, qg, dim, out), g += 3;
        else if (left > 1) dot_tile<T, W, KT, 2>(keys, h * dim, qg, dim, out), g += 2;
        else dot_tile<T, W, KT, 1>(keys, h * dim, qg, dim, out), g += 1;
      }
  }
  for (int j = 0; j < KT && j < n; ++j) prefetch_row(entries.value(j) + h0 * dim, row_bytes);
  for (int i = 0; i < n; ++i)
    for (int h = h0; h < h1; ++h) bias[h * kBlock + i] = p.votes ? entries.vote(i)[h] : 0.0f;

  for (int head = h0 * G; head < h1 * G; ++head) {
    float* s = logits + head * kBlock;
    const float* b = bias + head / G * kBlock;
    vf<W> top = splat<W>(kNegInf), total = {};
    for (int i = 0; i < padded; i += W) {
      vf<W> vote = load<W>(b + i);
      vf<W> x = load<W>(s + i) * p.scale + vote;
      x = vote > splat<W>(kMasked) ? x : splat<W>(kNegInf);
      store<W>(s + i, x);
      top = vmax<W>(x, top);  // a NaN is never the largest; it gets into the sums
    }
    float m = hmax<W>(top);
    float shift = m == kNegInf ? 0.0f : m;  // everything masked: exp(-inf) = 0, not NaN
    for (int i = 0; i < padded; i += W) {
      vf<W> e = vexp<W>(load<W>(s + i) - shift);
      store<W>(s + i, e);
      total += e;
    }
    float* o = part + head * width;
    o[dim] = m;
    o[dim + 1] = hsum<W>(total);
    std::memset(o, 0, sizeof(float) * dim);
  }

  for (int i0 = 0; i0 < n; i0 += KT) {
    const T* rows[KT];
    int count = n - i0 < KT ? n - i0 : KT;
    for (int j = 0; j < count; ++j) rows[j] = entries.value(i0 + j);
    for (int j = 0; j < KT; ++j) {
      int i = i0 + j + KT;
      if (E::kScattered && i < n) prefetch_row(entries.value(i) + h0 * dim, row_bytes);
    }
    for (int h = h0; h < h1; ++h)
      for (int g = 0; g < G;) {
        const float* weight = logits + (h * G + g) * kBlock + i0;
        float* acc = part + (h * G + g) * width;
        int left = G - g;
        if (left == 3 || left > 4) weigh_row<T, W, 3>(rows, count, h * dim, weight, width, dim, acc), g += 3;
        else if (left > 1) weigh_row<T, W, 2>(rows, count, h * dim, weight, width, dim, acc), g += 2;
        else weigh_row<T, W, 1>(rows, count, h * dim, weight, width, dim, acc), g += 1;
      }
  }
}

// Partial results of a query head's blocks, [dim + 2] each, `stride` apart.
struct Blocks { const float* part; int64_t stride; int count; };

// Merges the blocks of one query head in order, those of its cells behind those of its slots; everything masked or no
// key at all gives zeros, a NaN logit NaN.
template <class O> void merge_blocks(const Blocks& slots, const Blocks& cells, int dim, O* out, float* acc) {
  const int blocks = slots.count + cells.count;
  auto block = [&](int s) {
    return s < slots.count ? slots.part + s * slots.stride : cells.part + (s - slots.count) * cells.stride;
  };
  float top = kNegInf, total = 0.0f;
  for (int s = 0; s < blocks; ++s) top = block(s)[dim] > top ? block(s)[dim] : top;
  std::memset(acc, 0, sizeof(float) * dim);
  for (int s = 0; s < blocks && top != kNegInf; ++s) {
    const float* o = block(s);
    float w = exp1(o[dim] - top);
    total += w * o[dim + 1];
    for (int d = 0; d < dim; ++d) acc[d] += w * o[d];
  }
  float none = 0.0f;  // the denominators of blocks without a maximum: zeros, or NaN
  for (int s = 0; s < blocks && top == kNegInf; ++s) none += block(s)[dim + 1];
  float inverse = top == kNegInf ? none : 1.0f / total;
  for (int d = 0; d < dim; ++d) from_float(acc[d] * inverse, out + d);
}

}  // namespace keepkv
