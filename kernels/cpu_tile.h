// The register tile of every matrix product of the compression kernels: rows are broadcast, columns are lanes.
#pragma once
#include <vector>
#include "cpu_vec.h"

namespace keepkv {

constexpr int kTileRows = 6;  // kTileRows x kTileVecs accumulators, kTileVecs loads, one broadcast
#if defined(__AVX512F__)
constexpr int kTileVecs = 4;
#elif defined(__AVX__)
constexpr int kTileVecs = 2;
#else
constexpr int kTileVecs = 1;
#endif
constexpr int kPanel = kTileVecs * kMaxW;  // columns of a full tile

INL int64_t pad(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// c[r][0 : NV * W] += sum_i a[r * a_row + i * a_step] * b[i * b_step + 0 : NV * W], in order of i, for R rows.
template <int R, int NV>
INL void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t n,
                       float* c, int64_t c_row) {
  constexpr int W = kMaxW;
  vf<W> acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NV; ++j) acc[r][j] = load<W>(c + r * c_row + j * W);
  for (int64_t i = 0; i < n; ++i) {
    vf<W> column[NV];
    for (int j = 0; j < NV; ++j) column[j] = load<W>(b + i * b_step + j * W);
    for (int r = 0; r < R; ++r) {
      vf<W> x = splat<W>(a[r * a_row + i * a_step]);
      for (int j = 0; j < NV; ++j) acc[r][j] += x * column[j];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NV; ++j) store<W>(c + r * c_row + j * W, acc[r][j]);
}

// The same for any number of rows; columns: a multiple of W.
INL void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t n, float* c,
                  int64_t c_row, int64_t rows, int64_t columns) {
  constexpr int W = kMaxW;
  for (int64_t j = 0; j < columns;) {
    const bool full = j + kPanel <= columns;
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows) {
      if (full) multiply_tile<kTileRows, kTileVecs>(a + r * a_row, a_row, a_step, b + j, b_step, n, c + r * c_row + j, c_row);
      else multiply_tile<kTileRows, 1>(a + r * a_row, a_row, a_step, b + j, b_step, n, c + r * c_row + j, c_row);
    }
    for (; r < rows; ++r) {
      if (full) multiply_tile<1, kTileVecs>(a + r * a_row, a_row, a_step, b + j, b_step, n, c + r * c_row + j, c_row);
      else multiply_tile<1, 1>(a + r * a_row, a_row, a_step, b + j, b_step, n, c + r * c_row + j, c_row);
    }
    j += full ? kPanel : W;
  }
}

// Copies n vectors of one head side by side as floats; from: element of the head in the first vector.
template <class T> void gather_rows(const T* from, int64_t stride, int64_t n, int64_t dim, float* to) {
  for (int64_t t = 0; t < n; ++t)
    for (int64_t d = 0; d < dim; d += 8) store<8>(to + t * dim + d, load<8>(from + t * stride + d));
}

// to[d][lane] = rows[lane][d], dim a multiple of 8; lanes from `count` on are zeros.
INL void pack_panel(const float* rows, int64_t count, int64_t dim, float* to) {
  for (int64_t i = 0; i < kPanel; i += 8) {
    const float* vectors[8];
    for (int j = 0; j < 8; ++j) vectors[j] = i + j < count ? rows + (i + j) * dim : nullptr;
    transpose8(vectors, int(dim), to + i, kPanel);
  }
}

template <int W> INL vf<W> vlog(vf<W> x) {
  for (int i = 0; i < W; ++i) x[i] = std::log(x[i]);
  return x;
}

// exp of anything: vexp wants x <= 0. For where x > 0 is rare.
template <int W> INL vf<W> exp_any(vf<W> x) {
  vf<W> above = x > 0.0f ? x : vf<W>{};
  vf<W> e = vexp<W>(x < 0.0f ? x : vf<W>{});
  if (hmax<W>(above) > 0.0f)
    for (int i = 0; i < W; ++i)
      if (x[i] > 0.0f) e[i] = std::exp(x[i]);
  return x == x ? e : x;
}

}  // namespace keepkv
