// The codecs on a CPU; what the numbers are: reference.py, whose bytes these are. Compiled without contraction to fused
// multiply-add (cpu_build.py), which torch does not have. One head's part of one block is one work unit.
#include <algorithm>
#include <omp.h>
#include <vector>
#include "cpu_half.h"

using namespace keepkv;

namespace {

constexpr int kTokens = 64, kGroup = 32, kMaxDim = 1024, kAhead = 8;
constexpr int kBadCounts = 4, kBadSlot = 5, kBadBlock = 6;
constexpr float kNormal = 0x1p-14f, kTiny = 0x1p-24f;  // float16's smallest with all digits, and smallest

typedef typename V<8>::i ints;
typedef uint8_t bytes __attribute__((vector_size(8)));
typedef uint8_t bytes_u __attribute__((vector_size(8), aligned(1), may_alias));
typedef int8_t signed_u __attribute__((vector_size(8), aligned(1), may_alias));

enum Codec { kNative, kInt8, kInt4 };

struct Args {  // mirrored field by field by cpp_impl._Args
  void *keys, *values;
  const int64_t *slots, *blocks, *counts;
  uint8_t* arena;
  int64_t k_token, k_head, v_token, v_head, pool_slots, arena_blocks, tokens, used_blocks;
  int64_t heads, k_dim, v_dim, k_meta, v_meta, k_bytes, v_bytes, codec, threads;
};

// K or V of one unit: where its vectors lie in the pool, and its two regions of the block.
template <class T> struct Part {
  T* pool;  // of the head
  int64_t stride;
  const int64_t* slots;
  int count, dim;
  uint8_t *meta, *rows;
  // Rows are scattered: the processor does not guess the next one. Asks for the one kAhead further on.
  template <bool kWrite = false> T* row(int t) const {
    if (t + kAhead < count) {
      const char* at = reinterpret_cast<const char*>(pool + slots[t + kAhead] * stride);
      for (size_t i = 0; i < dim * sizeof(T); i += 64) __builtin_prefetch(at + i, kWrite);
    }
    return pool + slots[t] * stride;
  }
};

INL vf<8> vmin(vf<8> a, vf<8> b) {
#if defined(__AVX__)
  return (vf<8>)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
INL vf<8> clamped(vf<8> x, float low, float high) { return vmax<8>(vmin(x, splat<8>(high)), splat<8>(low)); }
INL vf<8> finite(vf<8> x) { return (vf<8>)((ints)x & (x - x == 0.0f)); }
INL vf<8> inverse(vf<8> scale) { return (vf<8>)((ints)(1.0f / scale) & (scale > 0.0f)); }
// The low byte of lane i is the integer nearest to x, |x| < 128, in two's complement.
INL ints nearest(vf<8> x) { return (ints)(x + 12582912.0f); }
INL void put(uint8_t* p, ints q) {
#if defined(__AVX2__)
  const __m128i low = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m128i a = _mm_shuffle_epi8(_mm256_castsi256_si128((__m256i)q), low);
  const __m128i b = _mm_shuffle_epi8(_mm256_extracti128_si256((__m256i)q, 1), low);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(a, b));
#else
  *reinterpret_cast<bytes_u*>(p) = __builtin_convertvector(q, bytes);
#endif
}
INL ints widen(const uint8_t* p) {
#if defined(__AVX2__)
  return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const bytes_u*>(p), ints);
#endif
}
INL ints widen_signed(const uint8_t* p) {
#if defined(__AVX2__)
  return (ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const signed_u*>(p), ints);
#endif
}
INL vf<8> as_floats(ints q) { return __builtin_convertvector(q, vf<8>); }
INL float meta_value(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return half_value(h);
}
INL half* halves(uint8_t* p) { return reinterpret_cast<half*>(p); }

