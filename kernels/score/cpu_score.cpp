// What a window of queries sees of a span, in one pass over packed panels of queries; the contract is cpp_impl.py's.
//
// A panel is kVecs * kMaxW query rows, one per lane. Its logits against the whole span are in the cache, if the span is
// not too long, for the three steps that need them: softmax denominator, sums over the queries per token, attention
// outputs. One kv head is one work unit: its bits do not depend on the other heads or on the number of threads.
#include <algorithm>
#include <omp.h>
#include <vector>
#include "../cpu_tile.h"

using namespace keepkv;

namespace {

constexpr int kVecs = kTileVecs, kRows = kTileRows, W = kMaxW;
constexpr int kBlock = 20 * kRows;  // tokens whose weights and values stay in L1 while outputs are summed
constexpr int kMaxWeights = 2;

struct Args {  // mirrored field by field by cpp_impl._Args
  const float* q;
  const void *k_ctx, *k, *v;
  const float *lv_ctx, *lv;
  const int64_t* position;
  const float* weights;
  float *log_z, *log_z_ctx, *received, *squares, *output;
  int64_t k_ctx_token, k_ctx_head, lv_ctx_token, lv_ctx_head, k_token, k_head, v_token, v_head, lv_token, lv_head;
  int64_t heads, queries, dim, dim_v, context, tokens, rows, threads;
};

// Vectors of one head, `stride` floats apart.
struct Vectors {
  const float* at;
  int64_t stride;
  const float* operator[](int64_t i) const { return at + i * stride; }
};

struct Scratch {
  std::vector<float> q, k, v, lv, s, out;
  size_t floats() const { return q.capacity() + k.capacity() + v.capacity() + lv.capacity() + s.capacity() + out.capacity(); }
};
constexpr size_t kKeepFloats = size_t(16) << 20;  // a thread's scratch above 64 MiB is given back after the call

// n vectors of one head: as they lie when they are floats, else converted into `copy`.
INL Vectors vectors(const float* from, int64_t stride, int64_t, int64_t, std::vector<float>&) { return {from, stride}; }
INL Vectors vectors(const bf16* from, int64_t stride, int64_t n, int64_t dim, std::vector<float>& copy) {
  copy.resize(size_t(n) * dim);
  gather_rows(from, stride, n, dim, copy.data());
  return {copy.data(), dim};
}

// One panel's running softmax denominator: exp(top) * sum.
struct Denominator {
  vf<W> top[kVecs], sum[kVecs];
  Denominator() {
    for (int c = 0; c < kVecs; ++c) top[c] = splat<W>(kNegInf), sum[c] = vf<W>{};
  }
  vf<W> shift(int c) const { return top[c] > kNegInf ? top[c] : vf<W>{}; }
  vf<W> log(int c) const {  // nothing seen: -inf; a NaN stays one, also where it is all that is seen
    return top[c] > kNegInf ? top[c] + vlog<W>(sum[c]) : sum[c] == 0.0f ? splat<W>(kNegInf) : sum[c];
  }
  void raise(const vf<W>* best) {
    for (int c = 0; c < kVecs; ++c) {
      vf<W> higher = vmax<W>(top[c], best[c]);
      vf<W> by = higher > kNegInf ? top[c] - higher : vf<W>{};
      sum[c] *= vexp<W>(by);
      top[c] = higher;
    }
  }
};

typename V<W>::i last_seen(const int32_t* last, int c) {
  typename V<W>::i x;
  for (int i = 0; i < W; ++i) x[i] = last[c * W + i];
  return x;
}

// s[t][lane] = k[t] . q[lane] + lv[t] for n tokens, and each lane's largest among those it sees. A NaN is never the
// largest.
void logits(Vectors k, const float* q, const float* lv, int64_t n, int64_t dim, const int32_t* last, int64_t seen,
            float* s, vf<W>* best) {
  for (int c = 0; c < kVecs; ++c) best[c] = splat<W>(kNegInf);
  for (int64_t t0 = 0; t0 < n; t0 += kRows) {
    const int64_t count = std::min<int64_t>(kRows, n - t0);
    for (int64_t t = t0; t < t0 + count; ++t)
      for (int c = 0; c < kVecs; ++c) store<W>(s + t * kPanel + c * W, splat<W>(lv[t]));
    multiply(k[t0], k.stride, 1, q, kPanel, dim, s + t0 * kPanel, kPanel, count, kPanel);
    for (int64_t t = t0; t < t0 + count; ++t)
      for (int c = 0; c < kVecs; ++c) {
        vf<W> x = load<W>(s + t * kPanel + c * W);
        if (t >= seen) x = last_seen(last, c) >= int32_t(t) ? x : splat<W>(kNegInf);
        best[c] = vmax<W>(x, best[c]);
      }
  }
}

// One panel: its query rows, packed, and their denominators so far.
struct Panel {
  int64_t first, lanes, seen;  // seen: tokens of the span that every lane sees
  const float* q;
  int32_t last[kPanel];
  Denominator z;

