// Merging on a CPU: the nearest kept key, means over clusters, and the normal equations of `attention_matching`. One kv
// head (or cluster) is one work unit: its bits do not depend on the others or on the number of threads. Contracts:
// cpp_impl.py.
#include <algorithm>
#include <omp.h>
#include "../cpu_tile.h"

using namespace keepkv;

namespace {

constexpr int W = kMaxW, kVecs = kTileVecs, kRows = kTileRows;
constexpr float kTiny = 1e-30f;

struct NearestArgs {  // mirrored field by field by cpp_impl._Nearest
  const float* k;
  const int64_t *dropped, *kept;
  const uint8_t* allowed;
  float* similarity;
  int64_t* column;
  int64_t k_token, k_head, heads, dim, dropped_count, kept_count, within, threads;
};

struct SegmentsArgs {  // mirrored field by field by cpp_impl._Segments
  const float *k, *v, *lv, *log_w;
  const int64_t *rows, *offsets, *counts;
  float *out_k, *out_v, *out_lv;
  int64_t clusters, dim, dim_v, threads;
};

struct FitArgs {  // mirrored field by field by cpp_impl._Fit
  const float *k, *v, *start, *q, *log_z, *log_z_ctx, *output, *weight;
  const int64_t *first, *position;
  float *votes, *gram, *rhs;
  int64_t heads, slots, queries, dim, dim_v, fixed, steps, threads;
  double max_correction, max_log_mass, ridge, min_ridge;
};

struct Scratch {
  std::vector<float> a, b, c, panels, q, row;
  size_t floats() const { return a.capacity() + b.capacity() + c.capacity() + panels.capacity() + q.capacity() + row.capacity(); }
};
constexpr size_t kKeepFloats = size_t(16) << 20;  // a thread's scratch above 64 MiB is given back after the call

float length(const float* x, int64_t dim) {
  vf<8> sum{};
  for (int64_t d = 0; d < dim; d += 8) sum += load<8>(x + d) * load<8>(x + d);
  return std::sqrt(hsum<8>(sum));
}

// Dropped tokens [r0, r1) of the list against kept ones [u0, u1).
void nearest_of(const NearestArgs& a, int64_t h, int64_t r0, int64_t r1, int64_t u0, int64_t u1, Scratch& w) {
  const int64_t dim = a.dim, count_u = u1 - u0, panels = pad(count_u, kPanel) / kPanel;
  const float* keys = a.k + h * a.k_head;
  w.a.resize(size_t(panels) * kPanel * dim), w.panels.resize(size_t(panels) * kPanel * dim);
  w.row.assign(size_t(panels) * kPanel, kNegInf);
  for (int64_t i = 0; i < count_u; ++i) {  // kept keys of length 1, packed
    const int64_t at = h * a.kept_count + u0 + i;
    const float* key = keys + a.kept[at] * a.k_token;
    const float norm = length(key, dim);
    const bool finite = norm < __builtin_inff();  // NaN is not: such a key is nobody's nearest
    const float scale = 1.0f / std::max(norm, 1e-12f);
    for (int64_t d = 0; d < dim; ++d) w.a[i * dim + d] = finite ? key[d] * scale : 0.0f;
    if (finite && a.allowed[at]) w.row[i] = 0.0f;
  }
  for (int64_t p = 0; p < panels; ++p)
    pack_panel(&w.a[p * kPanel * dim], std::min<int64_t>(kPanel, count_u - p * kPanel), dim, &w.panels[p * kPanel * dim]);
  w.b.resize(size_t(kRows) * dim), w.c.resize(size_t(kRows) * kPanel);
  for (int64_t t0 = r0; t0 < r1; t0 += kRows) {
    const int64_t count = std::min<int64_t>(kRows, r1 - t0), first = h * a.dropped_count + t0;
    std::fill(w.b.begin(), w.b.end(), 0.0f);
    for (int64_t t = 0; t < count; ++t) gather_rows(keys + a.dropped[first + t] * a.k_token, 0, 1, dim, &w.b[t * dim]);
    float best[kRows];
    int64_t where[kRows] = {};
    std::fill(best, best + kRows, kNegInf);
    for (int64_t p = 0; p < panels; ++p) {
      for (int t = 0; t < kRows; ++t)  // not allowed and padding: -inf
        for (int c = 0; c < kVecs; ++c) store<W>(&w.c[t * kPanel + c * W], load<W>(&w.row[p * kPanel + c * W]));
      multiply_tile<kRows, kVecs>(w.b.data(), dim, 1, &w.panels[p * kPanel * dim], kPanel, dim, w.c.data(), kPanel);
      for (int t = 0; t < count; ++t) {
        const float* x = &w.c[t * kPanel];
        vf<W> top = load<W>(x);
        for (int c = 1; c < kVecs; ++c) top = vmax<W>(top, load<W>(x + c * W));
        if (!(hmax<W>(top) > best[t])) continue;
        best[t] = hmax<W>(top);
        where[t] = u0 + p * kPanel + (std::find(x, x + kPanel, best[t]) - x);
      }
    }
    for (int64_t t = 0; t < count; ++t) {  // dividing by |k_i| does not move the maximum
      a.similarity[first + t] = best[t] / std::max(length(&w.b[t * dim], dim), 1e-12f);
      a.column[first + t] = where[t];
    }
  }
}

// Block by block of `within` tokens; both lists ascend.
void nearest(const NearestArgs& a, int64_t h, Scratch& w) {
  const int64_t *dropped = a.dropped + h * a.dropped_count, *kept = a.kept + h * a.kept_count;
  for (int64_t r0 = 0, u0 = 0; r0 < a.dropped_count;) {
    int64_t r1 = a.dropped_count, u1 = a.kept_count;
    if (a.within > 0) {
      const int64_t begin = dropped[r0] / a.within * a.within;
      u0 = std::lower_bound(kept + u0, kept + a.kept_count, begin) - kept;
      u1 = std::lower_bound(kept + u0, kept + a.kept_count, begin + a.within) - kept;
      r1 = std::lower_bound(dropped + r0, dropped + a.dropped_count, begin + a.within) - dropped;
    }
    nearest_of(a, h, r0, r1, u0, u1, w);
    r0 = r1, u0 = u1;
  }
}

// out = sum over the members of w x / total, in their order; x: rows of `dim` numbers.
INL void weigh(const float* x, const int64_t* rows, const float* w, int64_t count, float total, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += 8) {
    vf<8> sum{};
    for (int64_t t = 0; t < count; ++t) sum += w[t] * load<8>(x + rows[t] * dim + d);
    store<8>(out + d, sum / total);
  }
}

