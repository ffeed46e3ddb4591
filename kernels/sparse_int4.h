// Products with rows of 4-bit weights, for a few active ones of them.
//
//   y[r,n] = Σ_g scale[g,n]·Σ_{i ∈ S ∩ g} x[r,i] q[i,n] + zero[g,n]·Σ_{i ∈ S ∩ g} x[r,i] + bias[n]
//
// Of one input the levels q[i,:] lie together: byte m of ⌈out/2⌉ holds q[i,2m] + 8 in its low half and
// q[i,2m+1] + 8 in its high half. So do the scales of a group of neighbouring inputs, two bytes each
// (bfloat16): the even ones are the low halves of 32 bits, the odd ones the high halves, as the levels
// are of a byte. Even and odd outputs are summed apart, and put in order at the end.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "sparse_active.h"
#include "vectors.h"

namespace {

struct Levels {
  const uint8_t* weight;      // [in, ⌈out/2⌉]
  const void *scale, *zero;   // [groups, out]; zero or null
  long out, group;
  bool floats;                // scale and zero: float, else bfloat16
};

constexpr long MOST = 128;  // inputs in a group

// The active entries of one group.
struct Group {
  const uint8_t *row[MOST], *next[MOST];  // next: what is read of the weight afterwards
  float value[MOST * GROUP];              // [count, R]
  float sum[GROUP];                       // of each row of x
  long count;
};

struct Pair {
  vec even, odd;
};

INLINE Pair levels_of(const uint8_t* p) {
#if defined(__AVX512F__) && !defined(VECTORS_NARROW)
  const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  return {(vec)_mm512_permutexvar_ps(bytes, levels),  // it reads four bits of each index
          (vec)_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), levels)};
#else
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi32(15)), high = _mm256_srli_epi32(bytes, 4);
  return {(vec)_mm256_cvtepi32_ps(low) - 8.0f, (vec)_mm256_cvtepi32_ps(high) - 8.0f};
#endif
}

// Of 2·V scales or zeros from the i-th on.
INLINE Pair pair_of(const void* from, long i, bool floats) {
  if (floats) {
    float even[V], odd[V];
    for (int j = 0; j < V; j++) even[j] = ((const float*)from)[i + 2 * j], odd[j] = ((const float*)from)[i + 2 * j + 1];
    return {load(even), load(odd)};
  }
  ints both;
  memcpy(&both, (const uint16_t*)from + i, sizeof(both));
  return {(vec)(both << 16), (vec)(both & (int32_t)0xffff0000)};
}

INLINE float one_of(const void* from, long i, bool floats) {
  if (floats) return ((const float*)from)[i];
  const uint32_t bits = (uint32_t)((const uint16_t*)from)[i] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// 2·V·U outputs from j on, even ones in front of odd ones in every 2·V.
template <int R, int U>
INLINE void add_units(const Levels& l, const Group& group, long g, long j, float* y) {
  vec part[R][2 * U];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int u = 0; u < 2 * U; u++) part[r][u] = all(0);
  for (long n = 0; n < group.count; n++) {
    const uint8_t* p = group.row[n] + j / 2;
    if ((j / 2) % 64 < U * V) _mm_prefetch((const char*)(group.next[n] + j / 2), _MM_HINT_T0);
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      const Pair w = levels_of(p + u * V);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const vec x = all(group.value[n * R + r]);
        part[r][2 * u] += w.even * x;
        part[r][2 * u + 1] += w.odd * x;
      }
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < U; u++) {
    const long at = j + u * 2 * V;
    const Pair scale = pair_of(l.scale, g * l.out + at, l.floats);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      float* to = y + r * l.out + at;
      vec even = load(to) + part[r][2 * u] * scale.even, odd = load(to + V) + part[r][2 * u + 1] * scale.odd;
      if (l.zero) {
        const Pair zero = pair_of(l.zero, g * l.out + at, l.floats);
        even += zero.even * all(group.sum[r]);
        odd += zero.odd * all(group.sum[r]);
      }
      store(to, even);
      store(to + V, odd);
    }
  }
}

