// Vectors of W floats through GCC vector extensions; x86 intrinsics only where they pay. No -ffast-math: the
// code relies on -inf. W = 8 exists everywhere (the compiler lowers it to two SSE/NEON registers), W = 16
// with AVX-512.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define INL inline __attribute__((always_inline))

namespace keepkv {

struct bf16 { uint16_t bits; };
constexpr float kNegInf = -__builtin_inff();
constexpr float kMasked = -1e29f;  // a log vote at or below this is a masked entry: weight exactly 0

template <int W> struct V;
// The "u" types carry no alignment: a memcpy into a vector makes GCC 12 bounce through the stack and stall.
#define KEEPKV_VEC(W)                                                                 \
  template <> struct V<W> {                                                           \
    typedef float f __attribute__((vector_size(4 * W)));                              \
    typedef int32_t i __attribute__((vector_size(4 * W)));                            \
    typedef uint32_t u __attribute__((vector_size(4 * W)));                           \
    typedef uint16_t h __attribute__((vector_size(2 * W)));                           \
    typedef float fu __attribute__((vector_size(4 * W), aligned(4), may_alias));      \
    typedef uint16_t hu __attribute__((vector_size(2 * W), aligned(2), may_alias));   \
  };
KEEPKV_VEC(8)
#if defined(__AVX512F__)
KEEPKV_VEC(16)
constexpr int kMaxW = 16;
#else
constexpr int kMaxW = 8;
#endif
#undef KEEPKV_VEC

template <int W> using vf = typename V<W>::f;

template <int W> INL vf<W> load(const float* p) { return *reinterpret_cast<const typename V<W>::fu*>(p); }
template <int W> INL vf<W> load(const bf16* p) {
  typename V<W>::h raw = *reinterpret_cast<const typename V<W>::hu*>(p);
  return (vf<W>)(__builtin_convertvector(raw, typename V<W>::u) << 16);
}
template <int W> INL void store(float* p, vf<W> v) { *reinterpret_cast<typename V<W>::fu*>(p) = v; }
template <int W> INL vf<W> splat(float x) { return vf<W>{} + x; }

INL float to_float(float x) { return x; }
INL float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
INL void from_float(float x, float* out) { *out = x; }
INL void from_float(float x, bf16* out) {  // round to nearest even, as torch does; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &x, 4);
  out->bits = x != x ? 0x7FC0 : uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

// Where a or b is NaN: b.
template <int W> INL vf<W> vmax(vf<W> a, vf<W> b) {
#if defined(__AVX512F__)
  if constexpr (W == 16) return (vf<W>)_mm512_max_ps((__m512)a, (__m512)b);
#endif
#if defined(__AVX__)
  if constexpr (W == 8) return (vf<W>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

template <int W> INL float hmax(vf<W> v) {
#if defined(__AVX512F__)
  if constexpr (W == 16) return _mm512_reduce_max_ps((__m512)v);
#endif
  float best = v[0];
  for (int i = 1; i < W; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

template <int W> INL float hsum(vf<W> v) {  // a fixed tree: the same bits at every call
  float t[W];
  store<W>(t, v);
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) t[i] += t[i + step];
  return t[0];
}

// Horizontal sums of four vectors, written to out[0..3].
template <int W> INL void hsum4(const vf<W>* a, float* out) {
#if defined(__AVX__)
  __m256 y[4];
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    if constexpr (W == 16) {
      __m512 z = (__m512)a[i];
      y[i] = _mm256_add_ps(_mm512_castps512_ps256(z),
                           _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(z), 1)));
    } else
#endif
      y[i] = (__m256)a[i];
  }
  __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(y[0], y[1]), _mm256_hadd_ps(y[2], y[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = hsum<W>(a[i]);
#endif
}

// dst[d][j] = keys[j][d] for 8 keys, d < dim (a multiple of 8); a null row is zeros.
template <class T> INL void transpose8(const T* const* keys, int dim, float* dst, int ld) {
  for (int d = 0; d < dim; d += 8) {
    vf<8> r[8];
    for (int j = 0; j < 8; ++j) r[j] = keys[j] ? load<8>(keys[j] + d) : vf<8>{};
#if defined(__AVX__)
    __m256 t[8], u[8];
    for (int j = 0; j < 8; j += 2) {
      t[j] = _mm256_unpacklo_ps((__m256)r[j], (__m256)r[j + 1]);
      t[j + 1] = _mm256_unpackhi_ps((__m256)r[j], (__m256)r[j + 1]);
    }
    for (int j = 0; j < 8; j += 4)
      for (int i = 0; i < 2; ++i) {
        u[j + 2 * i] = _mm256_shuffle_ps(t[j + i], t[j + i + 2], 0x44);
        u[j + 2 * i + 1] = _mm256_shuffle_ps(t[j + i], t[j + i + 2], 0xEE);
      }
    for (int i = 0; i < 4; ++i) {
      store<8>(dst + (d + i) * ld, (vf<8>)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20));
      store<8>(dst + (d + i + 4) * ld, (vf<8>)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31));
    }
#else
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < 8; ++i) dst[(d + i) * ld + j] = r[j][i];
#endif
  }
}

// exp for x <= 0: Cody-Waite reduction and Cephes' polynomial, relative error about 1e-7 (tested).
// exp(0) is exactly 1; below the smallest normal result, and for -inf, exactly 0; NaN stays NaN.
template <int W> INL vf<W> vexp(vf<W> x) {
  const float lowest = -87.336540f;
  const vf<W> lo = splat<W>(lowest);
  vf<W> xc = vmax<W>(lo, x);
  const vf<W> magic = splat<W>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  vf<W> t = xc * 1.44269504f + magic;
  vf<W> n = t - magic;
  vf<W> r = xc - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf<W> p = splat<W>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  typename V<W>::i k = ((typename V<W>::i)t - 0x4B400000 + 127) << 23;
  p = p * (vf<W>)k;
  return x < lo ? vf<W>{} : p;
}
INL float exp1(float x) { return vexp<8>(splat<8>(x))[0]; }

constexpr int kNoMemory = 3;  // what an op returns when scratch memory cannot be had

// Runs f. No exception may leave an OpenMP team or an extern "C" function: that would end the process.
template <class F> void guard(std::atomic<int>& error, F f) {
  try {
    f();
  } catch (...) {
    error = kNoMemory;
  }
}

}  // namespace keepkv