// Members that all weigh nothing: 0 / 0 is NaN, as in torch; no members: 0, and -inf for the votes.
void merge_cluster(const SegmentsArgs& a, int64_t c, Scratch& s) {
  const int64_t first = a.offsets[c], count = a.counts[c], *rows = a.rows + first;
  const float* log_w = a.log_w + first;
  float top_w = kNegInf, top_lv = kNegInf, total_w = count ? 0.0f : 1.0f, total_lv = 0.0f;
  for (int64_t t = 0; t < count; ++t) {
    top_w = log_w[t] > top_w ? log_w[t] : top_w;
    top_lv = a.lv[rows[t]] > top_lv ? a.lv[rows[t]] : top_lv;
  }
  const float shift_w = top_w == kNegInf ? 0.0f : top_w, shift_lv = top_lv == kNegInf ? 0.0f : top_lv;
  s.row.resize(count);
  for (int64_t t = 0; t < count; ++t) {
    total_w += s.row[t] = std::exp(log_w[t] - shift_w);
    total_lv += std::exp(a.lv[rows[t]] - shift_lv);
  }
  weigh(a.k, rows, s.row.data(), count, total_w, a.dim, a.out_k + c * a.dim);
  weigh(a.v, rows, s.row.data(), count, total_w, a.dim_v, a.out_v + c * a.dim_v);
  a.out_lv[c] = std::log(total_lv) + top_lv;
}

// One panel of queries, its lanes padded with queries of weight 0.
struct Lanes {
  int64_t first, count;
  vf<W> weight[kVecs], share[kVecs], outside[kVecs], log_z[kVecs];
  float position[kPanel];

  Lanes(const FitArgs& a, int64_t h, int64_t at) : first(at), count(std::min<int64_t>(kPanel, a.queries - at)) {
    for (int64_t i = 0; i < kPanel; ++i) {
      const bool real = i < count;
      const int64_t row = h * a.queries + first + (real ? i : 0);
      const float z = a.log_z[row], ctx = std::exp(a.log_z_ctx[row] - z);
      weight[i / W][i % W] = real ? a.weight[first + i] : 0.0f;
      log_z[i / W][i % W] = z, outside[i / W][i % W] = ctx;
      share[i / W][i % W] = 1.0f - ctx < 0.0f ? 0.0f : 1.0f - ctx;  // NaN stays NaN
      position[i] = float(a.position[first + (real ? i : 0)]);
    }
  }
};

