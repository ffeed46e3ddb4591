// Monarch layers on a CPU: both factors, tile of rows by tile of rows, in the nearest caches.
//
//   forward    mid[k,(r,l),b] = Σ_i right[k,(r,l),i] x[b,k,i]     y[b,l,s]  = Σ_kr left[l,s,kr] mid
//   backward   dmid[k,(r,l),b] = Σ_s left[l,s,(k,r)] g[b,l,s]     dx[b,k,i] = Σ_rl right[k,rl,i] dmid
//   weights    dright[k,rl,i] = Σ_b dmid[k,rl,b] x[b,k,i]         dleft[l,s,kr] = Σ_b g[b,l,s] mid
//
// Forward and backward are the same two products with other strides (`two_products`): the first has
// its vectors along the rows, so that the order of mid is free and needs no permutation; the second
// reads mid a row at a time and has its vectors along the columns of y, so that y is written as it
// lies. Sums are float32 whatever the element type. What is packed: a tile of x, transposed, and the
// second factor, once per call.
//
// Plain C++17 with the vector extensions of GCC and Clang: no headers of torch, no OpenMP pragmas.
// Threads come from the caller's `parallel`, the GOMP_parallel of the runtime that torch has loaded:
// a second one would fight with it for the cores. Work is handed out by a counter, and every output
// is summed by one thread in one order, so results do not depend on the number of threads.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "threads.h"

namespace {

// Geometry ----------------------------------------------------------------------------------------

#if defined(MONARCH_LANES)  // for tests of other geometries
constexpr int V = MONARCH_LANES;
#elif defined(__AVX512F__)
constexpr int V = 16;
#elif defined(__AVX__)
constexpr int V = 8;
#else
constexpr int V = 4;
#endif
// Accumulators M × NV, vectors of B and a broadcast A: 16 registers, or 32 of them.
#if defined(__AVX512F__) || defined(__aarch64__) || defined(MONARCH_LANES)
constexpr int M1 = 12, NV1 = 2, M2 = 8, NV2 = 3;
#else
constexpr int M1 = 6, NV1 = 2, M2 = 4, NV2 = 3;
#endif
constexpr long ROWS = NV1 * V;  // of x in one vector panel of the first product
constexpr long COLS = NV2 * V;  // of y in one panel of the second
constexpr long LINE = 16;       // floats in a cache line

typedef float vec __attribute__((vector_size(V * 4)));
typedef float vec_u __attribute__((vector_size(V * 4), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(V * 4)));
typedef uint16_t half __attribute__((vector_size(V * 2)));
typedef uint16_t half_u __attribute__((vector_size(V * 2), aligned(2), may_alias));
typedef float f4 __attribute__((vector_size(16)));
typedef float f4_u __attribute__((vector_size(16), aligned(4), may_alias));

struct bf16 {
  uint16_t raw;
};

#define INLINE inline __attribute__((always_inline))

INLINE vec load(const float* p) { return *(const vec_u*)p; }
INLINE void store(float* p, vec v) { *(vec_u*)p = v; }
INLINE vec load(const bf16* p) {
  bits wide = __builtin_convertvector(*(const half_u*)p, bits) << 16;
  vec v;
  memcpy(&v, &wide, sizeof v);
  return v;
}
INLINE void store(bf16* p, vec v) {  // to nearest, ties to even; NaN stays NaN
  bits u;
  memcpy(&u, &v, sizeof u);
  bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  bits nan = (bits)((u & 0x7fffffffu) > 0x7f800000u);
  rounded = (rounded & ~nan) | (((u >> 16) | 0x40u) & nan);
  *(half_u*)p = __builtin_convertvector(rounded, half);
}
INLINE float number(float v) { return v; }
INLINE float number(bf16 v) {
  uint32_t u = (uint32_t)v.raw << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
INLINE void put(float* p, float v) { *p = v; }
INLINE void put(bf16* p, float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u)
    p->raw = (uint16_t)((u >> 16) | 0x40u);
  else
    p->raw = (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

template <class T>
__attribute__((noinline)) vec load_some(const T* p, long n) {  // n < V of them, zeros after
  vec v = {};
  for (long i = 0; i < n; i++) v[i] = number(p[i]);
  return v;
}
template <class T>
__attribute__((noinline)) void store_few(T* p, const vec& v, long n) {
  for (long i = 0; i < n; i++) put(p + i, v[i]);
}
template <class T>
INLINE void store_some(T* p, vec v, long n) {
  if (n >= V) return store(p, v);
  store_few(p, v, n);
}

// Keeps a vector of B in a register: GCC would else read it anew for each row of A.
#if defined(__x86_64__)
#define PIN(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define PIN(v) __asm__("" : "+w"(v))
#else
#define PIN(v)
#endif

// acc[m][j] += Σ_p a[m·am + p·ak] · b[p][j]: all the arithmetic of this file.
template <int M, int NV>
INLINE void multiply(vec (&acc)[M][NV], long n, const float* a, long am, long ak, const float* b) {
  for (long p = 0; p < n; p++, a += ak, b += NV * V) {
    vec row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
      row[j] = *(const vec_u*)(b + j * V);
#if !defined(MONARCH_LANES)
      PIN(row[j]);
#endif
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      float s = a[m * am];
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) acc[m][j] += row[j] * s;
    }
  }
}

// A whole tile: acc from `init(m, j)`, multiplied, to `done(m, j, vector)`. Inlined, its loop would
// compete with the caller's variables for registers, and be a tenth slower.
template <int M, int NV, class Init, class Done>
__attribute__((noinline)) void whole_tile(
    long n, const float* a, long am, long ak, const float* b, const Init& init, const Done& done) {
  vec acc[M][NV];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[m][j] = init(m, j);
  multiply<M, NV>(acc, n, a, am, ak, b);
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) done(m, j, acc[m][j]);
}