// reaches(scale): whether what decode writes for the largest q is at least the largest value.
template <class F> INL vf<8> scale_of(vf<8> quotient, vf<8> span, F reaches) {
  const ints digits = quotient < kNormal ? ints{} + 0x7FFFFF : ints{} + 0x1FFF;  // of float32's, those that go
  const vf<8> up = vmax<8>((vf<8>)(((ints)quotient + digits) & ~digits), splat<8>(kTiny));
  const vf<8> below = (vf<8>)((ints)up - (up <= kNormal ? ints{} + 0x800000 : ints{} + 0x2000));
  const vf<8> found = vmin(reaches(below) & (up > kTiny) ? below : up, splat<8>(kHalfMax));
  const vf<8> normal = splat<8>(kNormal);  // which may have been reached by more than one step of those above it
  return span <= kTiny / 2 ? vf<8>{} : (up > normal) & reaches(normal) ? normal : found;
}

template <class T> INL vf<8> symmetric(vf<8> largest) {
  return scale_of(largest / 127.0f, largest, [&](vf<8> scale) { return rounded<T>(127.0f * scale) >= largest; });
}

template <class T> INL void asymmetric(vf<8> low, vf<8> high, vf<8>* zero, vf<8>* scale) {
  const ints bits = (ints)low;
  const vf<8> cut = (vf<8>)((low < 0.0f ? bits + 0x1FFF : bits) & ~0x1FFF);
  const ints size = (ints)low & 0x7FFFFFFF;
  const vf<8> scaled = low * 0x1p24f;  // where it is used it is below 1024: rounding to an integer by adding 1.5 * 2^23
  const vf<8> small = ((scaled + 12582912.0f) - 12582912.0f) * kTiny;
  vf<8> z = size < 0x38800000 ? small : cut;
  z = clamped(z, -kHalfMax, kHalfMax) + 0.0f;
  const vf<8> span = high - z;
  *zero = z;
  *scale = scale_of(span / 15.0f, span, [&](vf<8> s) { return rounded<T>(z + 15.0f * s) >= high; });
}

// Lane i: the largest of the eight lanes of v[i].
INL vf<8> largest_of_each(const vf<8>* v) {
  float rows[64], columns[64];
  const float* pointers[8];
  for (int i = 0; i < 8; ++i) store<8>(rows + 8 * i, v[i]), pointers[i] = rows + 8 * i;
  transpose8(pointers, 8, columns, 8);
  vf<8> best = load<8>(columns);
  for (int i = 1; i < 8; ++i) best = vmax<8>(best, load<8>(columns + 8 * i));
  return best;
}

// The first n of eight numbers that float16 holds.
INL void put_halves(uint8_t* at, vf<8> v, int n) {
  half h[8];
  store8(h, v);
  std::memcpy(at, h, 2 * n);
}

// Numbers of a pool, those that are not finite as 0.
template <class T> INL vf<8> read(const T* p) { return finite(load8(p)); }
INL vf<8> size_of(vf<8> x) { return (vf<8>)((ints)x & 0x7FFFFFFF); }

// out[d] = x[d] * by, rounded, of -127..127.
INL void put_row8(const float* x, float by, int dim, uint8_t* out) {
  int d = 0;
#if defined(__AVX2__)
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (; d + 32 <= dim; d += 32) {
    __m256i q[4];
    for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32((__m256)clamped(load<8>(x + d + 8 * i) * by, -127.0f, 127.0f));
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d), _mm256_permutevar8x32_epi32(packed, order));
  }
#endif
  for (; d < dim; d += 8) put(out + d, nearest(clamped(load<8>(x + d) * by, -127.0f, 127.0f)));
}

template <class T> void encode_int8(const Part<T> p, float* x) {
  for (int t0 = 0; t0 < p.count; t0 += 8) {
    const int n = std::min(8, p.count - t0);
    vf<8> top[8] = {};
    for (int i = 0; i < n; ++i) {
      const T* row = p.row(t0 + i);
      float* to = x + i * p.dim;
      vf<8> best[2] = {};
      for (int d = 0; d < p.dim; d += 16)
        for (int j = 0; j < 2; ++j) {
          const vf<8> v = read(row + d + 8 * j);
          store<8>(to + d + 8 * j, v), best[j] = vmax<8>(best[j], size_of(v));
        }
      top[i] = vmax<8>(best[0], best[1]);
    }
    const vf<8> scale = symmetric<T>(largest_of_each(top)), by = inverse(scale);
    put_halves(p.meta + 2 * t0, scale, n);
    for (int i = 0; i < n; ++i) put_row8(x + i * p.dim, by[i], p.dim, p.rows + (t0 + i) * p.dim);
  }
}

