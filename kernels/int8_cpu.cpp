// Linear layers on a CPU with 8-bit integers: quantize, multiply and finish in one call.
//
//   lo[r] = min_k x[r,k]      s[r] = (max_k x[r,k] − lo[r])/255      q[r,k] = round((x[r,k] − lo[r])/s[r])
//   y[r,n] = f(s[r]·(scale[n]·Σ_k q[r,k] w[n,k]) + bias[n] + lo[r]·(scale[n]·Σ_k w[n,k])) + add[r,n]
//
// with LayerNorm over the row where that is wanted,
//
//   (y[r,n] − mean_n y[r,n])/√(var_n y[r,n] + ε)·norm_weight[n] + norm_bias[n]
//
// or, with one range for all of x, 0 in it and lo a multiple of s,
//
//   z = round(−lo/s)     q[r,k] = ⌊x[r,k]/s + z + ½⌋     y[r,n] = f(s·scale[n]·(Σ_k q w − z·Σ_k w) + …)
//
// or the same with s and z that are given, of x[r,k]·multiplier[k], where f is nothing, ReLU, GELU, SiLU, ReLU6 or hardswish. A row of x is read from memory once and quantized in the
// nearest cache; the sums of products are exact in int32; what follows a sum happens before it is
// written. Rounding is that of fbgemm's row-wise quantizer and of the torch operations in
// int8_linear.py, in their order, so that the results have the same bits.
//
// The weight is packed once: panels of COLS columns, in each the groups of DOT values that one
// instruction multiplies, column beside column. vpdpbusd (AVX-512-VNNI, AVX-VNNI) adds four products
// of an unsigned and a signed byte; without it both are widened to int16 and added in pairs, as the
// byte instructions of AVX2 saturate. Where the CPU has AMX, several rows are multiplied by it
// (int8_amx.h), from the same panels.
//
// C++17 with Intel's intrinsics; threads as threads.h has them. Every output is summed by one thread,
// and sums of integers are exact in any order: results do not depend on the number of threads.

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "threads.h"