// What is left at an edge, m ≤ M rows and nv ≤ NV vectors, to out[m][nv]: one body for all callers.
template <int M, int NV>
__attribute__((noinline)) void edge_tile(
    long m, long nv, long n, const float* a, long am, long ak, const float* b, vec* out) {
  if constexpr (NV > 1) {
    if (nv < NV) return edge_tile<M, NV - 1>(m, nv, n, a, am, ak, b, out);
  }
  if constexpr (M > 1) {
    if (m < M) return edge_tile<M - 1, NV>(m, NV, n, a, am, ak, b, out);
  }
  vec acc[M][NV] = {};
  multiply<M, NV>(acc, n, a, am, ak, b);
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) out[i * NV + j] = acc[i][j];
}

template <int M, int NV, class Init, class Done>
INLINE void tile_of(long m, long nv, long n, const float* a, long am, long ak, const float* b,
                    const Init& init, const Done& done) {
  if (m == M && nv == NV) return whole_tile<M, NV>(n, a, am, ak, b, init, done);
  vec out[M * NV];
  edge_tile<M, NV>(m, nv, n, a, am, ak, b, out);
  for (int i = 0; i < m; i++)
    for (int j = 0; j < nv; j++) done(i, j, init(i, j) + out[i * nv + j]);
}

// Packing -----------------------------------------------------------------------------------------

