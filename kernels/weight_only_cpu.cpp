// Linear layers on a CPU whose weights are integers of 8 or 4 bits: unpacked in registers.
//
//   8 bits    y[r,n] = scale[n]·Σ_k x[r,k] q[n,k] + bias[n]
//   4 bits    y[r,n] = Σ_k x[r,k] w[n,k] + bias[n]      w[n,k] = (u[n,k] − 8)·scale[n,g] + zero[n,g]
//   dynamic   the same with x[r,k] ≈ s[r,g]·a[r,k]      s[r,g] = max|x[r,k]|/127 over the group g
//
// The weight lies as it is stored, row by row, and is read once for all rows of x up to 16: a row of
// 4-bit weights is blocks of 32, of which byte i holds u[i] and 16·u[i + 16]. On one or two rows of
// x, y[r,n] = Σ_g scale[n,g]·Σ_k x[r,k] (u[n,k] − 8) + zero[n,g]·Σ_k x[r,k] takes fewer operations. Of dynamic ones the
// products within a group are integers, summed by vpdpbusd where there is one; they need no zero
// point, as Σ(u − 8)a = Σ u·a − 8·Σa.
//
// C++17 with Intel's intrinsics; threads as threads.h has them. Every output is summed by one thread
// in an order that depends on nothing but the sizes: results do not depend on the number of threads.

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "threads.h"

namespace {

#define INLINE inline __attribute__((always_inline))

constexpr long BLOCK = 32;  // weights that are unpacked together

// Instruction sets --------------------------------------------------------------------------------

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(WEIGHT_NARROW)
#define WIDE 1
constexpr int V = 16, SUMS = 16;
typedef __m512 vec;
INLINE vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE vec all(float v) { return _mm512_set1_ps(v); }
INLINE vec fused(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE __m256 half_of(vec v) {
  const __m256d high = _mm512_extractf64x4_pd(_mm512_castps_pd(v), 1);
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(high));
}
#elif defined(__AVX2__) && defined(__FMA__)
#define WIDE 0
constexpr int V = 8, SUMS = 8;
typedef __m256 vec;
INLINE vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE vec all(float v) { return _mm256_set1_ps(v); }
INLINE vec fused(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE __m256 half_of(vec v) { return v; }
#else
#error "neither AVX-512 nor AVX2"
#endif

INLINE float sum_of_8(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// The sum of each of R vectors, added in the same order for every R.
template <int R>
INLINE void sums_of(const vec* v, float* to) {
  if constexpr (R == 4) {
    const __m256 a = _mm256_hadd_ps(half_of(v[0]), half_of(v[1])), b = _mm256_hadd_ps(half_of(v[2]), half_of(v[3]));
    const __m256 both = _mm256_hadd_ps(a, b);
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
  } else {
    for (int i = 0; i < R; i++) {
      const __m256 a = half_of(v[i]), pairs = _mm256_hadd_ps(a, a), fours = _mm256_hadd_ps(pairs, pairs);
      to[i] = _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
    }
  }
}

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && !defined(WEIGHT_NARROW)
#define DOTS " and AVX-512-VNNI"
INLINE __m256i dot(__m256i sum, __m256i u, __m256i a) { return _mm256_dpbusd_epi32(sum, u, a); }
#elif defined(__AVXVNNI__) && !defined(WEIGHT_PLAIN)
#define DOTS " and AVX-VNNI"
INLINE __m256i dot(__m256i sum, __m256i u, __m256i a) { return _mm256_dpbusd_avx_epi32(sum, u, a); }
#else
#define DOTS ""
// u ≤ 15: the sums of pairs fit into 16 bits
INLINE __m256i dot(__m256i sum, __m256i u, __m256i a) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, a), _mm256_set1_epi16(1)));
}
#endif

constexpr int PARTS = BLOCK / V;  // vectors of one block

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long up(long n, long to) { return (n + to - 1) / to * to; }

}  // namespace

// The arguments, as Python fills them in (kernels/weight_only_cpu.py: _Call) ---------------------

struct Call {
  const float* x;         // [rows, in]
  const uint8_t* weight;  // 8 bits: [out, in]; 4 bits: [out, groups·group/2]
  const void* scale;      // 8 bits: float [out]; 4 bits: bfloat16 or float [out, groups]
  const void* zero;       // as scale, or null
  const float* bias;      // [out] or null
  float* y;               // [rows, out], rows `apart` numbers apart; of weight_dense: [out, in]
  Parallel parallel;
  int64_t rows, in, out, apart, group, floats, dynamic, threads;  // group 0: 8 bits
};