namespace {

#define INLINE inline __attribute__((always_inline))

// Instruction sets --------------------------------------------------------------------------------

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(INT8_NARROW)
#define ISA "AVX-512-VNNI"
#define WIDE 1
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__) && !defined(INT8_NO_AMX)
#define AMX 1
#endif
constexpr int V = 16, DOT = 4;
typedef __m512 vec;
typedef __m512i ints;
typedef __mmask16 some;
typedef uint8_t level;  // what one element of q is
INLINE ints dot(ints sum, ints q, ints w) { return _mm512_dpbusd_epi32(sum, q, w); }
INLINE ints weights(const int8_t* p) { return _mm512_load_si512(p); }
INLINE some first(long n) { return n >= V ? (some)0xffff : n <= 0 ? (some)0 : (some)((1u << n) - 1); }
INLINE vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE vec load(const float* p, some n) { return _mm512_maskz_loadu_ps(n, p); }
INLINE ints load(const int32_t* p, some n) { return _mm512_maskz_loadu_epi32(n, p); }
INLINE void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
INLINE void store(float* p, vec v, some n) { _mm512_mask_storeu_ps(p, n, v); }
INLINE vec all(float v) { return _mm512_set1_ps(v); }
INLINE vec floats(ints v) { return _mm512_cvtepi32_ps(v); }
INLINE ints zero() { return _mm512_setzero_si512(); }
INLINE vec least(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec most(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE bool odd(vec v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }
INLINE float least_of(vec v) { return _mm512_reduce_min_ps(v); }
INLINE float most_of(vec v) { return _mm512_reduce_max_ps(v); }
INLINE float sum_of(vec v) { return _mm512_reduce_add_ps(v); }
INLINE void put_bytes(level* q, ints v, long n) {
  const __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(v, zero()));
  if (n >= V)
    _mm_storeu_si128((__m128i*)q, bytes);
  else
    _mm_mask_storeu_epi8(q, first(n), bytes);
}
INLINE ints nearest(vec v) { return _mm512_cvtps_epi32(v); }
INLINE ints whole(vec v) { return _mm512_cvttps_epi32(v); }
INLINE ints same(int32_t v) { return _mm512_set1_epi32(v); }
INLINE ints times(int32_t a, ints b) { return _mm512_mullo_epi32(same(a), b); }
INLINE ints minus(ints a, ints b) { return _mm512_sub_epi32(a, b); }
INLINE vec fused(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
#define WIDE 0
constexpr int V = 8;
typedef __m256 vec;
typedef __m256i ints;
typedef __m256i some;
#if defined(__AVXVNNI__) && !defined(INT8_PLAIN)
#define ISA "AVX-VNNI"
constexpr int DOT = 4;
typedef uint8_t level;
INLINE ints dot(ints sum, ints q, ints w) { return _mm256_dpbusd_avx_epi32(sum, q, w); }
INLINE ints weights(const int8_t* p) { return _mm256_load_si256((const __m256i*)p); }
#else
#define ISA "AVX2"
constexpr int DOT = 2;
typedef int16_t level;
INLINE ints dot(ints sum, ints q, ints w) { return _mm256_add_epi32(sum, _mm256_madd_epi16(q, w)); }
INLINE ints weights(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i*)p)); }
#endif
INLINE some first(long n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(n > V ? V : n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE vec load(const float* p, some n) { return _mm256_maskload_ps(p, n); }
INLINE ints load(const int32_t* p, some n) { return _mm256_maskload_epi32(p, n); }
INLINE void store(float* p, vec v) { _mm256_storeu_ps(p, v); }
INLINE void store(float* p, vec v, some n) { _mm256_maskstore_ps(p, n, v); }
INLINE vec all(float v) { return _mm256_set1_ps(v); }
INLINE vec floats(ints v) { return _mm256_cvtepi32_ps(v); }
INLINE ints zero() { return _mm256_setzero_si256(); }
INLINE vec least(vec a, vec b) { return _mm256_min_ps(a, b); }
INLINE vec most(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE bool odd(vec v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }
INLINE float least_of(vec v) {
  float lanes[V], found;
  store(lanes, v);
  found = lanes[0];
  for (int i = 1; i < V; i++) found = lanes[i] < found ? lanes[i] : found;
  return found;
}
INLINE float most_of(vec v) { return -least_of(_mm256_sub_ps(_mm256_setzero_ps(), v)); }
INLINE float sum_of(vec v) {
  float lanes[V], found = 0;
  store(lanes, v);
  for (int i = 0; i < V; i++) found += lanes[i];
  return found;
}
INLINE void put_bytes(level* q, ints v, long n) {
  int32_t lanes[V];
  _mm256_storeu_si256((__m256i*)lanes, v);
  if (n > V) n = V;
  for (int i = 0; i < n; i++) q[i] = (level)(lanes[i] < 0 ? 0 : lanes[i] > 255 ? 255 : lanes[i]);
}
INLINE ints nearest(vec v) { return _mm256_cvtps_epi32(v); }
INLINE ints whole(vec v) { return _mm256_cvttps_epi32(v); }
INLINE ints same(int32_t v) { return _mm256_set1_epi32(v); }
INLINE ints times(int32_t a, ints b) { return _mm256_mullo_epi32(same(a), b); }
INLINE ints minus(ints a, ints b) { return _mm256_sub_epi32(a, b); }
INLINE vec fused(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
#else
#error "neither AVX-512-VNNI nor AVX2"
#endif

// The DOT levels from p on, 4 bytes, in every lane.
INLINE ints spread(const level* p) {
  int32_t bytes;
  memcpy(&bytes, p, 4);
  return same(bytes);
}

constexpr int NV = 2;
constexpr long COLS = NV * V;               // of the weight in one panel
constexpr long GROUP = COLS * DOT;          // bytes of a panel that belong to DOT values of x
constexpr int ROWS = WIDE ? 12 : 5;         // of x in one tile: ROWS × NV sums in registers

#ifdef AMX
constexpr long UNIT = 32;                // rows of x that are best multiplied together
constexpr long DEPTH = 64;               // levels in one row of a tile
#else
constexpr long UNIT = ROWS, DEPTH = DOT;
#endif
constexpr long BLOCK = UNIT * (WIDE ? 128 / UNIT : 16);  // rows of q that stay in the second-level cache

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long up(long n, long to) { return (n + to - 1) / to * to; }

// Levels of a row, with the zeros behind them: of few of them DEPTH would be mostly zeros.
INLINE long width_of(long in) { return up(in, in < DEPTH * 3 / 4 ? DOT : DEPTH); }
// Rows of q, with those that a tile reads beyond them.
INLINE long height_of(long rows) { return DEPTH > DOT ? up(rows, 16) : rows; }

}  // namespace

// The arguments, as Python fills them in (kernels/int8_cpu.py: _Call) ----------------------------

struct Call {
  const float* x;       // [rows, in], rows `stride` apart
  const int8_t* weight; // int8_pack
  const float* scale;   // [out]
  const int32_t* sums;  // [out]: Σ_k w[n,k]
  const float* bias;    // [out] or null
  const float* add;     // [rows, out] or null
  const float* norm_weight;  // [out] or null
  const float* norm_bias;    // [out] or null
  float* y;             // [rows, out]
  void* q;              // int8_scratch bytes
  Parallel parallel;
  int64_t rows, in, out, stride, then, one_range, norm, threads;
  double eps;
  const float* multiplier; // [in] or null: x[r,k]·multiplier[k] is what is quantized
  double step;          // where > 0: s of all of x, with the zero point z
  int64_t zero;
};

namespace {

enum Then { NOTHING, RELU, GELU, SILU, RELU6, HARDSWISH };

// Levels: to nearest, ties to even; or the whole part. 0 … 255.
INLINE void put_levels(level* q, vec v, long n) { put_bytes(q, nearest(v), n); }
INLINE void put_whole(level* q, vec v, long n) { put_bytes(q, whole(v), n); }

// Quantization ------------------------------------------------------------------------------------

struct Range {
  float low, high;
  bool bad;  // a value is NaN or infinite
};

Range range_of(const float* x, long n) {
  vec low = all(__builtin_inff()), high = all(-__builtin_inff()), spoiled = all(0);
  long i = 0;
  for (; i + 2 * V <= n; i += 2 * V) {
    const vec a = load(x + i), b = load(x + i + V);
    low = least(low, least(a, b)), high = most(high, most(a, b));
    spoiled = fused(a, all(0), fused(b, all(0), spoiled));  // NaN where any is NaN or infinite
  }
  Range found = {least_of(low), most_of(high), odd(spoiled)};
  for (; i < n; i++) {
    found.low = x[i] < found.low ? x[i] : found.low;
    found.high = x[i] > found.high ? x[i] : found.high;
    found.bad |= !(x[i] - x[i] == 0);
  }
  return found;
}

// One row by its own range: its levels, s and lo. A row that is not finite gives levels of no meaning,
// and s that is NaN.
void quantize_row(const float* x, long n, level* q, long width, float* s, float* lo) {
  const Range of = range_of(x, n);
  const float range = of.high - of.low, inverse = 255.0f / (range + 1e-8f);
  *lo = of.low, *s = of.bad ? __builtin_nanf("") : range / 255.0f + (float)(1e-8 / 255);
  if (range - range == 0 || of.bad) {
    const vec from = all(of.low), times = all(inverse);
    for (long i = 0; i < n; i += V)
      put_levels(q + i, (load(x + i, first(n - i)) - from) * times, n - i);
  } else {  // beyond the largest number: all of it by a quarter
    const float part = of.high * 0.25f - of.low * 0.25f;
    *s = part / 255.0f * 4;
    const vec from = all(of.low * 0.25f), times = all(255.0f / part), quarter = all(0.25f);
    for (long i = 0; i < n; i += V)
      put_levels(q + i, (load(x + i, first(n - i)) * quarter - from) * times, n - i);
  }
  for (long i = n; i < width; i++) q[i] = 0;  // they meet columns of zeros, but are to be numbers
}

// One row by a range that is known: q = ⌊x·multiplier/s + z + ½⌋. True where a value is not finite.
bool quantize_row_by(const float* x, long n, level* q, long width, float inverse, float half,
                     const float* multiplier) {
  const vec times = all(inverse), plus = all(half), most_level = all(255.5f);
  vec spoiled = all(0);
  for (long i = 0; i < n; i += V) {
    const some part = first(n - i);
    vec v = load(x + i, part);
    if (multiplier) v = v * load(multiplier + i, part);
    spoiled = fused(v, all(0), spoiled);  // NaN where any is NaN or infinite
    put_whole(q + i, least(most(fused(v, times, plus), all(0)), most_level), n - i);
  }
  for (long i = n; i < width; i++) q[i] = 0;
  return odd(spoiled);
}

// Finish ------------------------------------------------------------------------------------------

// exp(x) for x ≤ 0: 2^i by the exponent's bits, 2^f by a polynomial (Cephes' expf), to 2 ulp.
INLINE vec exponential(vec x) {
  x = most(x, all(-87.33654f));
#if WIDE
  const vec n = _mm512_roundscale_ps(x * all(1.44269504f), 8);
#else
  const vec n = _mm256_round_ps(x * all(1.44269504f), 8);
#endif
  x = fused(n, all(-0.693359375f), x);
  x = fused(n, all(2.12194440e-4f), x);
  vec p = all(1.9875691500e-4f);
  p = fused(p, x, all(1.3981999507e-3f)), p = fused(p, x, all(8.3334519073e-3f));
  p = fused(p, x, all(4.1665795894e-2f)), p = fused(p, x, all(1.6666665459e-1f));
  p = fused(p, x, all(5.0000001201e-1f)), p = fused(p, x * x, x) + all(1);
#if WIDE
  return _mm512_scalef_ps(p, n);
#else
  const __m256i shift = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return p * _mm256_castsi256_ps(shift);
#endif
}

INLINE vec absolute(vec x) {
#if WIDE
  return _mm512_abs_ps(x);
#else
  return _mm256_andnot_ps(all(-0.0f), x);
#endif
}

// 1/x of normal numbers, to 1 ulp.
INLINE vec inverse(vec x) {
#if WIDE
  const vec near = _mm512_rcp14_ps(x);  // 14 bits, and twice as many by a step of Newton's
  return fused(near, fused(all(0) - x, near, all(1)), near);
#else
  return all(1) / x;
#endif
}

// where x < 0: a, else b
INLINE vec below(vec x, vec a, vec b) {
#if WIDE
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, all(0), _CMP_LT_OQ), b, a);
#else
  return _mm256_blendv_ps(b, a, x);
#endif
}

// x·Φ(x) = ½x·(1 + erf(z)) with z = x/√2, and erf as z·P(z²)/Q(z²) for |z| < 4 (the minimax fit of
// Eigen and XLA, to 4e-7), beyond which it is ±1 in float32.
INLINE vec gelu(vec x) {
  const vec z = most(least(x * all(0.70710678f), all(4)), all(-4)), u = z * z;
  vec p = all(-2.72614225801306e-10f), q = all(-1.45660718464996e-05f);
  p = fused(p, u, all(2.77068142495902e-08f)), q = fused(q, u, all(-2.13374055278905e-04f));
  p = fused(p, u, all(-2.10102402082508e-06f)), q = fused(q, u, all(-1.68282697438203e-03f));
  p = fused(p, u, all(-5.69250639462346e-05f)), q = fused(q, u, all(-7.37332916720468e-03f));
  p = fused(p, u, all(-7.34990630326855e-04f)), q = fused(q, u, all(-1.42647390514189e-02f));
  p = fused(p, u, all(-2.95459980854025e-03f)), p = fused(p, u, all(-1.60960333262415e-02f));
  const vec half = x * all(0.5f);
  return fused(half, z * p * inverse(q), half);
}

INLINE vec silu(vec x) {
  const vec e = exponential(all(0) - absolute(x)), p = all(1) / (all(1) + e);
  return x * below(x, e * p, p);
}

INLINE vec finished(int then, vec y) {
  if (then == RELU) return most(all(0), y);  // in this order NaN stays
  if (then == GELU) return gelu(y);
  if (then == SILU) return silu(y);
  if (then == RELU6) return least(all(6), most(all(0), y));
  if (then == HARDSWISH) return y * least(all(6), most(all(0), y + all(3))) * all(1.0f / 6);
  return y;
}

// Products ----------------------------------------------------------------------------------------

struct Row {
  float s, lo;
  int32_t zero;
};

// V columns of y from n on: what their sums become. All that it reads is in registers, as what it
// writes might be anything.
struct Columns {
  ints zeros;
  vec scale, offset, bias;
  some part;
  bool whole, one_range;
  float* y;
  const float* add;
  long out;

  // The first row is r, and quantized by `row`.
  INLINE Columns(const Call& c, const Row& row, long r, long n)
      : part(first(c.out - n)), whole(n + V <= c.out), one_range(c.one_range), y(c.y + r * c.out + n),
        add(c.add ? c.add + r * c.out + n : nullptr), out(c.out) {
    const ints sums = load(c.sums + n, part);
    zeros = times(one_range ? row.zero : 0, sums);
    scale = load(c.scale + n, part), offset = floats(sums) * scale;
    bias = c.bias ? load(c.bias + n, part) : all(0);
  }

  // Row m after the first one.
  INLINE void finish(ints sum, const Row& row, long m, int then) const {
    vec v = fused(floats(minus(sum, zeros)) * scale, all(row.s), bias);
    if (!one_range) v = fused(all(row.lo), offset, v);
    v = finished(then, v);
    asm("" : "+v"(v));  // what is added is not fused with it, whichever function this becomes a part of
    if (whole) {
      if (add) v = v + load(add + m * out);
      store(y + m * out, v);
    } else {
      if (add) v = v + load(add + m * out, part);
      store(y + m * out, v, part);
    }
  }
};

// M rows × P panels of the weight, all of k.
template <int M, int P>
__attribute__((noinline)) void tile(const Call& c, const level* q, long width, const Row* row,
                                    long r, long panel, int then) {
  const long groups = (c.in + DOT - 1) / DOT, size = width * COLS;
  const int8_t* w = c.weight + panel * size;
  ints sum[M][P * NV];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int j = 0; j < P * NV; j++) sum[m][j] = zero();
  for (long g = 0; g < groups; g++, w += GROUP) {
    ints column[P * NV];
#pragma GCC unroll 8
    for (int j = 0; j < P * NV; j++) column[j] = weights(w + j / NV * size + j % NV * (V * DOT));
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const ints x = spread(q + m * width + g * DOT);
#pragma GCC unroll 8
      for (int j = 0; j < P * NV; j++) sum[m][j] = dot(sum[m][j], x, column[j]);
    }
  }
  const long n0 = panel * COLS;
#pragma GCC unroll 8
  for (int j = 0; j < P * NV; j++) {
    const long n = n0 + j * V;
    if (n >= c.out) break;
    const Columns columns(c, row[0], r, n);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) columns.finish(sum[m][j], row[m], m, then);
  }
}