template <int R>
INLINE void add_one(const Levels& l, const Group& group, long g, long j, float* y) {
  const float scale = one_of(l.scale, g * l.out + j, l.floats);
  const float zero = l.zero ? one_of(l.zero, g * l.out + j, l.floats) : 0;
  for (int r = 0; r < R; r++) {
    float part = 0;
    for (long n = 0; n < group.count; n++) {
      const int byte = group.row[n][j / 2];
      part = std::fma((float)((j % 2 ? byte >> 4 : byte & 15) - 8), group.value[n * R + r], part);
    }
    y[r * l.out + j] += part * scale + zero * group.sum[r];
  }
}

// 2·V numbers, even ones in front of odd ones, in their order.
INLINE void in_order(float* y) {
#if defined(__AVX512F__) && !defined(VECTORS_NARROW)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512 even = (__m512)load(y), odd = (__m512)load(y + V);
  store(y, (vec)_mm512_permutex2var_ps(even, low, odd));
  store(y + V, (vec)_mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
#else
  const __m256 even = (__m256)load(y), odd = (__m256)load(y + V);
  const __m256 a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
  store(y, (vec)_mm256_permute2f128_ps(a, b, 0x20));
  store(y + V, (vec)_mm256_permute2f128_ps(a, b, 0x31));
#endif
}

// y[r, from:to] of R rows; `from` is a multiple of 64.
template <int R>
__attribute__((noinline)) void add_groups(const Levels& l, const Active& active, const float* bias, float* y,
                                          long from, long to) {
  // sums that registers hold
  constexpr int U = V == 16 ? (R <= 2 ? 4 : R <= 4 ? 2 : 1) : (R == 1 ? 4 : R == 2 ? 2 : 1);
  const long bytes = (l.out + 1) / 2, whole = from + (to - from) / (2 * V) * (2 * V);
  for (int r = 0; r < R; r++) memset(y + r * l.out + from, 0, (to - from) * sizeof(float));
  Group group;
  for (long a = 0; a < active.count; a += group.count) {
    const long g = active.index[a] / l.group, end = (g + 1) * l.group;
    long b = a;
    while (b < active.count && active.index[b] < end) b++;
    group.count = b - a;
    for (int r = 0; r < R; r++) group.sum[r] = 0;
    for (long n = 0; n < group.count; n++) {
      const long ahead = least(b + n, active.count - 1);
      group.row[n] = l.weight + active.index[a + n] * bytes;
      group.next[n] = l.weight + active.index[ahead] * bytes;
      for (int r = 0; r < R; r++) group.sum[r] += group.value[n * R + r] = active.of(a + n, r);
    }
    long j = from;
    for (; j + U * 2 * V <= whole; j += U * 2 * V) add_units<R, U>(l, group, g, j, y);
    if constexpr (U > 1)
      for (; j < whole; j += 2 * V) add_units<R, 1>(l, group, g, j, y);
    for (; j < to; j++) add_one<R>(l, group, g, j, y);
  }
  for (int r = 0; r < R; r++) {
    float* own = y + r * l.out;
    for (long j = from; j < whole; j += 2 * V) in_order(own + j);
    for (long j = from; bias && j < to; j++) own[j] += bias[j];
  }
}

void add_groups(const Levels& l, const Active& active, const float* bias, float* y, long rows, long from, long to) {
  switch (rows) {
    case 1: return add_groups<1>(l, active, bias, y, from, to);
    case 2: return add_groups<2>(l, active, bias, y, from, to);
    case 3: return add_groups<3>(l, active, bias, y, from, to);
    case 4: return add_groups<4>(l, active, bias, y, from, to);
    case 5: return add_groups<5>(l, active, bias, y, from, to);
    case 6: return add_groups<6>(l, active, bias, y, from, to);
    case 7: return add_groups<7>(l, active, bias, y, from, to);
    default: return add_groups<8>(l, active, bias, y, from, to);
  }
}

// Whether the sums of levels are finite wherever the result is: no number is large, or none.
INLINE bool moderate(const Active& active) {
  uint32_t most = 0;
  for (float value : active.value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return most < 0x71000000;  // 2⁹⁹
}

}  // namespace
