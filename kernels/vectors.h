// Vectors of floats for the C++ kernels, by the vector extensions of GCC and Clang.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__) && !defined(VECTORS_NARROW)
constexpr int V = 16;
#else
constexpr int V = 8;
#endif

typedef float vec __attribute__((vector_size(V * 4)));
typedef float vec_u __attribute__((vector_size(V * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(V * 4), may_alias));

INLINE vec load(const float* p) { return *(const vec_u*)p; }
INLINE void store(float* p, vec v) { *(vec_u*)p = v; }
INLINE vec all(float v) { return v - vec{}; }
INLINE long up(long n, long to) { return (n + to - 1) / to * to; }
INLINE long least(long a, long b) { return a < b ? a : b; }

// The first n of V numbers; zeros behind them.
INLINE vec load(const float* p, long n) {
  vec v{};
  memcpy(&v, p, n * sizeof(float));
  return v;
}
INLINE void store(float* p, vec v, long n) { memcpy(p, &v, n * sizeof(float)); }

// In this order NaN in x stays.
INLINE vec at_least(vec x, float low) { return x < all(low) ? all(low) : x; }
INLINE vec at_most(vec x, float high) { return x > all(high) ? all(high) : x; }

// exp(x) for x ≤ 0: 2^n by the exponent's bits, 2^f by a polynomial (Cephes' expf), to 2 ulp.
INLINE vec exponential(vec x) {
  x = at_least(x, -87.33654f);
  const vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5·2²³: rounds to a whole number
  const vec n = shifted - 12582912.0f;
  x = x - n * 0.693359375f;
  x = x + n * 2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * x + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  p = p * (x * x) + x + 1.0f;
  const ints power = ((ints)shifted << 23) + (127 << 23);
  return p * (vec)power;
}

}  // namespace
