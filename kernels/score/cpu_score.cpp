// What a window of queries sees of a span, in one pass over packed panels of queries; the contract is cpp_impl.py's.
//
// A panel is kVecs * kMaxW query rows, one per lane. Its logits against the whole span stay in the cache between the
// three steps that need them: softmax denominator, sums over the queries per token, attention outputs. One kv head is one
// work unit: its bits do not depend on the other heads or on the number of threads.
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

struct Scratch {
  std::vector<float> q, ctx, lv_ctx, k, v, lv, s, out;
};

int64_t padded(int64_t n) { return pad(n, kRows); }

// One head's tokens side by side; pads with zeros, and log votes with -inf.
template <class T>
void gather(const void* from, int64_t stride, int64_t head, int64_t n, int64_t dim, std::vector<float>& to) {
  to.resize(size_t(padded(n)) * dim);
  gather_rows(static_cast<const T*>(from) + head, stride, n, dim, to.data());
  std::fill(to.begin() + n * dim, to.end(), 0.0f);
}

void gather_votes(const float* from, int64_t stride, int64_t head, int64_t n, std::vector<float>& to) {
  to.resize(padded(n));
  for (int64_t t = 0; t < n; ++t) to[t] = from[t * stride + head];
  std::fill(to.begin() + n, to.end(), kNegInf);
}

// s[r][lane] = k[r] . q[lane] + lv[r] for kRows tokens; q is packed [dim][kPanel].
INL void logits_tile(const float* k, const float* q, const float* lv, int64_t dim, float* s) {
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kVecs; ++c) store<W>(s + r * kPanel + c * W, splat<W>(lv[r]));
  multiply_tile<kRows, kVecs>(k, dim, 1, q, kPanel, dim, s, kPanel);
}

// One panel's running softmax denominator: exp(top) * sum.
struct Denominator {
  vf<W> top[kVecs], sum[kVecs];
  Denominator() {
    for (int c = 0; c < kVecs; ++c) top[c] = splat<W>(kNegInf), sum[c] = vf<W>{};
  }
  vf<W> shift(int c) const { return top[c] > kNegInf ? top[c] : vf<W>{}; }
  vf<W> log(int c) const { return top[c] > kNegInf ? top[c] + vlog<W>(sum[c]) : splat<W>(kNegInf); }
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

// Logits of n tokens (a multiple of kRows), and each lane's largest among those it sees.
void logits(const float* k, const float* q, const float* lv, int64_t n, int64_t dim, const int32_t* last, int64_t seen,
            float* s, vf<W>* best) {
  for (int c = 0; c < kVecs; ++c) best[c] = splat<W>(kNegInf);
  for (int64_t t = 0; t < n; t += kRows) {
    logits_tile(k + t * dim, q, lv + t, dim, s + t * kPanel);
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kVecs; ++c) {
        vf<W> x = load<W>(s + (t + r) * kPanel + c * W);
        if (t + r >= seen) x = last_seen(last, c) >= int32_t(t + r) ? x : splat<W>(kNegInf);
        best[c] = vmax<W>(best[c], x);
      }
  }
}