INLINE f4 load4(const float* p) { return *(const f4_u*)p; }
INLINE f4 load4(const bf16* p) { return f4{number(p[0]), number(p[1]), number(p[2]), number(p[3])}; }

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES 1
typedef float f8 __attribute__((vector_size(32)));
typedef float f8_u __attribute__((vector_size(32), aligned(4), may_alias));
// to[c·ld + r] = from[r·stride + c] for 8 rows and 4 columns: row r beside row r+4, then 4×4 each.
template <class T>
INLINE void transpose_8x4(const T* from, long stride, float* to, long ld) {
  f8 v[4], t[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++)
    v[r] = __builtin_shufflevector(
        load4(from + r * stride), load4(from + (r + 4) * stride), 0, 1, 2, 3, 4, 5, 6, 7);
  t[0] = __builtin_shufflevector(v[0], v[1], 0, 8, 1, 9, 4, 12, 5, 13);
  t[1] = __builtin_shufflevector(v[0], v[1], 2, 10, 3, 11, 6, 14, 7, 15);
  t[2] = __builtin_shufflevector(v[2], v[3], 0, 8, 1, 9, 4, 12, 5, 13);
  t[3] = __builtin_shufflevector(v[2], v[3], 2, 10, 3, 11, 6, 14, 7, 15);
  *(f8_u*)(to + 0 * ld) = __builtin_shufflevector(t[0], t[2], 0, 1, 8, 9, 4, 5, 12, 13);
  *(f8_u*)(to + 1 * ld) = __builtin_shufflevector(t[0], t[2], 2, 3, 10, 11, 6, 7, 14, 15);
  *(f8_u*)(to + 2 * ld) = __builtin_shufflevector(t[1], t[3], 0, 1, 8, 9, 4, 5, 12, 13);
  *(f8_u*)(to + 3 * ld) = __builtin_shufflevector(t[1], t[3], 2, 3, 10, 11, 6, 7, 14, 15);
}
#endif
#endif

// to[c·width + r] = from[r·stride + c]; rows up to `width`, a multiple of V, are zero.
template <class T>
void transpose(const T* from, long stride, long rows, long cols, float* to, long width) {
  long r = 0;
#if defined(SHUFFLES)
  for (; r + 8 <= rows; r += 8) {
    long c = 0;
    for (; c + 4 <= cols; c += 4)
      transpose_8x4(from + r * stride + c, stride, to + c * width + r, width);
    for (; c < cols; c++)
      for (long i = r; i < r + 8; i++) to[c * width + i] = number(from[i * stride + c]);
  }
#endif
  for (; r < rows; r++)
    for (long c = 0; c < cols; c++) to[c * width + r] = number(from[r * stride + c]);
  for (; r < width; r++)
    for (long c = 0; c < cols; c++) to[c * width + r] = 0;
}

// to[r·width + c] = from[r·stride + c], columns up to `width`, a multiple of V, zero.
template <class T>
void copy_panel(const T* from, long stride, long rows, long cols, float* to, long width) {
  for (long r = 0; r < rows; r++, from += stride, to += width)
    for (long c = 0; c < width; c += V)
      *(vec_u*)(to + c) = c + V <= cols ? load(from + c) : load_some(from + c, cols - c);
}

INLINE long panel_width(long cols) {  // of the panel that begins with `cols` columns left
  return cols >= COLS ? COLS : (cols + V - 1) / V * V;
}
INLINE long padded(long cols) { return cols / COLS * COLS + panel_width(cols % COLS); }
INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }

// Into the cache before it is needed: no hardware does so across pages, where rows end.
template <class T>
INLINE void fetch(const T* p, long n) {
  for (long i = 0; i < n; i += LINE * 4 / (long)sizeof(T)) __builtin_prefetch(p + i);
}

// Memory ------------------------------------------------------------------------------------------

// Memory of a thread between calls: fresh pages each time would cost more than the arithmetic.
struct Scratch {
  float* data = nullptr;
  size_t size = 0;
  float* get(size_t floats) {
    if (floats > size) {
      free(data);
      data = nullptr;
      size = (floats + 1023) / 1024 * 1024;
      if (posix_memalign((void**)&data, 64, size * sizeof(float))) std::abort();
    }
    return data;
  }
  ~Scratch() { free(data); }
};
thread_local Scratch scratch;

}  // namespace

// The arguments, as Python fills them in (kernels/monarch_cpu.py: _Call) -------------------------

struct Call {
  const void* input;   // [rows, features], rows `input_stride` apart
  const void* first;   // factor of the first product: first[b·first_block + m·first_m + p·first_p]
  const void* second;  // factor of the second: second[b·second_block + q·second_q + n·second_n]
  const void* bias;    // [out] or null
  void* output;        // [rows, out]
  void* mid;           // [K, (r, l), rows] or null; float32 in the backward pass
  float* packed;       // monarch_packed_size() floats
  Parallel parallel;
  int64_t rows, input_stride, features, out, output_stride, threads, tile;
  int64_t blocks1, width1;  // blocks of the input, and columns of each
  int64_t blocks2, width2;  // blocks of the output, and columns of each
  int64_t rank, transposed;
  int64_t first_block, first_m, first_p, second_block, second_q, second_n;
};

