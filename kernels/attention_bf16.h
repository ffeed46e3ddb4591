// attention_cpu.cpp's heads with both products of bfloat16 numbers, summed in float32: for CPUs with
// AVX512-BF16, where vdpbf16ps adds two products in the time of one.
//
//   s[i,t] = Σ_d bf16(q[i,d]·scale·log₂e)·bf16(k[t,d]) + mask[i,t]·log₂e
//   p[i,t] = bf16(2^(s[i,t] − max_t s[i,t]))       y[i,d] = Σ_t p[i,t] bf16(v[t,d]) / Σ_t p[i,t]
//
// A register holds pairs: of neighbouring d for the scores, of neighbouring t for the mixture. What a
// mask adds is where a sum begins. p has 8 bits: a polynomial of degree 3 is exact for it.
//
// Where the CPU has AMX, tiles of 16 × 32 numbers are multiplied by it, from the same pairs, sixteen
// times as many a cycle.

#pragma once

#include <immintrin.h>

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__) && !defined(ATTENTION_NO_AMX)
#define TILES 1
#include "amx.h"
#else
#define TILES 0
#endif

namespace bf16 {

constexpr long V = 16, ROWS = 12, PAD = 2 * V;  // rows of a tile; keys come in multiples of PAD
constexpr float LOG2E = 1.44269504f;

INLINE __m512i pairs(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
INLINE __m512i spread(const uint16_t* p) {
  int32_t two;
  memcpy(&two, p, 4);
  return _mm512_set1_epi32(two);
}

// 2^x for x ≤ 0, to 1e-4: 2^⌊x⌋ by the exponent, the rest by a polynomial; 0 at −∞, NaN stays.
INLINE __m512 power(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 9);  // x − ⌊x⌋
  __m512 p = _mm512_set1_ps(0.07802452f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.22606716f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69583354f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99992522f));
  return _mm512_scalef_ps(p, x);
}

// A 16 × 16 block, rows and columns exchanged.
INLINE void transpose(__m512i r[16]) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
  for (int s = 8; s; s /= 2) {
    const __m512i far = _mm512_set1_epi32(16), bit = _mm512_set1_epi32(s);
    const __mmask16 upper = _mm512_test_epi32_mask(lane, bit);
    const __m512i low = _mm512_mask_add_epi32(lane, upper, _mm512_sub_epi32(lane, bit), far);
    const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, bit), upper, lane, far);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
      if (!(i & s)) {
        const __m512i a = r[i], b = r[i + s];
        r[i] = _mm512_permutex2var_epi32(a, low, b);
        r[i + s] = _mm512_permutex2var_epi32(a, high, b);
      }
  }
}

// k [keys, depth] → [depth/2, columns] of pairs of neighbouring d; zeros beyond the keys.
void pack_keys(const float* k, long row, long keys, long depth, long columns, uint32_t* to) {
  for (long t0 = 0; t0 < columns; t0 += V)
    for (long d = 0; d < depth; d += 32) {
      const bool whole = d + 32 <= depth;  // or else 16 are left
      __m512i r[16];
      for (long i = 0; i < 16; i++) {
        const float* from = k + (t0 + i) * row + d;
        r[i] = t0 + i >= keys ? _mm512_setzero_si512()
                              : pairs(_mm512_loadu_ps(from),
                                      whole ? _mm512_loadu_ps(from + 16) : _mm512_setzero_ps());
      }
      transpose(r);
#pragma GCC unroll 16
      for (long i = 0; i < 16; i++)
        if (i < 8 || whole) _mm512_store_si512(to + (d / 2 + i) * columns + t0, r[i]);
    }
}