template <int M>
void rows_of(const Call& c, const level* q, long width, const Row* row, long r, long panel, long end) {
#if WIDE
  constexpr int P = M <= 3 ? 3 : M <= 6 ? 2 : 1;  // M·P·NV ≤ 24 sums
  for (; panel + P <= end; panel += P) tile<M, P>(c, q, width, row, r, panel, (int)c.then);
#endif
  for (; panel < end; panel++) tile<M, 1>(c, q, width, row, r, panel, (int)c.then);
}

template <int M>
void few_rows(long m, const Call& c, const level* q, long width, const Row* row, long r, long panel,
              long end) {
  if (m == M) return rows_of<M>(c, q, width, row, r, panel, end);
  if constexpr (M > 1) few_rows<M - 1>(m, c, q, width, row, r, panel, end);
}

}  // namespace

#ifdef AMX
#include "int8_amx.h"
#endif

namespace {

// Rows [r, r + count) of y in the columns of these panels.
void block(const Call& c, const level* q, long width, const Row* row, long r, long count, long panel,
           long end) {
#ifdef AMX
  if (amx::takes(c, width, count)) return amx::block(c, q, width, row, r, count, panel, end);
#endif
  const long step = 8;  // panels whose weights stay in the second-level cache while rows pass
  for (long p = panel; p < end; p += step)
    for (long m = 0; m < count; m += ROWS)
      few_rows<ROWS>(least(ROWS, count - m), c, q + m * width, width, row + m, r + m, p,
                     least(p + step, end));
}

// LayerNorm of rows of y that are whole, in place.
void norm_rows(const Call& c, long from, long to) {
  const long n = c.out;
  for (long r = from; r < to; r++) {
    float* y = c.y + r * n;
    vec a = all(0), b = all(0);
    long i = 0;
    for (; i + 2 * V <= n; i += 2 * V) a = a + load(y + i), b = b + load(y + i + V);
    for (; i < n; i += V) a = a + load(y + i, first(n - i));
    const float mean = sum_of(a + b) / n;
    const vec off = all(mean);
    a = b = all(0);
    for (i = 0; i + 2 * V <= n; i += 2 * V) {
      const vec d = load(y + i) - off, e = load(y + i + V) - off;
      a = fused(d, d, a), b = fused(e, e, b);
    }
    for (; i + V <= n; i += V) {
      const vec d = load(y + i) - off;
      a = fused(d, d, a);
    }
    float squares = sum_of(a + b);
    for (; i < n; i++) squares += (y[i] - mean) * (y[i] - mean);
    // a variance beyond float32 has no root: NaN, not a row of zeros
    const bool finite = squares - squares == 0;
    const vec times =
        all(finite ? (float)(1 / __builtin_sqrt(squares / n + c.eps)) : __builtin_nanf(""));
    for (i = 0; i < n; i += V) {
      const some part = first(n - i);
      vec v = (load(y + i, part) - off) * times;
      if (c.norm_weight) v = v * load(c.norm_weight + i, part);
      if (c.norm_bias) v = v + load(c.norm_bias + i, part);
      store(y + i, v, part);
    }
  }
}

// s and the zero point of all of x, in float64 as Python has them, and what quantizes by them.
Row range_by(double s, double zero, float* inverse, float* half) {
  *inverse = (float)(1 / s), *half = (float)(zero + 0.5);
  return {(float)s, 0, (int32_t)zero};
}

// The same, found in x; NaN and 0 where that is not finite.
Row range_of_all(const Call& c, float* inverse, float* half) {
  const long size = 64, tasks = (c.rows + size - 1) / size;
  Range* found = (Range*)malloc(tasks * sizeof(Range));
  if (!found) std::abort();
  for_each(c.parallel, c.threads, tasks, [&](long task) {
    Range own = range_of(c.x + task * size * c.stride, c.in);
    for (long r = task * size + 1; r < least(task * size + size, c.rows); r++) {
      const Range of = range_of(c.x + r * c.stride, c.in);
      own.low = of.low < own.low ? of.low : own.low;
      own.high = of.high > own.high ? of.high : own.high;
      own.bad |= of.bad;
    }
    found[task] = own;
  });
  double low = 0, high = 0;
  bool bad = false;
  for (long i = 0; i < tasks; i++) {
    low = found[i].low < low ? found[i].low : low;
    high = found[i].high > high ? found[i].high : high;
    bad |= found[i].bad;
  }
  free(found);
  if (bad) return {__builtin_nanf(""), 0, 0};
  const double s = (high - low + 1e-8) / 255;
  return range_by(s, __builtin_nearbyint(-low / s), inverse, half);
}

// A product's rows, quantized: their levels, and what each was quantized by.
struct Rows {
  Row* row;
  level* q;
  float inverse = 0, half = 0;