// w.panels[p][slot][lane] = e; w.row: total[slot] = sum_q weight e.
void masses(const FitArgs& a, int64_t h, const std::vector<Lanes>& lanes, Scratch& w) {
  const int64_t m = a.slots, rows = pad(m, kRows), dim = a.dim;
  const vf<W> cap = splat<W>(float(a.max_log_mass));
  w.a.assign(size_t(rows) * dim, 0.0f);
  std::copy_n(a.k + h * m * dim, m * dim, w.a.begin());
  w.panels.assign(lanes.size() * rows * kPanel, 0.0f), w.q.resize(size_t(dim) * kPanel), w.row.assign(rows, 0.0f);
  for (size_t p = 0; p < lanes.size(); ++p) {
    const Lanes& x = lanes[p];
    float* e = &w.panels[p * rows * kPanel];
    pack_panel(a.q + (h * a.queries + x.first) * dim, x.count, dim, w.q.data());
    multiply(w.a.data(), dim, 1, w.q.data(), kPanel, dim, e, kPanel, rows, kPanel);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t first = a.first[h * m + i];  // negative: the slot is not usable
      vf<W> sum{};
      for (int c = 0; c < kVecs; ++c) {
        vf<W> l = load<W>(e + i * kPanel + c * W) - x.log_z[c];
        l = l > cap ? cap : l;
        vf<W> y = exp_any<W>(l);
        y = first < 0 ? vf<W>{} : load<W>(x.position + c * W) < float(first) ? vf<W>{} : y;
        store<W>(e + i * kPanel + c * W, y);
        sum += y * x.weight[c];
      }
      w.row[i] += hsum<W>(sum);
    }
    std::fill(e + m * kPanel, e + rows * kPanel, 0.0f);
  }
}

// mass[c] = sum over the slots of votes e, of one panel.
INL void mass_of(const float* e, const float* votes, int64_t m, vf<W>* mass) {
  for (int c = 0; c < kVecs; ++c) mass[c] = vf<W>{};
  for (int64_t i = 0; i < m; ++i)
    for (int c = 0; c < kVecs; ++c) mass[c] += votes[i] * load<W>(e + i * kPanel + c * W);
}

INL vf<W> at_least(vf<W> x, float least) { return x < least ? splat<W>(least) : x; }  // NaN stays NaN

// Multiplicative steps on the log votes; leaves exp(log votes) in w.b.
void fit_votes(const FitArgs& a, int64_t h, const std::vector<Lanes>& lanes, Scratch& w) {
  const int64_t m = a.slots, rows = pad(m, kRows);
  const float *start = a.start + h * m, most = float(a.max_correction);
  float* lv = a.votes + h * m;
  w.b.resize(rows), w.c.resize(rows);
  for (int64_t i = 0; i < m; ++i) lv[i] = start[i], w.b[i] = std::exp(start[i]);
  for (int64_t step = 0; step < a.steps; ++step) {
    std::fill(w.c.begin(), w.c.end(), 0.0f);
    for (size_t p = 0; p < lanes.size(); ++p) {
      const float* e = &w.panels[p * rows * kPanel];
      vf<W> wanted[kVecs];
      mass_of(e, w.b.data(), m, wanted);
      for (int c = 0; c < kVecs; ++c) wanted[c] = lanes[p].weight[c] * lanes[p].share[c] / at_least(wanted[c], kTiny);
      for (int64_t i = 0; i < m; ++i) {
        vf<W> sum{};
        for (int c = 0; c < kVecs; ++c) sum += wanted[c] * load<W>(e + i * kPanel + c * W);
        w.c[i] += hsum<W>(sum);
      }
    }
    for (int64_t i = a.fixed; i < m; ++i) {
      if (w.row[i] > kTiny) {  // else nobody looks: as it was
        const float factor = w.c[i] / w.row[i];
        float by = lv[i] - start[i] + std::log(factor < kTiny ? kTiny : factor);
        by = by < -most ? -most : by > most ? most : by;
        lv[i] = start[i] + by;
      }
      w.b[i] = std::exp(lv[i]);
    }
  }
}