INL vf<8> quotient(vf<8> x, vf<8> zero, vf<8> by) { return clamped((x - zero) * by, 0.0f, 15.0f); }
INL ints four_bits(vf<8> x, vf<8> zero, vf<8> by) { return nearest(quotient(x, zero, by)) & 15; }

#if defined(__AVX2__)
// 32 bytes of 32 numbers of a (low four bits) and 32 of b. parameters(i): zero and 1 / scale of a + 8 i, then of b.
template <class F> INL void put_pairs32(const float* a, const float* b, uint8_t* out, F parameters) {
  __m256i q[8];
  for (int i = 0; i < 8; ++i) {
    vf<8> zero, by;
    parameters(i, &zero, &by);
    q[i] = _mm256_cvtps_epi32((__m256)quotient(load<8>(i < 4 ? a + 8 * i : b + 8 * i - 32), zero, by));
  }
  __m256i bytes16[2];
  for (int i = 0; i < 2; ++i)
    bytes16[i] = _mm256_or_si256(_mm256_packs_epi32(q[2 * i], q[2 * i + 1]),
                                 _mm256_slli_epi16(_mm256_packs_epi32(q[2 * i + 4], q[2 * i + 5]), 4));
  const __m256i packed = _mm256_packus_epi16(bytes16[0], bytes16[1]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(packed, order));
}
#endif

template <class T> void encode_int4_keys(const Part<T> p, float* x) {
  const int dim = p.dim, pairs = dim / 2;
  float low[kMaxDim], high[kMaxDim];
  for (int t = 0; t < p.count; t += 4) {  // the last row stands for those that are not there
    const T* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = p.row(std::min(t + i, p.count - 1));
    for (int d = 0; d < dim; d += 8) {
      vf<8> v[4];
      for (int i = 0; i < 4; ++i) v[i] = read(rows[i] + d), store<8>(x + (t + i) * dim + d, v[i]);
      const vf<8> least = vmin(vmin(v[0], v[1]), vmin(v[2], v[3])), most = vmax<8>(vmax<8>(v[0], v[1]), vmax<8>(v[2], v[3]));
      store<8>(low + d, t ? vmin(load<8>(low + d), least) : least);
      store<8>(high + d, t ? vmax<8>(load<8>(high + d), most) : most);
    }
  }
  for (int d = 0; d < dim; d += 8) {
    vf<8> zero, scale;
    asymmetric<T>(load<8>(low + d), load<8>(high + d), &zero, &scale);
    store8(halves(p.meta) + d, zero), store8(halves(p.meta) + dim + d, scale);
    store<8>(low + d, zero), store<8>(high + d, inverse(scale));
  }
  for (int t = 0; t < p.count; ++t) {
    const float* at = x + t * dim;
    uint8_t* out = p.rows + t * pairs;
    int d = 0;
#if defined(__AVX2__)
    for (; d + 32 <= pairs; d += 32)
      put_pairs32(at + d, at + pairs + d, out + d, [&](int i, vf<8>* zero, vf<8>* by) {
        const int channel = i < 4 ? d + 8 * i : pairs + d + 8 * i - 32;
        *zero = load<8>(low + channel), *by = load<8>(high + channel);
      });
#endif
    for (; d < pairs; d += 8) {
      const ints a = four_bits(load<8>(at + d), load<8>(low + d), load<8>(high + d));
      const ints b = four_bits(load<8>(at + pairs + d), load<8>(low + pairs + d), load<8>(high + pairs + d));
      put(out + d, a | b << 4);
    }
  }
}

