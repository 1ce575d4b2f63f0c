// Extend: flash-style attention of the new queries over cached and new keys. The queries of all heads of a
// group are rows of one matrix (row = query * group + head), so packed K and V serve the whole group. Key
// blocks start at multiples of kKeys from the request's first key and a row's arithmetic does not depend on
// the rows around it: the output bits do not depend on how rows are split into work units.
#pragma once
#include <vector>
#include "cpu_decode.h"

namespace keepkv {

constexpr int kKeys = 128;  // keys per packed block: K and V of a 64-wide head stay in L2 beside the row state
constexpr int kRows = 6;    // register tile: kRows x kVecs accumulators, kVecs loads, one broadcast
#if defined(__AVX512F__)
constexpr int kVecs = 4;
#elif defined(__AVX__)
constexpr int kVecs = 2;
#else
constexpr int kVecs = 1;
#endif
constexpr int kPanel = kVecs * kMaxW;  // keys per packed panel
static_assert(kKeys % kPanel == 0 && kPanel % 8 == 0);

struct Unit { int64_t request, row0, row1; int head; };

template <class T> struct Scratch {
  std::vector<float> k, v, q, acc, total, top, bias;
  Cells<T> cells;
};

// s[r][0:kPanel] = q[r] . panel, for kRows rows.
INL void score_panel(const float* q, const float* panel, int dim, float* s) {
  constexpr int W = kMaxW;
  vf<W> acc[kRows][kVecs] = {};
  for (int d = 0; d < dim; ++d) {
    vf<W> kv[kVecs];
    for (int c = 0; c < kVecs; ++c) kv[c] = load<W>(panel + d * kPanel + c * W);
    for (int r = 0; r < kRows; ++r) {
      vf<W> qb = splat<W>(q[r * dim + d]);
      for (int c = 0; c < kVecs; ++c) acc[r][c] += qb * kv[c];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kVecs; ++c) store<W>(s + r * kKeys + c * W, acc[r][c]);
}

// acc[r][0 : NV*W] += sum_j weight[r][j] * v[j], in key order, for kRows rows.
template <int NV> INL void weigh_panel(const float* v, int n, const float* weight, int width, float* acc) {
  constexpr int W = kMaxW;
  vf<W> a[kRows][NV];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < NV; ++c) a[r][c] = load<W>(acc + r * width + c * W);
  for (int j = 0; j < n; ++j) {
    vf<W> vv[NV];
    for (int c = 0; c < NV; ++c) vv[c] = load<W>(v + j * width + c * W);
    for (int r = 0; r < kRows; ++r) {
      vf<W> pb = splat<W>(weight[r * kKeys + j]);
      for (int c = 0; c < NV; ++c) a[r][c] += pb * vv[c];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < NV; ++c) store<W>(acc + r * width + c * W, a[r][c]);
}

// Online softmax of one row: logits s[0:n) become weights, state (top, total) and acc are rescaled if the
// maximum grew. visible: keys of this block the row may see. Rescaling is skipped when the factor is exactly
// 1.
INL void soften_row(float* s, const float* bias, float scale, int visible, int n, float* top, float* total, int width,
                    float* acc) {
  constexpr int W = kMaxW;
  const vf<W> masked = splat<W>(kMasked), neg = splat<W>(kNegInf);
  int used = visible < n ? visible : n;
  typename V<W>::i lane;
  for (int c = 0; c < W; ++c) lane[c] = c;
  vf<W> best = neg;
  for (int i = 0; i < n; i += W) {
    vf<W> vote = load<W>(bias + i);
    vf<W> x = load<W>(s + i) * scale + vote;
    x = vote > masked ? x : neg;
    if (i + W > used) x = lane < used - i ? x : neg;
    store<W>(s + i, x);
    best = vmax<W>(x, best);  // a NaN is never the largest; it gets into the sums
  }
  float m = hmax<W>(best);
  m = m > *top ? m : *top;
  float shift = m == kNegInf ? 0.0f : m;
  vf<W> sum = {};
  for (int i = 0; i < n; i += W) {
    vf<W> e = vexp<W>(load<W>(s + i) - shift);
    store<W>(s + i, e);
    sum += e;
  }
  if (m != *top) {
    float w = exp1(*top - shift);
    for (int d = 0; d < width; d += W) store<W>(acc + d, load<W>(acc + d) * w);
    store<W>(total, load<W>(total) * w);
    *top = m;
  }
  store<W>(total, load<W>(total) + sum);
}

// Packs n keys of one kv head: K transposed in panels, V in rows of width floats, votes; pads with
// zeros (K) and masked votes.
template <class T, class E>
void pack_block(const Pool<T>& p, const E& entries, int n, int head, int width, Scratch<T>& w) {
  const int dim = p.dim;
  for (int j0 = 0; j0 < kKeys && j0 / kPanel * kPanel < n; j0 += 8) {
    const T* keys[8];
    for (int j = 0; j < 8; ++j)
      keys[j] = j0 + j < n ? entries.key(j0 + j) + int64_t(head) * dim : nullptr;
    transpose8(keys, dim, w.k.data() + int64_t(j0 / kPanel) * kPanel * dim + j0 % kPanel, kPanel);
  }
  for (int j = 0; j < n; ++j) {
    const T* src = entries.value(j) + int64_t(head) * dim;
    for (int d = 0; d < dim; d += 8) store<8>(w.v.data() + j * width + d, load<8>(src + d));
  }
  for (int j = 0; j < kKeys; ++j)
    w.bias[j] = j >= n ? kNegInf : p.votes ? entries.vote(j)[head] : 0.0f;
}

// Rows [row0, row1) of one request and kv head. q, out: first query of the request. slots, len: of its KV slots. cells:
// its packed spans or null, all of them in front of the new tokens.
template <class T, class O>
void extend_unit(const Pool<T>& p, const O* q, int64_t q_stride, O* out, int64_t out_stride, const int32_t* slots,
                 int64_t len, int64_t extend, bool causal, const Packed* cells, const Unit& u, Scratch<T>& w) {
  constexpr int W = kMaxW;
  const int dim = p.dim, G = p.group, width = (dim + W - 1) / W * W;
  const int rows = int(u.row1 - u.row0), padded = (rows + kRows - 1) / kRows * kRows;
  w.k.resize(size_t(kKeys) * dim), w.v.assign(size_t(kKeys) * width, 0.0f), w.bias.resize(kKeys);
  w.q.assign(size_t(padded) * dim, 0.0f), w.acc.assign(size_t(padded) * width, 0.0f);
  w.total.assign(size_t(padded) * W, 0.0f), w.top.assign(padded, kNegInf);
  auto visible = [&](int r) { return causal ? len - extend + (u.row0 + r) / G + 1 : len; };
  for (int r = 0; r < rows; ++r) {
    const O* src = q + (u.row0 + r) / G * q_stride + (int64_t(u.head) * G + (u.row0 + r) % G) * dim;
    for (int d = 0; d < dim; ++d) w.q[size_t(r) * dim + d] = to_float(src[d]);
  }
  alignas(64) float s[kRows * kKeys];
  // The n keys of the packed block; seen(r): how many of them row r sees.
  auto absorb = [&](int n, auto seen) {
    for (int r0 = 0; r0 < padded; r0 += kRows) {
      int last = (r0 + kRows < rows ? r0 + kRows : rows) - 1;
      int64_t most = seen(last);
      if (most <= 0) continue;
      int keys = most < n ? int(most) : n, panels = (keys + kPanel - 1) / kPanel;
      for (int c = 0; c < panels; ++c)
        score_panel(&w.q[size_t(r0) * dim], &w.k[size_t(c) * kPanel * dim], dim, s + c * kPanel);
      for (int r = 0; r < kRows; ++r) {
        int64_t mine = seen(r0 + r);
        soften_row(s + r * kKeys, w.bias.data(), p.scale, int(mine < 0 ? 0 : mine < kKeys ? mine : kKeys),
                   panels * kPanel, &w.top[r0 + r], &w.total[size_t(r0 + r) * W], width,
                   &w.acc[size_t(r0 + r) * width]);
      }
      float* acc = &w.acc[size_t(r0) * width];
      int d = 0;
      for (; d + kVecs * W <= width; d += kVecs * W) weigh_panel<kVecs>(&w.v[d], keys, s, width, acc + d);
      for (; d < width; d += W) weigh_panel<1>(&w.v[d], keys, s, width, acc + d);
    }
  };
  const int64_t end = visible(rows - 1);
  for (int64_t k0 = 0; k0 < end; k0 += kKeys) {
    const int n = int(end - k0 < kKeys ? end - k0 : kKeys);
    pack_block(p, p.entries(slots + k0), n, u.head, width, w);
    absorb(n, [&](int r) { return visible(r) - k0; });
  }
  const int64_t packed = packed_cells(cells, u.request, p.heads_all, u.head);
  for (int64_t k0 = 0; k0 < packed; k0 += kKeys) {
    const int n = int(packed - k0 < kKeys ? packed - k0 : kKeys);
    w.cells.fill(*cells, p, u.request, u.head, k0, n);
    pack_block(p, w.cells, n, 0, width, w);
    absorb(n, [&](int) { return int64_t(n); });
  }
  for (int r = 0; r < rows; ++r) {
    O* dst = out + (u.row0 + r) / G * out_stride + (int64_t(u.head) * G + (u.row0 + r) % G) * dim;
    float total = hsum<W>(load<W>(&w.total[size_t(r) * W]));
    float inverse = w.top[r] == kNegInf ? total : 1.0f / total;  // everything masked: 0, or NaN
    for (int d = 0; d < dim; ++d) from_float(w.acc[size_t(r) * width + d] * inverse, dst + d);
  }
}

}  // namespace keepkv
