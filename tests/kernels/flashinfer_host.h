// Just enough of CUDA and FlashInfer for g++ to compile an attention variant as host code. The macros, DEFINE_HAS_MEMBER
// and the Params structs are not here: the test takes their text from the installed FlashInfer.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#define __device__
#define __host__
#define __forceinline__ inline

namespace flashinfer {
namespace math {
constexpr float log2e = 1.44269504088896340736f;
constexpr float inf = __builtin_inff();
}  // namespace math

struct uint_fastdiv {
  uint32_t d = 1;
  operator uint32_t() const { return d; }
  void divmod(uint32_t n, uint32_t& q, uint32_t& r) const { q = n / d, r = n % d; }
};

// Members and get_length of flashinfer/page.cuh's paged_kv_t, as far as a variant may look.
template <typename DType, typename IdType>
struct paged_kv_t {
  uint_fastdiv page_size;
  uint32_t num_heads = 0;
  IdType* indices = nullptr;
  IdType* indptr = nullptr;
  IdType* last_page_len = nullptr;
  uint32_t get_length(uint32_t b) const {
    if (indptr[b + 1] == indptr[b]) return 0;
    return (indptr[b + 1] - indptr[b] - 1) * page_size + last_page_len[b];
  }
};

struct AttentionVariantBase {};
template <int NUM_ROWS, bool WITH_SCALE>
struct OnlineSoftmax {
  float sm_scale_log2;
  OnlineSoftmax(float scale) : sm_scale_log2(scale) {}
};
}  // namespace flashinfer

template <typename T>
T __ldg(const T* p) {
  return *p;
}

// Every array has a heap block of exactly its size, so that AddressSanitizer sees a read one past its end.
template <typename T>
struct Array {
  uint64_t n = 0;
  T* at = nullptr;
  Array() {
    if (fread(&n, sizeof n, 1, stdin) != 1) abort();
    at = static_cast<T*>(malloc(n * sizeof(T)));
    if (n && fread(at, sizeof(T), n, stdin) != n) abort();
  }
  ~Array() { free(at); }
  T& operator[](size_t i) const { return at[i]; }
};