struct Gradient {           // of one factor: Σ_b a[block·a_block + m·a_m + b] · input[b, block, n]
  const void* a;            // mid or dmid
  const void* input;        // [rows, features], rows `input_stride` apart
  void* output;             // output[block·out_block + m·out_m + n·out_n]
  void* sums;               // [features] or null: Σ_b input[b, :]
  int64_t a_block, a_m, input_stride, features, blocks, m, width;
  int64_t out_block, out_m, out_n, wide_a;
};

namespace {

// Numbers of mid: block of the second product and its index there, for row m of block b of the
// first. Forward m = (r, l), b = k → l, (k, r); backward m = (k, r), b = l → k, (r, l).
struct Place {
  long block, index;
};
INLINE Place place(const Call& c, long b, long m) {
  if (c.transposed) return {m / c.rank, m % c.rank * c.blocks1 + b};
  return {m % c.blocks2, b * c.rank + m / c.blocks2};
}

template <class T>
void pack_factors(const Call& c, float* first, float* second) {
  const long q = c.blocks1 * c.rank, panels = (c.width2 + COLS - 1) / COLS;
  const long m = c.blocks2 * c.rank, copies = sizeof(T) == 4 ? 0 : c.blocks1;
  const long packs = c.output ? c.blocks2 * panels : 0;
  for_each(c.parallel, c.threads, packs + copies, [&](long task) {
    if (task >= packs) {  // the first factor is read as float32
      long b = task - packs;
      const T* from = (const T*)c.first + b * c.first_block;
      for (long i = 0; i < m * c.width1; i++) first[b * c.first_block + i] = number(from[i]);
      return;
    }
    long b = task / panels, n0 = task % panels * COLS, cols = least(COLS, c.width2 - n0);
    float* to = second + (b * padded(c.width2) + n0) * q;
    const T* from = (const T*)c.second + b * c.second_block + n0 * c.second_n;
    if (c.second_n == 1)
      copy_panel(from, c.second_q, q, cols, to, panel_width(cols));
    else
      transpose(from, c.second_n, cols, q, to, panel_width(cols));
  });
}

// Rows [row0, row0 + count): mid in this thread's scratch as [block of the second product, q, rows].
template <class T, class Mid>
void two_products(const Call& c, const float* first, const float* second, long row0, long count) {
  const long panels = (count + ROWS - 1) / ROWS, ld = panels * ROWS + LINE;
  const long m_all = c.blocks2 * c.rank, q_all = c.blocks1 * c.rank;
  float* mid = scratch.get(c.blocks1 * m_all * ld + panels * ROWS * c.width1 + 2 * COLS);
  float* turned = mid + c.blocks1 * m_all * ld;
  const T* x = (const T*)c.input + row0 * c.input_stride;
  Mid* kept = (Mid*)c.mid;

  // Fetches this share (m0 to m1 of m_all) of block b of x.
  auto prefetch = [&](long m0, long m1, long b) {
    if (b < c.blocks1)
      for (long r = m0 * count / m_all; r < m1 * count / m_all; r++)
        fetch(x + r * c.input_stride + b * c.width1, c.width1);
  };

  for (long b = 0; b < c.blocks1; b++) {
    // < width1 where x is padded, none in a block of padding alone
    const long cols = most(0, least(c.width1, c.features - b * c.width1));
    for (long p = 0; p < panels; p++)
      transpose(x + p * ROWS * c.input_stride + b * c.width1, c.input_stride,
                least(ROWS, count - p * ROWS), cols, turned + p * ROWS * cols, ROWS);
    const float* a = first + b * c.first_block;
    for (long m0 = 0; m0 < m_all; m0 += M1) {
      const long ms = least(M1, m_all - m0);
      prefetch(m0, least(m0 + M1, m_all), b + 1);
      float* to[M1];
      Mid* keep[M1];
      for (long m = 0; m < ms; m++) {
        const Place at = place(c, b, m0 + m);
        to[m] = mid + (at.block * q_all + at.index) * ld;
        const long global = c.transposed ? at.block * q_all + at.index : b * m_all + m0 + m;
        keep[m] = kept + global * c.rows + row0;
      }
      for (long p = 0; p < panels; p++) {
        const long r0 = p * ROWS, valid = count - r0;
        tile_of<M1, NV1>(
            ms, NV1, cols, a + m0 * c.first_m, (long)c.first_m, (long)c.first_p,
            (const float*)(turned + r0 * cols), [](int, int) { return vec{}; },
            [&](int m, int j, vec v) {
              store(to[m] + r0 + j * V, v);
              if (kept && valid > j * V) store_some(keep[m] + r0 + j * V, v, valid - j * V);
            });
      }
    }
  }

  T* y = (T*)c.output + row0 * c.output_stride;
  for (long b = 0; c.output && b < c.blocks2; b++) {
    const long cols = least(c.width2, c.out - b * c.width2);  // < width2 where y is cropped
    for (long n0 = 0; n0 < cols; n0 += COLS) {
      const long width = panel_width(c.width2 - n0), valid = least(width, cols - n0);
      const float* panel = second + (b * padded(c.width2) + n0) * q_all;
      vec bias[NV2] = {};
      if (c.bias)
        for (long j = 0; j * V < valid; j++) {
          const T* from = (const T*)c.bias + b * c.width2 + n0 + j * V;
          bias[j] = valid - j * V >= V ? load(from) : load_some(from, valid - j * V);
        }
      T* to = y + b * c.width2 + n0;
      for (long r = 0; r < count; r += M2)
        tile_of<M2, NV2>(
            least(M2, count - r), width / V, q_all, (const float*)(mid + b * q_all * ld + r), 1L, ld,
            panel,
            [&](int m, int j) {
              __builtin_prefetch(to + (r + m) * c.output_stride + j * V, 1);
              return bias[j];
            },
            [&](int m, int j, vec v) {
              T* at = to + (r + m) * c.output_stride + j * V;
              if (valid >= width)
                store(at, v);
              else if (valid > j * V)
                store_some(at, v, valid - j * V);
            });
    }
  }
}

constexpr long CHUNK = 128;      // rows at a time
constexpr long WIDE = 4 * COLS;  // columns of a factor's gradient at a time

template <class T, class A>
void gradient(const Gradient& g, long rows, long block, long n0) {
  const long cols = least(WIDE, g.width - n0), width = padded(cols);
  const long begin = block * g.width + n0;
  const long valid = least(cols, g.features - begin);  // the rest of x or g is padding: zeros
  float* sum = scratch.get(g.m * width + CHUNK * width + M2 * CHUNK);
  float *panels = sum + g.m * width, *wide = panels + CHUNK * width;
  memset(sum, 0, g.m * width * sizeof(float));
  vec totals[WIDE / V] = {};
  for (long r0 = 0; r0 < rows; r0 += CHUNK) {
    const long count = least(CHUNK, rows - r0);
    const T* in = (const T*)g.input + r0 * g.input_stride + begin;
    for (long n = 0; n < width; n += COLS) {
      const long w = panel_width(cols - n);
      float* panel = panels + n * CHUNK;
      copy_panel(in + n, g.input_stride, count, most(0, least(COLS, valid - n)), panel, w);
      if (g.sums)
        for (long r = 0; r < count; r++)
          for (long j = 0; j < w; j += V) totals[(n + j) / V] += load(panel + r * w + j);
    }
    const A* a = (const A*)g.a + block * g.a_block + r0;
    const long then = most(0, least(CHUNK, rows - r0 - CHUNK));  // rows of the next chunk
    for (long m = 0; m < g.m; m += M2) {
      const long ms = least(M2, g.m - m);
      for (long i = m + M2; i < least(m + 2 * M2, g.m); i++)
        fetch(a + i * g.a_m, count);
      for (long r = m * then / g.m; r < (m + ms) * then / g.m; r++)
        fetch(in + (CHUNK + r) * g.input_stride, valid);
      const float* from;
      long stride;
      if constexpr (sizeof(A) == sizeof(float)) {
        from = a + m * g.a_m, stride = g.a_m;
      } else {
        from = wide, stride = CHUNK;
        for (long i = 0; i < ms; i++)
          for (long r = 0; r < count; r++) wide[i * CHUNK + r] = number(a[(m + i) * g.a_m + r]);
      }
      for (long n = 0; n < width; n += COLS) {
        const long w = panel_width(cols - n);
        float* to = sum + m * width + n;
        tile_of<M2, NV2>(
            ms, w / V, count, from, stride, 1L, (const float*)(panels + n * CHUNK),
            [&](int i, int j) { return load(to + i * width + j * V); },
            [&](int i, int j, vec v) { store(to + i * width + j * V, v); });
      }
    }
  }
  T* out = (T*)g.output + block * g.out_block + n0 * g.out_n;
  if (g.out_n == 1) {
    for (long m = 0; m < g.m; m++)
      for (long n = 0; n < cols; n += V)
        store_some(out + m * g.out_m + n, load(sum + m * width + n), cols - n);
  } else {
    for (long n = 0; n < cols; n++)
      for (long m = 0; m < g.m; m++) put(out + n * g.out_n + m * g.out_m, sum[m * width + n]);
  }
  if (g.sums)
    for (long n = 0; n < valid; n += V)
      store_some((T*)g.sums + begin + n, totals[n / V], valid - n);
}

template <class T, class Mid>
void products(const Call& c) {
  float* second = c.packed;
  const float* first = (const float*)c.first;
  if (sizeof(T) != 4) {
    float* wide = second + c.blocks2 * padded(c.width2) * c.blocks1 * c.rank;
    pack_factors<T>(c, wide, second);
    first = wide;
  } else {
    pack_factors<T>(c, nullptr, second);
  }
  for_each(c.parallel, c.threads, (c.rows + c.tile - 1) / c.tile, [&](long task) {
    long row0 = task * c.tile;
    two_products<T, Mid>(c, first, second, row0, least(c.tile, c.rows - row0));
  });
}

template <class T>
void gradients(const Gradient* g, long n, long rows, Parallel parallel, long threads) {
  long tasks = 0, ends[2];
  for (long i = 0; i < n; i++) ends[i] = tasks += g[i].blocks * ((g[i].width + WIDE - 1) / WIDE);
  for_each(parallel, threads, tasks, [&](long task) {
    const long which = task >= ends[0];
    const Gradient& of = g[which];
    if (which) task -= ends[0];
    const long parts = (of.width + WIDE - 1) / WIDE;
    if (of.wide_a)
      gradient<T, float>(of, rows, task / parts, task % parts * WIDE);
    else
      gradient<T, T>(of, rows, task / parts, task % parts * WIDE);
  });
}

}  // namespace

extern "C" {

int64_t monarch_rows() { return ROWS; }

// Floats that `packed` needs: the second factor in panels, and a bf16 first factor in float32.
int64_t monarch_packed_size(const Call* c, int64_t bytes) {
  long q = c->blocks1 * c->rank;
  return c->blocks2 * padded(c->width2) * q + (bytes == 4 ? 0 : c->blocks2 * q * c->width1);
}

void monarch_products(const Call* c, int64_t bytes) {
  if (bytes == 4)
    products<float, float>(*c);
  else if (c->transposed)
    products<bf16, float>(*c);
  else
    products<bf16, bf16>(*c);
}

void monarch_gradients(const Gradient* g, int64_t n, int64_t rows, Parallel parallel,
                       int64_t threads, int64_t bytes) {
  if (bytes == 4)
    gradients<float>(g, n, rows, parallel, threads);
  else
    gradients<bf16>(g, n, rows, parallel, threads);
}
}