// v [keys, depth] → [columns/2, depth] of pairs of neighbouring t; zeros beyond the keys.
void pack_values(const float* v, long row, long keys, long depth, long columns, uint32_t* to) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; i++) order[i] = (uint16_t)(i / 2 + i % 2 * 16);
  const __m512i mixed = _mm512_load_si512(order);
  for (long t = 0; t < columns; t += 2)
    for (long d = 0; d < depth; d += V) {
      const float* from = v + t * row + d;
      const __m512 a = t < keys ? _mm512_loadu_ps(from) : _mm512_setzero_ps();
      const __m512 b = t + 1 < keys ? _mm512_loadu_ps(from + row) : _mm512_setzero_ps();
      _mm512_store_si512(to + t / 2 * depth + d, _mm512_permutexvar_epi16(mixed, pairs(a, b)));
    }
}

// M queries × J·V keys: their scores, and the largest of each row so far.
template <int M, int J>
INLINE void scores(const uint16_t* q, const uint32_t* k, long depth, long columns,
                   const float* const* begin, long t, float* s, __m512* most) {
  __m512 sum[M][J];
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) sum[m][j] = _mm512_loadu_ps(begin[m] + t + j * V);
  for (long d = 0; d < depth / 2; d++) {
    __m512i column[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) column[j] = _mm512_load_si512(k + d * columns + t + j * V);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      const __m512i x = spread(q + m * depth + 2 * d);
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) sum[m][j] = dot(sum[m][j], x, column[j]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) {
    __m512 high = most[m];
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) {
      _mm512_store_ps(s + m * columns + t + j * V, sum[m][j]);
      high = _mm512_max_ps(sum[m][j], high);  // in this order NaN is passed over
    }
    most[m] = high;
  }
}

// Scores → p of one row; returns 1/Σp, or 0 where all is −∞ (p is 0 then).
INLINE float softmax(const float* s, long used, __m512 most, uint16_t* p) {
  float high = _mm512_reduce_max_ps(most);
  if (high == NEVER) high = 0;
  const __m512 off = _mm512_set1_ps(high);
  __m512 a = _mm512_setzero_ps(), b = a;
  for (long t = 0; t < used; t += PAD) {
    const __m512 low = power(_mm512_sub_ps(_mm512_load_ps(s + t), off));
    const __m512 next = power(_mm512_sub_ps(_mm512_load_ps(s + t + V), off));
    a = _mm512_add_ps(a, low), b = _mm512_add_ps(b, next);
    _mm512_store_si512(p + t, pairs(low, next));
  }
  const float total = _mm512_reduce_add_ps(_mm512_add_ps(a, b));
  return total > 0 ? 1 / total : total == 0 ? 0 : total;
}

// M rows of p × J·V columns of v.
template <int M, int J>
INLINE void mixed(const uint16_t* p, const uint32_t* v, long depth, long used, long columns,
                  const float* by, long rows, float* y, long y_row) {
  __m512 sum[M][J];
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) sum[m][j] = _mm512_setzero_ps();
  for (long t = 0; t < used; t += 2) {
    __m512i x[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) x[j] = _mm512_load_si512(v + t / 2 * depth + j * V);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      const __m512i w = spread(p + m * columns + t);
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) sum[m][j] = dot(sum[m][j], w, x[j]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
    if (m < rows)
#pragma GCC unroll 4
      for (int j = 0; j < J; j++)
        _mm512_storeu_ps(y + m * y_row + j * V, _mm512_mul_ps(sum[m][j], _mm512_set1_ps(by[m])));
}

#if TILES
using amx::TILE;

