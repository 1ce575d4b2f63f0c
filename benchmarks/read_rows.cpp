// The ceiling of decode: reads the rows of K and V that the slots name, each once, in the kernel's blocks and with its
// prefetching, and adds up what it reads.
#include <cstdint>
#include <omp.h>

typedef float vec __attribute__((vector_size(64), aligned(4)));
constexpr int64_t kBlock = 256, kAhead = 8;

extern "C" float keepkv_read(const float* k, const float* v, const int32_t* slots, int64_t n, int64_t row,
                             int64_t threads) {
  float total = 0.0f;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(+ : total)
  for (int64_t block = 0; block < n; block += kBlock) {
    vec sum[4] = {};
    for (int64_t i = block; i < (block + kBlock < n ? block + kBlock : n); ++i) {
      if (i + kAhead < n)
        for (int64_t d = 0; d < row; d += 16) {
          __builtin_prefetch(k + slots[i + kAhead] * row + d, 0, 2);
          __builtin_prefetch(v + slots[i + kAhead] * row + d, 0, 2);
        }
      const float *a = k + slots[i] * row, *b = v + slots[i] * row;
      for (int64_t d = 0; d + 16 <= row; d += 16)
        sum[d / 16 % 4] += *reinterpret_cast<const vec*>(a + d) + *reinterpret_cast<const vec*>(b + d);
    }
    vec all = sum[0] + sum[1] + sum[2] + sum[3];
    for (int j = 0; j < 16; ++j) total += all[j];
  }
  return total;
}