namespace {

INLINE float number(const void* from, long i, bool floats) {
  if (floats) return ((const float*)from)[i];
  const uint32_t bits = (uint32_t)((const uint16_t*)from)[i] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Unpacking ---------------------------------------------------------------------------------------

// What the levels of one group stand for.
struct Levels {
#if WIDE
  vec of;  // all sixteen
#else
  vec scale, zero;
#endif
};

#if WIDE
INLINE vec plain_levels() {
  return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
}
#endif

INLINE Levels levels_of(const Call& c, long n, long g) {
  const long i = n * ((c.in + c.group - 1) / c.group) + g;
  const float scale = number(c.scale, i, c.floats);
  const float zero = c.zero ? number(c.zero, i, c.floats) : 0;
#if WIDE
  return {fused(plain_levels(), all(scale), all(zero))};
#else
  return {all(scale), all(zero)};
#endif
}

INLINE void levels4(const uint8_t* p, [[maybe_unused]] const Levels* levels, vec* w) {
#if WIDE
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  w[0] = _mm512_permutexvar_ps(bytes, levels->of);  // it reads four bits of each index
  w[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), levels->of);
#else
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p), four = _mm_set1_epi8(15);
  const __m128i half[2] = {_mm_and_si128(bytes, four), _mm_and_si128(_mm_srli_epi16(bytes, 4), four)};
  for (int i = 0; i < 2; i++) {
    const __m128i q = _mm_sub_epi8(half[i], _mm_set1_epi8(8));
    w[2 * i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q));
    w[2 * i + 1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(q, 8)));
  }
#endif
}

INLINE void unpack4(const uint8_t* p, const Levels& levels, vec* w) {
  levels4(p, &levels, w);
#if !WIDE
  for (int i = 0; i < PARTS; i++) w[i] = fused(w[i], levels.scale, levels.zero);
#endif
}

INLINE void unpack8(const uint8_t* p, vec* w) {
  for (int i = 0; i < PARTS; i++) {
#if WIDE
    w[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + i * V))));
#else
    w[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + i * V))));
#endif
  }
}

// Products with floats ----------------------------------------------------------------------------

// Weights are asked for before they are read, as they come late of memory: line by line, some bytes before, and behind
// the rows that are read at the same time.
struct Asked {
  const char* next;
  Asked(const uint8_t* from, long together) : next((const char*)from + (together > 4096 ? together : 4096)) {}
  INLINE void lines(int count) {
    for (int i = 0; i < count; i++, next += 64) _mm_prefetch(next, _MM_HINT_T0);
  }
};

// Numbers of R rows of scales or zeros, so many from the g-th group on, as floats in `room`: a row every `apart` of them, with
// nothing behind it.
template <int R>
INLINE void floats_of(const Call& c, const void* from, long n, long g, long count, long groups, long apart, float* room) {
  for (int i = 0; i < R; i++, room += apart) {
    const long first = (n + i) * groups + g;
    if (c.floats)
      memcpy(room, (const float*)from + first, count * sizeof(float));
    else
      for (long j = 0; j < count; j++) {
        const uint32_t bits = (uint32_t)((const uint16_t*)from)[first + j] << 16;
        memcpy(room + j, &bits, 4);
      }
    memset(room + count, 0, (apart - count) * sizeof(float));
  }
}

// y of a row and R columns from n on: the vectors' sums, times the columns' scales where there are some.
template <int R>
INLINE void put(const Call& c, const vec* sum, long r, long n, const float* scale) {
  float of[R];
  sums_of<R>(sum, of);
  for (int i = 0; i < R; i++) {
    const float bias = c.bias ? c.bias[n + i] : 0;
    c.y[r * c.apart + n + i] = of[i] * (scale ? scale[n + i] : 1) + bias;
  }
}