  Rows(const Call& c, void* scratch, long count) {
    row = (Row*)scratch;
    q = (level*)((char*)scratch + up(count * sizeof(Row), 64));
    if (!c.one_range) return;
    const Row one = c.step > 0 ? range_by(c.step, (double)c.zero, &inverse, &half)
                               : range_of_all(c, &inverse, &half);
    for (long r = 0; r < count; r++) row[r] = one;
  }

  // Rows [r, r + count) of x as the rows from `to` on; whether one has no finite range of its own.
  bool quantize(const Call& c, const float* x, long r, long count, long to) {
    const long width = width_of(c.in);
    bool bad = false;
    for (const long end = r + count; r < end; r++, to++) {
      const float* from = x + r * c.stride;
      if (c.one_range) {
        if (quantize_row_by(from, c.in, q + to * width, width, inverse, half, c.multiplier))
          row[to].s = __builtin_nanf("");
        continue;
      }
      quantize_row(from, c.in, q + to * width, width, &row[to].s, &row[to].lo);
      bad |= !(row[to].s - row[to].s == 0);
    }
    return bad;
  }
};

// Whether a thread has rows of its own, or else columns.
bool by_rows(const Call& c) {
  const long panels = (c.out + COLS - 1) / COLS;
  return c.rows >= 4 * ROWS * c.threads || panels < 2 * c.threads;
}

// Memory of a thread, kept from call to call.
struct Buffer {
  void* held[2] = {};
  long size[2] = {};
  void* of(int which, long bytes) {
    if (size[which] < bytes) {
      free(held[which]);
      size[which] = up(bytes, 64);
      held[which] = aligned_alloc(64, size[which]);
      if (!held[which]) std::abort();
    }
    return held[which];
  }
  ~Buffer() { free(held[0]), free(held[1]); }
};

Buffer& buffer() {
  static thread_local Buffer own;
  return own;
}

}  // namespace