  Panel(const Args& a, int64_t first, const float* q) : first(first), seen(a.tokens), q(q) {
    lanes = std::min<int64_t>(kPanel, a.queries - first);
    for (int64_t i = 0; i < kPanel; ++i) {
      last[i] = int32_t(std::min<int64_t>(a.position[first + std::min(i, lanes - 1)], a.tokens));
      seen = std::min<int64_t>(seen, last[i] + 1);
    }
  }
  void write_log(float* to) const {  // to: of the head's first query
    for (int c = 0; c < kVecs; ++c) {
      vf<W> x = z.log(c);
      for (int64_t i = c * W; i < std::min<int64_t>(lanes, c * W + W); ++i) to[first + i] = x[i - c * W];
    }
  }
};

// Context tokens count in the denominators only: a block at a time, for all panels.
template <class T> void add_context(const Args& a, int64_t h, std::vector<Panel>& panels, Scratch& w) {
  const T* keys = static_cast<const T*>(a.k_ctx) + h * a.k_ctx_head;
  for (int64_t t0 = 0; t0 < a.context; t0 += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, a.context - t0);
    const Vectors k = vectors(keys + t0 * a.k_ctx_token, a.k_ctx_token, count, a.dim, w.k);
    float lv[kBlock];
    for (int64_t t = 0; t < count; ++t) lv[t] = a.lv_ctx[(t0 + t) * a.lv_ctx_token + h * a.lv_ctx_head];
    for (Panel& p : panels) {
      vf<W> best[kVecs];
      logits(k, p.q, lv, count, a.dim, p.last, count, w.s.data(), best);
      p.z.raise(best);
      for (int64_t t = 0; t < count; ++t)
        for (int c = 0; c < kVecs; ++c) p.z.sum[c] += vexp<W>(load<W>(&w.s[t * kPanel + c * W]) - p.z.shift(c));
    }
  }
}