template <class T> void encode_int4_values(const Part<T> p, float* x) {
  const int dim = p.dim, groups = (dim + kGroup - 1) / kGroup, pairs = dim / 2;
  float zeros[kMaxDim / kGroup][8], by[kMaxDim / kGroup][8];
  for (int t0 = 0; t0 < p.count; t0 += 8) {
    const int n = std::min(8, p.count - t0);
    const T* rows[8];
    for (int i = 0; i < n; ++i) rows[i] = p.row(t0 + i);
    for (int g = 0; g < groups; ++g) {
      vf<8> below[8] = {}, high[8] = {}, zero, scale;  // below: -minimum
      for (int i = 0; i < n; ++i) {
        const int d0 = g * kGroup;
        vf<8> least = read(rows[i] + d0), most = least;
        store<8>(x + i * dim + d0, least);
        for (int d = d0 + 8; d < std::min(dim, d0 + kGroup); d += 8) {
          const vf<8> v = read(rows[i] + d);
          store<8>(x + i * dim + d, v), least = vmin(least, v), most = vmax<8>(most, v);
        }
        below[i] = -least, high[i] = most;
      }
      asymmetric<T>(-largest_of_each(below), largest_of_each(high), &zero, &scale);
      store<8>(zeros[g], zero), store<8>(by[g], inverse(scale));
      put_halves(p.meta + 2 * (g * kTokens + t0), zero, n);
      put_halves(p.meta + 2 * ((groups + g) * kTokens + t0), scale, n);
    }
    for (int i = 0; i < n; ++i) {
      const float* at = x + i * dim;
      uint8_t* out = p.rows + (t0 + i) * pairs;
      int d = 0;
#if defined(__AVX2__)
      for (; pairs % kGroup == 0 && d < pairs; d += 32)  // 32 numbers of one group beside 32 of another
        put_pairs32(at + d, at + pairs + d, out + d, [&](int k, vf<8>* zero, vf<8>* inverse) {
          const int g = (k < 4 ? d : d + pairs) / kGroup;
          *zero = splat<8>(zeros[g][i]), *inverse = splat<8>(by[g][i]);
        });
#endif
      for (; d < pairs; d += 8) {
        const int g = d / kGroup, h = (d + pairs) / kGroup;
        const ints a = four_bits(load<8>(at + d), splat<8>(zeros[g][i]), splat<8>(by[g][i]));
        const ints b = four_bits(load<8>(at + pairs + d), splat<8>(zeros[h][i]), splat<8>(by[h][i]));
        put(out + d, a | b << 4);
      }
    }
  }
}

// What is beyond float16's range when rounded would be infinite.
template <class T> INL void write(T* p, vf<8> v) { store8(p, v); }
template <> INL void write(half* p, vf<8> v) { store8(p, clamped(v, -kHalfMax, kHalfMax)); }

template <class T> void decode_int8(const Part<T> p) {
  for (int t = 0; t < p.count; ++t) {
    const float scale = meta_value(p.meta + 2 * t);
    T* row = p.template row<true>(t);
    for (int d = 0; d < p.dim; d += 8) write(row + d, as_floats(widen_signed(p.rows + t * p.dim + d)) * scale);
  }
}

template <class T> void decode_int4_keys(const Part<T> p) {
  float zero[kMaxDim], scale[kMaxDim];
  const int pairs = p.dim / 2;
  for (int d = 0; d < p.dim; d += 8)
    store<8>(zero + d, load8(halves(p.meta) + d)), store<8>(scale + d, load8(halves(p.meta) + p.dim + d));
  for (int t = 0; t < p.count; ++t) {
    T* row = p.template row<true>(t);
    for (int d = 0; d < pairs; d += 8) {
      const ints q = widen(p.rows + t * pairs + d);
      write(row + d, load<8>(zero + d) + as_floats(q & 15) * load<8>(scale + d));
      write(row + pairs + d, load<8>(zero + pairs + d) + as_floats(q >> 4) * load<8>(scale + pairs + d));
    }
  }
}

