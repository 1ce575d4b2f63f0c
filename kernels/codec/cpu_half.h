// Eight numbers of a pool's dtype at a time: reading, writing and rounding as torch does (to nearest even).
#pragma once
#include "../cpu_vec.h"

namespace keepkv {

struct half { uint16_t bits; };

constexpr float kHalfMax = 65504.0f;

INL float half_value(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, digits = h & 0x3FF;
  float f;
  if (exponent == 0) {
    f = float(digits) * 0x1p-24f;
    return sign ? -f : f;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | digits << 13;
  std::memcpy(&f, &bits, 4);
  return f;
}

INL uint16_t half_bits(float x) {  // x is no NaN
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  u &= 0x7FFFFFFF;
  if (u >= 0x477FF000) return sign | 0x7C00;  // 65520 and above: infinite
  if (u < 0x38800000) return sign | uint16_t(std::nearbyint(std::fabs(x) * 0x1p24f));  // below 2^-14: multiples of 2^-24
  return sign | uint16_t((u - 0x38000000 + 0xFFF + (u >> 13 & 1)) >> 13);
}

INL vf<8> load8(const float* p) { return load<8>(p); }
INL vf<8> load8(const bf16* p) { return load<8>(p); }
INL vf<8> load8(const half* p) {
#if defined(__F16C__)
  return (vf<8>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf<8> v;
  for (int i = 0; i < 8; ++i) v[i] = half_value(p[i].bits);
  return v;
#endif
}

INL void store8(float* p, vf<8> v) { store<8>(p, v); }
INL typename V<8>::u bf16_bits(vf<8> v) {
  const typename V<8>::u u = (typename V<8>::u)v;
  return u + 0x7FFF + (u >> 16 & 1);
}
INL void store8(bf16* p, vf<8> v) {
  const typename V<8>::u top = bf16_bits(v) >> 16;
#if defined(__AVX2__)
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)top), _mm256_extracti128_si256((__m256i)top, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
#else
  *reinterpret_cast<typename V<8>::hu*>(p) = __builtin_convertvector(top, typename V<8>::h);
#endif
}
INL void store8(half* p, vf<8> v) {
#if defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 8; ++i) p[i].bits = half_bits(v[i]);
#endif
}

// The number of dtype T that v is rounded to.
template <class T> INL vf<8> rounded(vf<8> v) { return v; }
template <> INL vf<8> rounded<bf16>(vf<8> v) { return (vf<8>)(bf16_bits(v) & 0xFFFF0000u); }
template <> INL vf<8> rounded<half>(vf<8> v) {
  half h[8];
  store8(h, v);
  return load8(h);
}

}  // namespace keepkv