// What one panel sees of the span.
void add_span(const Args& a, int64_t h, Panel& p, Vectors k, Vectors v, Scratch& w) {
  const int64_t n = a.tokens;
  float* s = w.s.data();
  vf<W> weight[kMaxWeights][kVecs] = {}, present[kVecs] = {}, best[kVecs], inverse[kVecs];
  for (int64_t i = 0; i < p.lanes; ++i) {
    present[i / W][i % W] = 1.0f;
    for (int64_t r = 0; r < a.rows; ++r) weight[r][i / W][i % W] = a.weights[r * a.queries + p.first + i];
  }
  logits(k, p.q, w.lv.data(), n, a.dim, p.last, p.seen, s, best);
  p.z.raise(best);
  for (int64_t t = 0; t < n; ++t)
    for (int c = 0; c < kVecs; ++c) {
      float* at = s + t * kPanel + c * W;
      vf<W> x = load<W>(at) - p.z.shift(c), e;
      if (t < p.seen) {
        e = vexp<W>(x);
        p.z.sum[c] += e;
      } else {  // a hidden token may be far above all that its query sees
        e = exp_any<W>(x);
        p.z.sum[c] += last_seen(p.last, c) >= int32_t(t) ? e : vf<W>{};
      }
      store<W>(at, e);
    }
  for (int c = 0; c < kVecs; ++c) inverse[c] = p.z.sum[c] > 0.0f ? 1.0f / p.z.sum[c] : p.z.sum[c];  // 0 or NaN

  if (a.output) std::fill(w.out.begin(), w.out.end(), 0.0f);
  float* received = a.received + h * n;
  for (int64_t t0 = 0; t0 < n; t0 += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, n - t0);
    for (int64_t t = t0; t < t0 + count; ++t) {
      vf<W> sums[4] = {};
      for (int c = 0; c < kVecs; ++c) {
        float* at = s + t * kPanel + c * W;
        vf<W> x = load<W>(at) * inverse[c];
        sums[0] += x * present[c];
        if (t >= p.seen) x = last_seen(p.last, c) >= int32_t(t) ? x : vf<W>{};
        store<W>(at, x);
        vf<W> square = x * x;
        for (int r = 0; r < kMaxWeights; ++r) sums[1 + r] += square * weight[r][c];
      }
      float total[4];
      hsum4<W>(sums, total);
      received[t] += total[0];
      for (int64_t r = 0; r < a.rows; ++r) a.squares[(r * a.heads + h) * n + t] += total[1 + r];
    }
    if (a.output) multiply(v[t0], 1, v.stride, s + t0 * kPanel, kPanel, count, w.out.data(), kPanel, a.dim_v, kPanel);
  }
  if (!a.output) return;
  float* out = a.output + (h * a.queries + p.first) * a.dim_v;
  for (int64_t i = 0; i < p.lanes; ++i)
    for (int64_t d = 0; d < a.dim_v; ++d) out[i * a.dim_v + d] = w.out[d * kPanel + i];
}

template <class T> void head(const Args& a, int64_t h, Scratch& w) {
  const int64_t n = a.tokens;
  w.q.resize(size_t(pad(a.queries, kPanel)) * a.dim), w.out.resize(size_t(a.dim_v) * kPanel);
  w.s.resize(size_t(std::max<int64_t>(n, kBlock)) * kPanel), w.lv.resize(n);
  std::vector<Panel> panels;
  for (int64_t first = 0; first < a.queries; first += kPanel) {
    pack_panel(a.q + (h * a.queries + first) * a.dim, std::min<int64_t>(kPanel, a.queries - first), a.dim, &w.q[first * a.dim]);
    panels.emplace_back(a, first, &w.q[first * a.dim]);
  }
  add_context<T>(a, h, panels, w);
  for (const Panel& p : panels) p.write_log(a.log_z_ctx + h * a.queries);

  const Vectors k = vectors(static_cast<const T*>(a.k) + h * a.k_head, a.k_token, n, a.dim, w.k);
  const Vectors v = a.output ? vectors(static_cast<const T*>(a.v) + h * a.v_head, a.v_token, n, a.dim_v, w.v) : Vectors{};
  for (int64_t t = 0; t < n; ++t) w.lv[t] = a.lv[t * a.lv_token + h * a.lv_head];
  std::fill_n(a.received + h * n, n, 0.0f);
  for (int64_t r = 0; r < a.rows; ++r) std::fill_n(a.squares + (r * a.heads + h) * n, n, 0.0f);
  for (Panel& p : panels) add_span(a, h, p, k, v, w);
  for (const Panel& p : panels) p.write_log(a.log_z + h * a.queries);
}

}  // namespace

extern "C" int keepkv_score(const void* args, int bf16_storage) {
  const Args& a = *static_cast<const Args*>(args);
  std::atomic<int> error{0};
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && a.heads > 1)
  {
    static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t h = 0; h < a.heads; ++h)
      guard(error, [&] { bf16_storage ? head<bf16>(a, h, scratch) : head<float>(a, h, scratch); });
    if (scratch.floats() > kKeepFloats) scratch = Scratch();
  }
  return error;
}