extern "C" {

const char* int8_isa() {
#ifdef AMX
  if (amx::on()) return "AMX-int8";
#endif
  return ISA;
}

// Multiplies by AMX from now on, where that can be, or no more; whether it does.
int64_t int8_use_amx(int64_t wanted) {
#ifdef AMX
  return amx::use(wanted != 0);
#else
  return wanted & 0;
#endif
}

// What a packed layer of one tensor depends on beside its own sizes.
int64_t int8_layout() { return (2LL << 48) | ((int64_t)sizeof(Call) << 32) | (COLS << 24) | (DEPTH << 16) | (DOT << 8) | V; }

int64_t int8_packed_size(int64_t out, int64_t in) { return up(out, COLS) * width_of(in); }

// w [out, in] → panels; what is beyond `out` and `in` is zero.
void int8_pack(const int8_t* w, int64_t out, int64_t in, int8_t* to) {
  const long width = width_of(in);
  for (long n0 = 0; n0 < out; n0 += COLS)
    for (long k = 0; k < width; k += DOT)
      for (long n = n0; n < n0 + COLS; n++)
        for (long i = k; i < k + DOT; i++) *to++ = n < out && i < in ? w[n * in + i] : 0;
}

int64_t int8_scratch(int64_t rows, int64_t in) {
  return height_of(rows) * width_of(in) * (int64_t)sizeof(level) + rows * (int64_t)sizeof(Row) + 64;
}

// 1 where a row of x has no finite range: its y is NaN then.
int64_t int8_linear(const Call* call) {
  const Call& c = *call;
  const long width = width_of(c.in), panels = (c.out + COLS - 1) / COLS;
  Rows rows(c, c.q, c.rows);
  std::atomic<long> spoiled{0};
  if (by_rows(c)) {  // a thread has its own rows
    const long size = least(BLOCK, up((c.rows + c.threads - 1) / c.threads, UNIT));
    for_each(c.parallel, c.threads, (c.rows + size - 1) / size, [&](long task) {
      const long r = task * size, count = least(size, c.rows - r);
      if (rows.quantize(c, c.x, r, count, r)) spoiled.store(1, std::memory_order_relaxed);
      block(c, rows.q + r * width, width, rows.row + r, r, count, 0, panels);
      if (c.norm) norm_rows(c, r, r + count);
    });
  } else {  // few rows: a thread has its own columns
    spoiled.store(rows.quantize(c, c.x, 0, c.rows, 0));
    const long size = (panels + 4 * c.threads - 1) / (4 * c.threads);
    for_each(c.parallel, c.threads, (panels + size - 1) / size, [&](long task) {
      block(c, rows.q, width, rows.row, 0, c.rows, task * size, least((task + 1) * size, panels));
    });
    if (c.norm) norm_rows(c, 0, c.rows);
  }
  return spoiled.load();
}

// The same of other rows, which are dense, by the thread that calls.
int64_t int8_rows(const Call* call, const float* x, float* y, const float* add, int64_t rows) {
  Call c = *call;
  c.x = x, c.y = y, c.add = add, c.rows = rows, c.stride = c.in, c.threads = 1;
  c.q = buffer().of(1, int8_scratch(rows, c.in));
  return int8_linear(&c);
}

// Two products, one after the other: the second one's x is the first one's y, which no one else
// reads: of many rows a few at a time, in the cache.
int64_t int8_two(const Call* one, const Call* two) {
  Call a = *one, b = *two;
  Buffer once;  // of much memory, which no thread keeps
  Buffer& own = a.rows * a.out < (1 << 22) ? buffer() : once;
  const bool all_of_x = (a.one_range && !(a.step > 0)) || (b.one_range && !(b.step > 0));
  if (!by_rows(a) || all_of_x) {
    a.y = (float*)own.of(0, a.rows * a.out * sizeof(float));
    a.q = own.of(1, int8_scratch(a.rows, a.in)), b.x = a.y, b.stride = a.out;
    const int64_t spoiled = int8_linear(&a);
    b.q = own.of(1, int8_scratch(b.rows, b.in));
    return spoiled | int8_linear(&b);
  }
  const long size = least(up(4 * ROWS, UNIT), up((a.rows + a.threads - 1) / a.threads, UNIT));
  std::atomic<long> spoiled{0};
  for_each(a.parallel, a.threads, (a.rows + size - 1) / size, [&](long task) {
    const long r = task * size, count = least(size, a.rows - r);
    Buffer& mine = buffer();
    Call c = a, d = b;
    c.y = (float*)mine.of(0, size * c.out * sizeof(float)) - r * c.out;
    d.x = c.y, d.stride = c.out;
    bool bad = false;
    for (const Call* of : {&c, &d}) {
      const long width = width_of(of->in), panels = (of->out + COLS - 1) / COLS;
      Rows rows(*of, mine.of(1, int8_scratch(size, of->in)), size);
      bad |= rows.quantize(*of, of->x, r, count, 0);
      block(*of, rows.q, width, rows.row, r, count, 0, panels);
      if (of->norm) norm_rows(*of, r, r + count);
    }
    if (bad) spoiled.store(1, std::memory_order_relaxed);
  });
  return spoiled.load();
}
// A product whose y only `next` reads, `unit` rows at a time: what makes them hands them on, in its
// cache. No range of all of x.
int64_t int8_units(const Call* call, int64_t unit, void (*next)(const void*, int64_t, const float*),
                   const void* to) {
  const Call& c = *call;
  const long width = width_of(c.in), panels = (c.out + COLS - 1) / COLS;
  std::atomic<long> spoiled{0};
  for_each(c.parallel, c.threads, c.rows / unit, [&](long task) {
    const long r = task * unit;
    Buffer& mine = buffer();
    Call d = c;
    float* y = (float*)mine.of(0, unit * c.out * sizeof(float));
    d.y = y - r * c.out;
    Rows rows(d, mine.of(1, int8_scratch(unit, c.in)), unit);
    if (rows.quantize(d, c.x, r, unit, 0)) spoiled.store(1, std::memory_order_relaxed);
    block(d, rows.q, width, rows.row, r, unit, 0, panels);
    next(to, task, y);
  });
  return spoiled.load();
}
}

#include "int8_monarch.h"
#ifdef SHIM  // as ops of compiled programs
#include "int8_shim.h"
#endif