template <class T> void decode_int4_values(const Part<T> p) {
  const int groups = (p.dim + kGroup - 1) / kGroup, pairs = p.dim / 2;
  float zero[kMaxDim / kGroup], scale[kMaxDim / kGroup];
  for (int t = 0; t < p.count; ++t) {
    for (int g = 0; g < groups; ++g) {
      zero[g] = meta_value(p.meta + 2 * (g * kTokens + t));
      scale[g] = meta_value(p.meta + 2 * ((groups + g) * kTokens + t));
    }
    T* row = p.template row<true>(t);
    for (int d = 0; d < pairs; d += 8) {
      const int g = d / kGroup, h = (d + pairs) / kGroup;
      const ints q = widen(p.rows + t * pairs + d);
      write(row + d, zero[g] + as_floats(q & 15) * scale[g]);
      write(row + pairs + d, zero[h] + as_floats(q >> 4) * scale[h]);
    }
  }
}

template <class T> void copy(const Part<T> p, bool encode) {
  const size_t size = size_t(p.dim) * sizeof(T);
  for (int t = 0; t < p.count; ++t) {
    uint8_t *stored = p.rows + t * size, *row = reinterpret_cast<uint8_t*>(p.row(t));
    encode ? std::memcpy(stored, row, size) : std::memcpy(row, stored, size);
  }
}

template <class T> void unit(const Args& a, int64_t i, int64_t first, bool encode, float* x) {
  const int64_t b = i / a.heads, h = i % a.heads;
  uint8_t* at = a.arena + (a.blocks[b] * a.heads + h) * (a.k_meta + a.v_meta + a.k_bytes + a.v_bytes);
  const int count = int(a.counts[b]);
  const Part<T> k{static_cast<T*>(a.keys) + h * a.k_head, a.k_token, a.slots + first, count, int(a.k_dim), at,
                  at + a.k_meta + a.v_meta};
  const Part<T> v{static_cast<T*>(a.values) + h * a.v_head, a.v_token, a.slots + first, count, int(a.v_dim), at + a.k_meta,
                  at + a.k_meta + a.v_meta + a.k_bytes};
  if (a.codec == kNative) {
    copy(k, encode), copy(v, encode);
  } else if (a.codec == kInt8) {
    encode ? (encode_int8(k, x), encode_int8(v, x)) : (decode_int8(k), decode_int8(v));
  } else {
    encode ? (encode_int4_keys(k, x), encode_int4_values(v, x)) : (decode_int4_keys(k), decode_int4_values(v));
  }
}

int check(const Args& a, std::vector<int64_t>& first) {
  int64_t total = 0;
  for (int64_t b = 0; b < a.used_blocks; ++b) {
    if (a.counts[b] < 1 || a.counts[b] > kTokens) return kBadCounts;
    if (a.blocks[b] < 0 || a.blocks[b] >= a.arena_blocks) return kBadBlock;
    first.push_back(total);
    total += a.counts[b];
  }
  if (total != a.tokens) return kBadCounts;
  for (int64_t i = 0; i < a.tokens; ++i)
    if (a.slots[i] < 0 || a.slots[i] >= a.pool_slots) return kBadSlot;
  return 0;
}

template <class T> int run(const Args& a, bool encode) {
  std::atomic<int> error{0};
  std::vector<int64_t> first;
  guard(error, [&] {
    if (const int wrong = check(a, first)) error = wrong;
  });
  if (error) return error;
  const int64_t units = a.used_blocks * a.heads;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && units > 1)
  {
    std::vector<float> x;
    guard(error, [&] { x.resize(a.codec == kNative || !encode ? 0 : kTokens * size_t(std::max(a.k_dim, a.v_dim))); });
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < units; ++i)
      if (!error) unit<T>(a, i, first[i / a.heads], encode, x.data());
  }
  return error;
}

}  // namespace

// dtype: 0 float32, 1 bfloat16, 2 float16.
extern "C" int keepkv_codec(const void* args, int dtype, int encode) {
  const Args& a = *static_cast<const Args*>(args);
  return dtype == 0 ? run<float>(a, encode) : dtype == 1 ? run<bf16>(a, encode) : run<half>(a, encode);
}