// M rows of x, `width` apart and long, zero beyond `in` × R rows of the weight from n on.
template <int BITS, int M, int R>
__attribute__((noinline)) void product(const Call& c, const float* x, long width, long r, long n) {
  const long bytes = BITS == 8 ? c.in : width / 2;
  const uint8_t* row = c.weight + n * bytes;
  vec sum[M][R];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) sum[m][i] = all(0);

  auto add = [&](const uint8_t* p, long apart, long k, const Levels* levels) __attribute__((always_inline)) {
    vec w[R][PARTS];
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
      if constexpr (BITS == 8)
        unpack8(p + i * apart, w[i]);
      else
        unpack4(p + i * apart, levels[i], w[i]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < PARTS; j++)
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const vec v = load(x + m * width + k + j * V);
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) sum[m][i] = fused(w[i][j], v, sum[m][i]);
      }
  };

  if constexpr (BITS == 8) {
    const long whole = c.in / BLOCK * BLOCK, rest = c.in - whole;
    Asked asked(row, R * bytes);
    for (long k = 0; k < whole; k += BLOCK) {
      asked.lines(R * BLOCK / 64);
      add(row + k, bytes, k, nullptr);
    }
    if (rest) {
      uint8_t tail[R][BLOCK] = {};
      for (int i = 0; i < R; i++) memcpy(tail[i], row + i * bytes + whole, rest);
      add(tail[0], BLOCK, whole, nullptr);
    }
  } else {
    Asked asked(row, R * bytes);
    for (long k = 0, g = 0; k < width; k += c.group, g++) {
      Levels levels[R];
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) levels[i] = levels_of(c, n + i, g);
      for (long j = k; j < k + c.group; j += BLOCK) {
        asked.lines(R * BLOCK / 128);
        add(row + j / 2, bytes, j, levels);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) put<R>(c, sum[m], r + m, n, BITS == 8 ? (const float*)c.scale : nullptr);
}

constexpr int FEW = 2;          // rows of x, for which scales come behind the sums
constexpr long SCALES = 4096;  // and so many numbers of four rows of weights, for which there is room

// M rows of x × R rows of 4-bit weights from n on, with scales and zeros behind the sums of groups, in place of one table
// of levels for each: for few rows of x, of which no group is so large that a sum of levels is not finite. `inputs` has the
// sum of x over each group, `apart` of them a row, with zeros behind.
template <int M, int R, bool ZERO>
__attribute__((noinline)) void by_groups(const Call& c, const float* x, const float* inputs, long groups, long apart, long r,
                                         long n, float* room) {
  const long width = groups * c.group, bytes = width / 2;
  const uint8_t* row = c.weight + n * bytes;
  const float *scale = room, *zero = room + R * apart;
  floats_of<R>(c, c.scale, n, 0, groups, groups, apart, room);
  if (ZERO) floats_of<R>(c, c.zero, n, 0, groups, groups, apart, room + R * apart);
  Levels levels{};
#if WIDE
  levels.of = plain_levels();
#endif
  vec sum[M][R];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) sum[m][i] = all(0);
  Asked asked(row, R * bytes);
  for (long k = 0, g = 0; g < groups; g++) {
    vec part[M][R];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) part[m][i] = all(0);
    for (const long end = k + c.group; k < end; k += BLOCK) {
      asked.lines(R * BLOCK / 128);
      vec w[R][PARTS];
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) levels4(row + i * bytes + k / 2, &levels, w[i]);
#pragma GCC unroll 4
      for (int j = 0; j < PARTS; j++)
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
          const vec v = load(x + m * width + k + j * V);
#pragma GCC unroll 4
          for (int i = 0; i < R; i++) part[m][i] = fused(w[i][j], v, part[m][i]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sum[m][i] = fused(part[m][i], all(scale[i * apart + g]), sum[m][i]);
  }
  for (long g = 0; ZERO && g < apart; g += V)
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) sum[m][i] = fused(load(zero + i * apart + g), load(inputs + m * apart + g), sum[m][i]);
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) put<R>(c, sum[m], r + m, n, nullptr);
}

// Σ x over each group of one row.
void sums_of_groups(const float* x, long group, long groups, long apart, float* to) {
  for (long g = 0; g < apart; g++) {
    vec sum = all(0);
    for (long k = 0; g < groups && k < group; k += V) sum = sum + load(x + g * group + k);
    to[g] = sum_of_8(half_of(sum));
  }
}

constexpr int ROWS = WIDE ? 8 : 4;  // of x that are multiplied at once, at most

// All rows of the weight from n to end, with M rows of x.
template <int BITS, int M>
void columns(const Call& c, const float* x, long width, long r, long n, long end) {
  constexpr int R = 4 * M <= SUMS ? 4 : 2 * M <= SUMS ? 2 : 1;
  for (; n + R <= end; n += R) product<BITS, M, R>(c, x, width, r, n);
  for (; n < end; n++) product<BITS, M, 1>(c, x, width, r, n);
}