// Query rows [first, first + kPanel) of head h.
void panel(const Args& a, int64_t h, int64_t first, Scratch& w) {
  const int64_t lanes = std::min<int64_t>(kPanel, a.queries - first), n = a.tokens, rows = padded(n);
  const int64_t dim = a.dim, dim_v = a.dim_v;
  pack_panel(a.q + (h * a.queries + first) * dim, lanes, dim, w.q.data());
  int32_t last[kPanel];
  int64_t seen = n;  // tokens that every lane sees
  for (int64_t i = 0; i < kPanel; ++i) {
    last[i] = int32_t(std::min<int64_t>(a.position[first + std::min(i, lanes - 1)], n));
    seen = std::min<int64_t>(seen, last[i] + 1);
  }
  vf<W> weight[kMaxWeights][kVecs] = {}, present[kVecs] = {};
  for (int64_t i = 0; i < lanes; ++i) {
    present[i / W][i % W] = 1.0f;
    for (int64_t r = 0; r < a.rows; ++r) weight[r][i / W][i % W] = a.weights[r * a.queries + first + i];
  }

  Denominator z;
  vf<W> best[kVecs];
  float* s = w.s.data();
  for (int64_t t0 = 0; t0 < a.context; t0 += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, padded(a.context) - t0);
    logits(&w.ctx[t0 * dim], w.q.data(), &w.lv_ctx[t0], count, dim, last, count, s, best);
    z.raise(best);
    for (int64_t t = 0; t < count; ++t)
      for (int c = 0; c < kVecs; ++c) z.sum[c] += vexp<W>(load<W>(s + t * kPanel + c * W) - z.shift(c));
  }
  for (int c = 0; c < kVecs; ++c) {
    vf<W> x = z.log(c);
    for (int64_t i = c * W; i < std::min<int64_t>(lanes, c * W + W); ++i) a.log_z_ctx[h * a.queries + first + i] = x[i - c * W];
  }

  logits(w.k.data(), w.q.data(), w.lv.data(), rows, dim, last, seen, s, best);
  z.raise(best);
  for (int64_t t = 0; t < rows; ++t)
    for (int c = 0; c < kVecs; ++c) {
      float* at = s + t * kPanel + c * W;
      vf<W> x = load<W>(at) - z.shift(c), e;
      if (t < seen) {
        e = vexp<W>(x);
        z.sum[c] += e;
      } else {
        e = exp_any<W>(x);
        z.sum[c] += last_seen(last, c) >= int32_t(t) ? e : vf<W>{};
      }
      store<W>(at, e);
    }
  vf<W> inverse[kVecs];
  for (int c = 0; c < kVecs; ++c) {
    vf<W> x = z.log(c);
    inverse[c] = z.sum[c] > 0.0f ? 1.0f / z.sum[c] : vf<W>{};
    for (int64_t i = c * W; i < std::min<int64_t>(lanes, c * W + W); ++i) a.log_z[h * a.queries + first + i] = x[i - c * W];
  }

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
        if (t >= seen) x = last_seen(last, c) >= int32_t(t) ? x : vf<W>{};
        store<W>(at, x);
        vf<W> square = x * x;
        for (int r = 0; r < kMaxWeights; ++r) sums[1 + r] += square * weight[r][c];
      }
      float total[4];
      hsum4<W>(sums, total);
      received[t] += total[0];
      for (int64_t r = 0; r < a.rows; ++r) a.squares[(r * a.heads + h) * n + t] += total[1 + r];
    }
    if (!a.output) continue;
    multiply(&w.v[t0 * dim_v], 1, dim_v, s + t0 * kPanel, kPanel, count, w.out.data(), kPanel, dim_v, kPanel);
  }
  if (!a.output) return;
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t d = 0; d < dim_v; ++d) a.output[(h * a.queries + first + i) * dim_v + d] = w.out[d * kPanel + i];
}

template <class T> void head(const Args& a, int64_t h, Scratch& w) {
  gather<T>(a.k, a.k_token, h * a.k_head, a.tokens, a.dim, w.k);
  gather_votes(a.lv, a.lv_token, h * a.lv_head, a.tokens, w.lv);
  if (a.output) gather<T>(a.v, a.v_token, h * a.v_head, a.tokens, a.dim_v, w.v);
  gather<T>(a.k_ctx, a.k_ctx_token, h * a.k_ctx_head, a.context, a.dim, w.ctx);
  gather_votes(a.lv_ctx, a.lv_ctx_token, h * a.lv_ctx_head, a.context, w.lv_ctx);
  w.q.resize(size_t(a.dim) * kPanel), w.out.resize(size_t(a.dim_v) * kPanel);
  w.s.resize(size_t(std::max<int64_t>(padded(a.tokens), kBlock)) * kPanel);
  std::fill_n(a.received + h * a.tokens, a.tokens, 0.0f);
  for (int64_t r = 0; r < a.rows; ++r) std::fill_n(a.squares + (r * a.heads + h) * a.tokens, a.tokens, 0.0f);
  for (int64_t first = 0; first < a.queries; first += kPanel) panel(a, h, first, w);
}

}  // namespace

extern "C" int keepkv_score(const void* args, int bf16_storage) {
  const Args& a = *static_cast<const Args*>(args);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && a.heads > 1)
  {
    static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t h = 0; h < a.heads; ++h) bf16_storage ? head<bf16>(a, h, scratch) : head<float>(a, h, scratch);
  }
  return 0;
}