void fit(const FitArgs& a, int64_t h, Scratch& w) {
  const int64_t m = a.slots, rows = pad(m, kRows), wide = pad(m, W), dim = a.dim_v, width = pad(dim, W);
  std::vector<Lanes> lanes;
  for (int64_t first = 0; first < a.queries; first += kPanel) lanes.emplace_back(a, h, first);
  masses(a, h, lanes, w);
  fit_votes(a, h, lanes, w);

  std::vector<float>&gram = w.c, &residual = w.row, &values = w.a;
  std::vector<float> across(size_t(kPanel) * wide), sums(size_t(kPanel) * dim), rhs(size_t(rows) * width, 0.0f);
  gram.assign(size_t(rows) * wide, 0.0f), residual.assign(size_t(kPanel) * width, 0.0f);
  values.assign(a.v + h * m * dim, a.v + (h + 1) * m * dim);
  double power = 0.0;
  for (size_t p = 0; p < lanes.size(); ++p) {
    const Lanes& x = lanes[p];
    float* e = &w.panels[p * rows * kPanel];
    vf<W> scale[kVecs], root[kVecs];
    mass_of(e, w.b.data(), m, scale);
    for (int c = 0; c < kVecs; ++c) {
      for (int i = 0; i < W; ++i) root[c][i] = std::sqrt(x.weight[c][i]);
      scale[c] = root[c] / at_least(x.outside[c] + scale[c], kTiny);
    }
    for (int64_t i = 0; i < m; ++i)
      for (int c = 0; c < kVecs; ++c) {
        float* at = e + i * kPanel + c * W;
        store<W>(at, w.b[i] * load<W>(at) * scale[c]);
      }
    std::fill(sums.begin(), sums.end(), 0.0f);  // [dim][lane]
    multiply(values.data(), 1, dim, e, kPanel, m, sums.data(), kPanel, dim, kPanel);
    for (int64_t i = 0; i < x.count; ++i) {
      const float g = root[i / W][i % W], *out = a.output + (h * a.queries + x.first + i) * dim;
      for (int64_t d = 0; d < dim; ++d) residual[i * width + d] = g * out[d] - sums[d * kPanel + i];
    }
    std::fill(e, e + a.fixed * kPanel, 0.0f);  // their part is in the residual
    for (int64_t j = 0; j < wide; j += 8) {
      const float* slots[8];
      for (int i = 0; i < 8; ++i) slots[i] = j + i < m ? e + (j + i) * kPanel : nullptr;
      transpose8(slots, kPanel, &across[j], int(wide));
    }
    multiply(e, kPanel, 1, residual.data(), width, x.count, rhs.data(), width, rows, width);
    for (int64_t j = 0; j < wide; j += kPanel) {  // the lower triangle, by panels of columns
      const int64_t r0 = j / kRows * kRows;
      multiply(e + r0 * kPanel, kPanel, 1, &across[j], wide, x.count, &gram[r0 * wide + j], wide, rows - r0,
               std::min<int64_t>(kPanel, wide - j));
    }
  }
  for (int64_t i = 0; i < m; ++i) power += gram[i * wide + i];
  const float lambda = float(a.ridge * power / double(a.queries) + a.min_ridge);
  for (int64_t i = 0; i < m; ++i) {
    float* row = a.gram + (h * m + i) * m;
    for (int64_t j = 0; j <= i; ++j) row[j] = a.gram[(h * m + j) * m + i] = gram[i * wide + j];
    row[i] += lambda;
    std::copy_n(&rhs[i * width], dim, a.rhs + (h * m + i) * dim);
  }
}

Scratch& scratch_of_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

// one(unit, scratch) for all units; returns 0 or kNoMemory.
template <class F> int for_units(int64_t units, int64_t at_once, int64_t threads, F one) {
  std::atomic<int> error{0};
#pragma omp parallel num_threads(threads) if (threads > 1 && units > at_once)
  {
    Scratch& scratch = scratch_of_thread();
#pragma omp for schedule(dynamic, at_once)
    for (int64_t i = 0; i < units; ++i) guard(error, [&] { one(i, scratch); });
    if (scratch.floats() > kKeepFloats) scratch = Scratch();
  }
  return error;
}

}  // namespace

extern "C" int keepkv_nearest(const void* args) {
  const NearestArgs& a = *static_cast<const NearestArgs*>(args);
  return for_units(a.heads, 1, a.threads, [&](int64_t h, Scratch& w) { nearest(a, h, w); });
}

extern "C" int keepkv_segments(const void* args) {
  const SegmentsArgs& a = *static_cast<const SegmentsArgs*>(args);
  return for_units(a.clusters, 64, a.threads, [&](int64_t c, Scratch& s) { merge_cluster(a, c, s); });
}

extern "C" int keepkv_alone(const void*) {
  omp_set_num_threads(1);
  return 0;
}

extern "C" int keepkv_fit(const void* args) {
  const FitArgs& a = *static_cast<const FitArgs*>(args);
  return for_units(a.heads, 1, a.threads, [&](int64_t h, Scratch& w) { fit(a, h, w); });
}