// All rows of 4-bit weights from n to end, with M rows of x.
template <int M, bool ZERO>
void few(const Call& c, const float* x, const float* inputs, long groups, long n, long end) {
  alignas(64) float room[2 * SCALES];
  const long apart = up(groups, V);
  for (; n + 4 <= end; n += 4) by_groups<M, 4, ZERO>(c, x, inputs, groups, apart, 0, n, room);
  for (; n < end; n++) by_groups<M, 1, ZERO>(c, x, inputs, groups, apart, 0, n, room);
}

// Whether the sums of groups are finite wherever the result is: no number is large, or none.
INLINE bool moderate(const float* x, long count) {
  uint32_t most = 0;
  for (long i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return most < 0x71000000;  // 2⁹⁹
}

// All rows of x, a power of two of them at a time.
template <int BITS, int M = ROWS>
void rows_of(const Call& c, const float* x, long width, long r, long n, long end) {
  for (; r + M <= c.rows; r += M) columns<BITS, M>(c, x + r * width, width, r, n, end);
  if constexpr (M > 1) rows_of<BITS, M / 2>(c, x, width, r, n, end);
}

// Products with activations of 8 bits -------------------------------------------------------------

// The groups of rows of x, `apart` of them a row, with zeros behind.
struct Quantized {
  float *s, *sum;   // sum = s·Σa
  int32_t* eighth;  // −Σa: what each of the eight partial sums of (u − 8)·a starts from
  long apart;

  Quantized row(long r) const { return {s + r * apart, sum + r * apart, eighth + r * apart, apart}; }
};

INLINE float most_of_8(__m256 v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// Levels and scales of one row; what is beyond `in` is zero. A group that is not finite is NaN.
void quantize_row(const float* x, long in, long group, long groups, int8_t* a, const Quantized& of) {
  const long whole = in / BLOCK * BLOCK;
  float last[BLOCK] = {}, none[BLOCK] = {};
  memcpy(last, x + whole, (in - whole) * sizeof(float));
  auto block = [&](long k) { return k < whole ? x + k : k == whole ? last : none; };
  const __m256 sign = _mm256_set1_ps(-0.0f), nothing = _mm256_setzero_ps();
  for (long g = 0; g < groups; g++) {
    __m256 largest = nothing, spoiled = nothing;  // NaN where a value is NaN or infinite
    for (long k = g * group; k < (g + 1) * group; k += BLOCK)
      for (int i = 0; i < BLOCK; i += 8) {
        const __m256 v = _mm256_loadu_ps(block(k) + i);
        largest = _mm256_max_ps(_mm256_andnot_ps(sign, v), largest);
        spoiled = _mm256_fmadd_ps(v, nothing, spoiled);
      }
    const float most = most_of_8(largest);
    const bool odd = _mm256_movemask_ps(_mm256_cmp_ps(spoiled, spoiled, _CMP_UNORD_Q));
    const bool some = most >= 1e-30f;
    const __m256 inverse = _mm256_set1_ps(some && !odd ? 127 / most : 0);
    __m256i sums = _mm256_setzero_si256();
    for (long k = g * group; k < (g + 1) * group; k += BLOCK) {
      __m256i q[4];
      for (int i = 0; i < 4; i++) {
        const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(block(k) + 8 * i), inverse);
        q[i] = _mm256_cvtps_epi32(v);
        sums = _mm256_add_epi32(sums, q[i]);
      }
      const __m256i low = _mm256_packs_epi32(q[0], q[1]), high = _mm256_packs_epi32(q[2], q[3]);
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
      _mm256_storeu_si256((__m256i*)(a + k), bytes);
    }
    int32_t lanes[8], sum = 0;
    _mm256_storeu_si256((__m256i*)lanes, sums);
    for (int i = 0; i < 8; i++) sum += lanes[i];
    const float s = odd ? __builtin_nanf("") : some ? most / 127 : 0;
    of.s[g] = s, of.sum[g] = s * sum, of.eighth[g] = -sum;
  }
  for (long g = groups; g < of.apart; g++) of.s[g] = of.sum[g] = 0, of.eighth[g] = 0;
}

constexpr long TOGETHER = 256;  // groups whose scales are made floats at once

// M rows of levels × R rows of the weight from n on.
template <int M, int R>
__attribute__((noinline)) void integers(const Call& c, const int8_t* a, const Quantized& of, long r, long n) {
  const long groups = (c.in + c.group - 1) / c.group, width = groups * c.group, bytes = width / 2;
  const uint8_t* row = c.weight + n * bytes;
  alignas(64) float scale[R * TOGETHER], zero[R * TOGETHER];
  __m256 sum[M][R];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) sum[m][i] = _mm256_setzero_ps();
  Asked asked(row, R * bytes);
  for (long first = 0; first < groups; first += TOGETHER) {
    const long count = least(TOGETHER, groups - first), apart = up(count, 8);
    floats_of<R>(c, c.scale, n, first, count, groups, apart, scale);
    for (long j = 0; j < count; j++) {
      const long g = first + j;
      __m256i exact[M][R];
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) exact[m][i] = _mm256_set1_epi32(of.eighth[m * of.apart + g]);
      for (long k = g * c.group; k < (g + 1) * c.group; k += BLOCK) {
        asked.lines(R * BLOCK / 128);
        __m256i u[R];
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
          const __m128i v = _mm_loadu_si128((const __m128i*)(row + i * bytes + k / 2));
          const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(v), _mm_srli_epi16(v, 4), 1);
          u[i] = _mm256_and_si256(both, _mm256_set1_epi8(15));
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
          const __m256i v = _mm256_loadu_si256((const __m256i*)(a + m * width + k));
#pragma GCC unroll 4
          for (int i = 0; i < R; i++) exact[m][i] = dot(exact[m][i], u[i], v);
        }
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const __m256 own = _mm256_set1_ps(of.s[m * of.apart + g]);
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
          const __m256 times = _mm256_mul_ps(_mm256_set1_ps(scale[i * apart + j]), own);
          sum[m][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact[m][i]), times, sum[m][i]);
        }
      }
    }
    if (!c.zero) continue;
    floats_of<R>(c, c.zero, n, first, count, groups, apart, zero);
    for (long j = 0; j < count; j += 8)
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const __m256 own = _mm256_loadu_ps(of.sum + m * of.apart + first + j);
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) sum[m][i] = _mm256_fmadd_ps(_mm256_loadu_ps(zero + i * apart + j), own, sum[m][i]);
      }
  }