// 16·H queries × all keys: their scores. What a sum begins with lies `apart` bytes from row to row.
template <int H>
void tile_scores(const uint16_t* q, const uint32_t* k, long depth, long columns, long used, const float* begins,
                 long apart, float* s) {
  const long row = columns * sizeof(float);
  const char* next = (const char*)begins + TILE * apart;
  for (long t = 0; t < used; t += PAD) {
    _tile_loadd(0, begins + t, apart);
    _tile_loadd(1, begins + t + V, apart);
    if (H > 1) {
      _tile_loadd(2, (const float*)next + t, apart);
      _tile_loadd(3, (const float*)next + t + V, apart);
    }
    for (long d = 0; d < depth; d += 2 * V) {
      const uint32_t* keys = k + d / 2 * columns + t;
      _tile_loadd(4, q + d, depth * sizeof(uint16_t));
      _tile_loadd(6, keys, row);
      _tile_loadd(7, keys + V, row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (H > 1) {
        _tile_loadd(5, q + TILE * depth + d, depth * sizeof(uint16_t));
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, s + t, row);
    _tile_stored(1, s + t + V, row);
    if (H > 1) {
      _tile_stored(2, s + TILE * columns + t, row);
      _tile_stored(3, s + TILE * columns + t + V, row);
    }
  }
}

// 16·H rows of p × 32 columns of v.
template <int H>
void tile_mixed(const uint16_t* p, const uint32_t* v, long depth, long used, long columns, const float* by,
                long rows, float* y, long y_row) {
  alignas(64) float sum[H * TILE][2 * V];
  const long row = 2 * V * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  if (H > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long t = 0; t < used; t += PAD) {
    const uint32_t* values = v + t / 2 * depth;
    _tile_loadd(4, p + t, columns * sizeof(uint16_t));
    _tile_loadd(6, values, depth * sizeof(uint32_t));
    _tile_loadd(7, values + V, depth * sizeof(uint32_t));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (H > 1) {
      _tile_loadd(5, p + TILE * columns + t, columns * sizeof(uint16_t));
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sum[0], row);
  _tile_stored(1, sum[0] + V, row);
  if (H > 1) {
    _tile_stored(2, sum[H * TILE - TILE], row);
    _tile_stored(3, sum[H * TILE - TILE] + V, row);
  }
  for (long m = 0; m < rows; m++)
    for (long j = 0; j < 2 * V; j += V)
      _mm512_storeu_ps(y + m * y_row + j, _mm512_mul_ps(_mm512_load_ps(sum[m] + j), _mm512_set1_ps(by[m])));
}
#endif

// The largest of one row of scores; NaN is passed over.
INLINE __m512 most_of(const float* s, long used) {
  __m512 high = _mm512_set1_ps(NEVER);
  for (long t = 0; t < used; t += V) high = _mm512_max_ps(_mm512_load_ps(s + t), high);
  return high;
}

// Of a thread, kept from head to head: what is freed may go back to the system, and come page by page.
struct Memory {
  void* held = nullptr;
  long size = 0;
  void* of(long bytes) {
    if (size < bytes) {
      free(held);
      size = up(bytes, 64), held = aligned_alloc(64, size);
      if (!held) std::abort();
    }
    return held;
  }
  ~Memory() { free(held); }
};

// What a mask adds to one row of scores, times log₂e; −∞ beyond the keys.
void begin_row(const Call& c, long b, long h, long row, long columns, float* to) {
  for (long t = 0; t < columns; t++) to[t] = t < c.keys ? 0 : NEVER;
  add_mask(c, to, b, h, row);
  if (c.mask && !c.truths)
    for (long t = 0; t < c.keys; t++) {  // the lowest number stays one: −∞ would empty the row
      const float by = to[t] * LOG2E;
      to[t] = to[t] != NEVER && by < -__FLT_MAX__ ? -__FLT_MAX__ : by;
    }
}

// Queries [from, to) of one head.
void head(const Call& c, long b, long h, long from, long to) {
  const long depth = c.depth, y_row = c.heads * depth, kv = h / c.shared;
#if TILES
  // not by the rows of this part: which way they go must not depend on the number of threads
  const bool tiles = depth % PAD == 0 && c.queries >= 4 && amx::on();
#else
  const bool tiles = false;
#endif
  const long size = tiles ? 32 : ROWS, own = c.causal || (c.mask && c.mask_row) ? size : 1;
  long columns = up(c.keys, PAD);
  if (tiles && columns % 512 == 0) columns += PAD;  // or rows of a tile would share lines of the cache
  const long words = columns * depth + columns * (size + size / 2 + own) + size * depth / 2;
  static thread_local Memory kept;
  uint32_t* k = (uint32_t*)kept.of(words * 4);
  uint32_t* v = k + columns * depth / 2;
  float* s = (float*)(v + columns * depth / 2);
  uint16_t* p = (uint16_t*)(s + size * columns);
  float* begins = (float*)(p + size * columns);
  uint16_t* q = (uint16_t*)(begins + own * columns);
  pack_keys(c.k + b * c.k_batch + kv * c.k_head, c.k_row, c.keys, depth, columns, k);
  pack_values(c.v + b * c.v_batch + kv * c.v_head, c.v_row, c.keys, depth, columns, v);
#if TILES
  const amx::Tiles held(tiles);
#endif
  if (own == 1) begin_row(c, b, h, 0, columns, begins);
  const __m512 scale = _mm512_set1_ps((float)c.scale * LOG2E);
  for (long r = from; r < to; r += size) {
    const long rows = least(size, to - r);
    const long used = up(c.causal ? least(c.keys, r + rows) : c.keys, PAD);
    const float* x = c.q + b * c.q_batch + h * c.q_head + r * c.q_row;
    for (long m = 0; m < size; m++) {
      const long row = least(m, rows - 1);  // rows that are not there are the last one again
      if (own > 1 && m < rows) begin_row(c, b, h, r + m, columns, begins + m * columns);
      for (long d = 0; d < depth; d += V)
        _mm256_storeu_si256((__m256i*)(q + m * depth + d),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(x + row * c.q_row + d), scale)));
    }
    float by[32];
    float* y = c.y + (b * c.queries + r) * y_row + h * depth;
#if TILES
    if (tiles) {
      const auto scored = rows > TILE ? tile_scores<2> : tile_scores<1>;
      const auto mixed = rows > TILE ? tile_mixed<2> : tile_mixed<1>;
      amx::written();
      scored(q, k, depth, columns, used, begins, own > 1 ? columns * sizeof(float) : 0, s);
      for (long m = 0; m < rows; m++)
        by[m] = softmax(s + m * columns, used, most_of(s + m * columns, used), p + m * columns);
      amx::written();
      for (long d = 0; d < depth; d += 2 * V) mixed(p, v + d, depth, used, columns, by, rows, y + d, y_row);
      continue;
    }
#endif
    const float* begin[ROWS];
    __m512 most[ROWS];
    for (long m = 0; m < ROWS; m++)
      begin[m] = begins + (own > 1 ? least(m, rows - 1) * columns : 0), most[m] = _mm512_set1_ps(NEVER);
    long t = 0;
    for (; t + 4 * V <= used; t += 4 * V)
      for (long m = 0; m < ROWS && m < rows; m += 6)
        scores<6, 4>(q + m * depth, k, depth, columns, begin + m, t, s + m * columns, most + m);
    for (; t < used; t += PAD) scores<ROWS, 2>(q, k, depth, columns, begin, t, s, most);
    for (long m = 0; m < rows; m++) by[m] = softmax(s + m * columns, used, most[m], p + m * columns);
    long d = 0;
    for (; d + 4 * V <= depth; d += 4 * V)
      for (long m = 0; m < rows; m += 6)
        mixed<6, 4>(p + m * columns, v + d, depth, used, columns, by + m, rows - m, y + m * y_row + d, y_row);
    for (; d + 2 * V <= depth; d += 2 * V)
      mixed<ROWS, 2>(p, v + d, depth, used, columns, by, rows, y + d, y_row);
    for (; d < depth; d += V) mixed<ROWS, 1>(p, v + d, depth, used, columns, by, rows, y + d, y_row);
  }
}

}  // namespace bf16