#pragma GCC unroll 4
  for (int i = 0; i < R; i++)
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) c.y[(r + m) * c.apart + n + i] = sum_of_8(sum[m][i]) + (c.bias ? c.bias[n + i] : 0);
}

// All rows of x, a power of two of them at a time.
template <int M = 4>
void levels_of_rows(const Call& c, const int8_t* a, long width, const Quantized& of, long r, long n, long end) {
  constexpr int R = M == 1 ? 4 : M == 2 || WIDE ? 2 : 1;
  for (; r + M <= c.rows; r += M) {
    long i = n;
    for (; i + R <= end; i += R) integers<M, R>(c, a + r * width, of.row(r), r, i);
    for (; i < end; i++) integers<M, 1>(c, a + r * width, of.row(r), r, i);
  }
  if constexpr (M > 1) levels_of_rows<M / 2>(c, a, width, of, r, n, end);
}

// Work --------------------------------------------------------------------------------------------

constexpr long STRIP = 32 << 10;  // bytes of weights for which another thread pays

// Rows of the weights in one piece of work, of so many rows in all.
long strip(const Call& c, long out, long bytes) {
  long size = (STRIP + bytes - 1) / bytes;
  const long even = (out + 4 * c.threads - 1) / (4 * c.threads);  // four pieces for each thread
  if (size < even) size = least(even, 4 * size);
  const long pieces = (out + size - 1) / size;
  if (pieces > 1) size = (out + up(pieces, c.threads) - 1) / up(pieces, c.threads);  // as many for each thread
  return up(size, 4);
}

// work(call, first row of its weight, the row behind the last), over all rows of the weights of all calls.
template <class Work>
void over_strips(const Call* calls, long count, long bytes, const Work& work) {
  long out = 0, tasks = 0;
  for (long i = 0; i < count; i++) out += calls[i].out;
  const long size = strip(calls[0], out, bytes);
  for (long i = 0; i < count; i++) tasks += (calls[i].out + size - 1) / size;
  for_each(calls[0].parallel, calls[0].threads, tasks, [&](long task) {
    const Call* c = calls;
    for (long own; task >= (own = (c->out + size - 1) / size); task -= own) c++;
    work(*c, task * size, least((task + 1) * size, c->out));
  });
}

void* room(long bytes) {
  void* found = malloc(bytes);
  if (!found) std::abort();
  return found;
}

}  // namespace

extern "C" {

const char* weight_isa() { return (WIDE ? "AVX-512" DOTS : "AVX2" DOTS); }

// Products of one x, with weights in one form.
void weight_linears(const Call* calls, int64_t count) {
  const Call& c = *calls;
  const long groups = c.group ? (c.in + c.group - 1) / c.group : 0;
  const long width = c.group ? groups * c.group : up(c.in, BLOCK);
  if (c.dynamic) {
    const long apart = up(groups, 8), each = c.rows * apart;
    float* scratch = (float*)room(3 * each * sizeof(float) + c.rows * width);
    const Quantized of = {scratch, scratch + each, (int32_t*)scratch + 2 * each, apart};
    int8_t* a = (int8_t*)(scratch + 3 * each);
    for_each(c.parallel, c.rows < 32 ? 1 : c.threads, c.rows, [&](long r) {
      quantize_row(c.x + r * c.in, c.in, c.group, groups, a + r * width, of.row(r));
    });
    over_strips(calls, count, width / 2, [&](const Call& c, long n, long end) {
      levels_of_rows(c, a, width, of, 0, n, end);
    });
    return free(scratch);
  }
  float* padded = width == c.in ? nullptr : (float*)room(c.rows * width * sizeof(float));
  for (long r = 0; padded && r < c.rows; r++) {
    memcpy(padded + r * width, c.x + r * c.in, c.in * sizeof(float));
    memset(padded + r * width + c.in, 0, (width - c.in) * sizeof(float));
  }
  const float* x = padded ? padded : c.x;
  const long apart = up(groups, V);
  const bool sums = c.group && c.rows <= FEW && 4 * apart <= SCALES && moderate(c.x, c.rows * c.in);
  alignas(64) float inputs[FEW * SCALES / 4];
  bool zeros = false;
  for (long i = 0; i < count; i++) zeros |= calls[i].zero != nullptr;
  for (long r = 0; sums && zeros && r < c.rows; r++) sums_of_groups(x + r * width, c.group, groups, apart, inputs + r * apart);
  over_strips(calls, count, c.group ? width / 2 : c.in, [&](const Call& c, long n, long end) {
    if (sums && c.rows == 1) return c.zero ? few<1, true>(c, x, inputs, groups, n, end) : few<1, false>(c, x, inputs, groups, n, end);
    if (sums) return c.zero ? few<2, true>(c, x, inputs, groups, n, end) : few<2, false>(c, x, inputs, groups, n, end);
    c.group ? rows_of<4>(c, x, width, 0, n, end) : rows_of<8>(c, x, width, 0, n, end);
  });
  free(padded);
}

void weight_linear(const Call* call) { weight_linears(call, 1); }

// One of many calls with the same weight: `fixed` has what does not change.
void weight_run(const Call* fixed, const float* x, float* y, int64_t rows, int64_t threads) {
  Call c = *fixed;
  c.x = x, c.y = y, c.rows = rows, c.threads = threads;
  weight_linear(&c);
}

// Rows of the weight as floats.
void weight_dense(const Call* call) {
  const Call& c = *call;
  const long bytes = c.group ? (c.in + c.group - 1) / c.group * c.group / 2 : c.in;
  over_strips(call, 1, bytes, [&](const Call& c, long n, long end) {
    for (; n < end; n++) {
      const uint8_t* row = c.weight + n * bytes;
      float* to = c.y + n * c.in;
      const float scale = !c.group ? ((const float*)c.scale)[n] : 1;
      Levels levels;
      for (long k = 0; k < c.in; k += BLOCK) {
        vec w[PARTS];
        const long some = least(BLOCK, c.in - k);
        if (!c.group) {
          uint8_t tail[BLOCK] = {};
          memcpy(tail, row + k, some);
          unpack8(tail, w);
          for (int j = 0; j < PARTS; j++) w[j] = w[j] * all(scale);
        } else {
          if (k % c.group == 0) levels = levels_of(c, n, k / c.group);
          unpack4(row + k / 2, levels, w);
        }
        if (some == BLOCK)
          memcpy(to + k, w, sizeof(w));
        else {
          float values[BLOCK];
          memcpy(values, w, sizeof(w));
          memcpy(to + k, values, some * sizeof(float));
        }
      }
    }
  });
}
}

#ifdef SHIM  // as ops of compiled programs
#include "weight_shim.h"
#endif
