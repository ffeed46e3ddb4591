// Attention on a CPU in one pass: softmax(q kᵀ·scale + mask) v, rows of queries at a time.
//
//   s[i,t] = scale·Σ_d q[i,d] k[t,d]      + mask[i,t], or −∞ where a mask of truths is false,
//                                         and where t > i if it is causal
//   p[i,t] = exp(s[i,t] − max_t s[i,t])
//   y[i,d] = Σ_t p[i,t] v[t,d] / Σ_t p[i,t]               zeros where all of a row is −∞
//
// The keys of a head are transposed once, so that neighbours lie beside each other in a register; the
// scores of ROWS queries stay in the nearest cache between the two products. For one query, as a
// language model decodes, keys are read as they lie, once for all heads that share them. Operands are read where
// they lie, heads apart by any stride; y is written as [batch, S, heads, D], which is what the next
// linear layer reads.
//
// Plain C++17 with the vector extensions of GCC and Clang; threads as threads.h has them. A row is
// summed by one thread in one order: results do not depend on the number of threads.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "threads.h"
#include "vectors.h"

namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 6, WIDTH = 4;  // ROWS × WIDTH sums in registers
#else
constexpr int ROWS = 4, WIDTH = 2;
#endif
constexpr float NEVER = -__builtin_inff();

}  // namespace

// The arguments, as Python fills them in (kernels/attention_cpu.py: _Call). Strides in elements.
struct Call {
  const float *q, *k, *v;
  const void* mask;  // null for none
  float* y;          // [batch, queries, heads, depth]
  Parallel parallel;
  int64_t batch, heads, shared, queries, keys, depth;  // `shared` heads of q read one of k and v
  int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row;
  int64_t mask_batch, mask_head, mask_row, mask_column, truths, causal, threads;
  double scale;
  int64_t bf16;  // both products of bfloat16 numbers, where attention_bf16() says so
};

namespace {

// ROWS queries × J·V keys.
template <int J>
INLINE void scores(const float* q, const float* kt, long depth, long columns, float* s) {
  vec sum[ROWS][J];
  for (int m = 0; m < ROWS; m++)
    for (int j = 0; j < J; j++) sum[m][j] = vec{};
  for (long d = 0; d < depth; d++) {
    vec k[J];
    for (int j = 0; j < J; j++) k[j] = load(kt + d * columns + j * V);
    for (int m = 0; m < ROWS; m++) {
      const vec x = all(q[m * depth + d]);
      for (int j = 0; j < J; j++) sum[m][j] += x * k[j];
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int j = 0; j < J; j++) store(s + m * columns + j * V, sum[m][j]);
}

// ROWS rows of p × J·V columns of v.
template <int J>
INLINE void mixed(const float* p, const float* v, long v_row, long keys, long columns, const float* by,
                  long rows, float* y, long y_row) {
  vec sum[ROWS][J];
  for (int m = 0; m < ROWS; m++)
    for (int j = 0; j < J; j++) sum[m][j] = vec{};
  for (long t = 0; t < keys; t++) {
    vec x[J];
    for (int j = 0; j < J; j++) x[j] = load(v + t * v_row + j * V);
    for (int m = 0; m < ROWS; m++) {
      const vec w = all(p[m * columns + t]);
      for (int j = 0; j < J; j++) sum[m][j] += w * x[j];
    }
  }
  for (int m = 0; m < ROWS; m++)
    if (m < rows)
      for (int j = 0; j < J; j++) store(y + m * y_row + j * V, sum[m][j] * by[m]);
}

// s → p for one row, of which `keys` count; returns 1/Σp, or 0 where all is −∞ (p is 0 then).
float softmax(float* s, long keys, long columns) {
  for (long t = keys; t < columns; t++) s[t] = NEVER;
  vec most = load(s);
  for (long t = V; t < columns; t += V) {
    const vec x = load(s + t);
    most = x > most ? x : most;
  }
  float high = most[0];
  for (int i = 1; i < V; i++) high = most[i] > high ? most[i] : high;
  if (high == NEVER) high = 0;  // exp(−∞) is as near to 0 as it can be, and set to it below
  vec sum = vec{};
  for (long t = 0; t < columns; t += V) {
    const vec x = load(s + t);
    const vec e = x == all(NEVER) ? vec{} : exponential(x - high);
    sum += e;
    store(s + t, e);
  }
  float total = 0;
  for (int i = 0; i < V; i++) total += sum[i];
  return total > 0 ? 1 / total : total == 0 ? 0 : total;
}

void add_mask(const Call& c, float* s, long b, long h, long row) {
  if (c.mask) {
    const long at = b * c.mask_batch + h * c.mask_head + row * c.mask_row;
    if (c.truths) {
      const uint8_t* m = (const uint8_t*)c.mask + at;
      if (c.mask_column == 1)
        for (long t = 0; t < c.keys; t++) s[t] += m[t] ? 0 : NEVER;  // NaN stays
      else
        for (long t = 0; t < c.keys; t++) s[t] += m[t * c.mask_column] ? 0 : NEVER;
    } else {
      const float* m = (const float*)c.mask + at;
      if (c.mask_column == 1)
        for (long t = 0; t < c.keys; t++) s[t] += m[t];
      else
        for (long t = 0; t < c.keys; t++) s[t] += m[t * c.mask_column];
    }
  }
  if (c.causal)
    for (long t = row + 1; t < c.keys; t++) s[t] = NEVER;
}

// Queries [from, to) of one head.
void head(const Call& c, long b, long h, long from, long to) {
  const long columns = up(c.keys, V), depth = c.depth, y_row = c.heads * depth;
  const long kv = h / c.shared;
  float* held = (float*)aligned_alloc(64, up((columns * (depth + ROWS) + ROWS * depth) * 4, 64));
  if (!held) std::abort();
  float *kt = held, *s = kt + columns * depth, *own = s + columns * ROWS;
  const float* k = c.k + b * c.k_batch + kv * c.k_head;
  for (long t0 = 0; t0 < columns; t0 += V)
    for (long d = 0; d < depth; d++) {
      float* out = kt + d * columns + t0;
      for (long i = 0; i < V; i++) out[i] = t0 + i < c.keys ? k[(t0 + i) * c.k_row + d] : 0;
    }
  const float* v = c.v + b * c.v_batch + kv * c.v_head;
  const float scale = (float)c.scale;
  for (long r = from; r < to; r += ROWS) {
    const long rows = least(ROWS, to - r);
    const long keys = c.causal ? least(c.keys, r + rows) : c.keys;  // none of these rows reads more
    const long used = up(keys, V);
    const float* q = c.q + b * c.q_batch + h * c.q_head + r * c.q_row;
    for (long m = 0; m < ROWS; m++)
      for (long d = 0; d < depth; d++) own[m * depth + d] = m < rows ? q[m * c.q_row + d] * scale : 0;
    long t = 0;
    for (; t + WIDTH * V <= used; t += WIDTH * V) scores<WIDTH>(own, kt + t, depth, columns, s + t);
    for (; t < used; t += V) scores<1>(own, kt + t, depth, columns, s + t);
    float by[ROWS] = {};
    for (long m = 0; m < rows; m++) {
      add_mask(c, s + m * columns, b, h, r + m);
      by[m] = softmax(s + m * columns, keys, used);
    }
    float* y = c.y + (b * c.queries + r) * y_row + h * depth;
    long d = 0;
    for (; d + WIDTH * V <= depth; d += WIDTH * V)
      mixed<WIDTH>(s, v + d, c.v_row, keys, columns, by, rows, y + d, y_row);
    for (; d + 2 * V <= depth; d += 2 * V)
      mixed<2>(s, v + d, c.v_row, keys, columns, by, rows, y + d, y_row);
    for (; d < depth; d += V) mixed<1>(s, v + d, c.v_row, keys, columns, by, rows, y + d, y_row);
  }
  free(held);
}

// The sum of the numbers of a vector, by halves.
INLINE float total(vec v) {
  float each[V];
  memcpy(each, &v, sizeof(v));
#pragma GCC unroll 4
  for (int n = V / 2; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) each[i] += each[i + n];
  return each[0];
}

// s[m,t] = Σ_d q[m,d] k[t,d] of M rows of q, `columns` scores a row.
template <int M>
void dots(const float* q, const float* k, long k_row, long keys, long depth, long columns, float* s) {
  for (long t = 0; t < keys; t++) {
    vec sum[M];
    for (int m = 0; m < M; m++) sum[m] = vec{};
    for (long d = 0; d < depth; d += V) {
      const vec x = load(k + t * k_row + d);
      for (int m = 0; m < M; m++) sum[m] += x * load(q + m * depth + d);
    }
    for (int m = 0; m < M; m++) s[m * columns + t] = total(sum[m]);
  }
}

template <int M = ROWS>
void dots_of(long rows, const float* q, const float* k, long k_row, long keys, long depth, long columns, float* s) {
  if constexpr (M > 1)
    if (rows < M) return dots_of<M - 1>(rows, q, k, k_row, keys, depth, columns, s);
  dots<M>(q, k, k_row, keys, depth, columns, s);
}

constexpr long SINGLE = 1 << 18;  // products of one query each, for which another thread pays

// One query of each head that reads the kv-th keys; they are read once for ROWS heads, and as they lie.
void single(const Call& c, long b, long kv) {
  const long keys = c.keys, columns = up(keys, V), depth = c.depth;
  float* held = (float*)aligned_alloc(64, up(ROWS * (columns + depth) * 4, 64));
  if (!held) std::abort();
  float *s = held, *own = s + ROWS * columns;
  memset(s, 0, ROWS * columns * 4);
  const float *k = c.k + b * c.k_batch + kv * c.k_head, *v = c.v + b * c.v_batch + kv * c.v_head;
  for (long first = 0; first < c.shared; first += ROWS) {
    const long rows = least(ROWS, c.shared - first), h = kv * c.shared + first;
    const float* q = c.q + b * c.q_batch + h * c.q_head;
    for (long m = 0; m < rows; m++)
      for (long d = 0; d < depth; d++) own[m * depth + d] = q[m * c.q_head + d] * (float)c.scale;
    dots_of(rows, own, k, c.k_row, keys, depth, columns, s);
    float by[ROWS] = {};
    for (long m = 0; m < rows; m++) {
      add_mask(c, s + m * columns, b, h + m, 0);
      by[m] = softmax(s + m * columns, keys, columns);
    }
    float* y = c.y + (b * c.heads + h) * depth;
    long d = 0;
    for (; d + WIDTH * V <= depth; d += WIDTH * V) mixed<WIDTH>(s, v + d, c.v_row, keys, columns, by, rows, y + d, depth);
    for (; d < depth; d += V) mixed<1>(s, v + d, c.v_row, keys, columns, by, rows, y + d, depth);
  }
  free(held);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define BF16 1
#include "attention_bf16.h"
#else
#define BF16 0
#endif

// Queries [from, to) of one head, as the call asks for.
void part(const Call& c, long b, long h, long from, long to) {
#if BF16
  if (c.bf16) return bf16::head(c, b, h, from, to);
#endif
  head(c, b, h, from, to);
}

}  // namespace

extern "C" {

int64_t attention_lanes() { return V; }

// Whether a call may ask for bfloat16.
int64_t attention_bf16() { return BF16; }

// Multiplies by AMX from now on, where that can be, or no more; whether it does.
int64_t attention_use_amx(int64_t wanted) {
#if BF16 && TILES
  return amx::use(wanted != 0);
#else
  return wanted & 0;
#endif
}

void attention(const Call* call) {
  const Call& c = *call;
  if (c.queries == 1 && !c.bf16) {
    const long few = c.batch * c.heads * c.keys * c.depth < SINGLE ? 1 : c.threads, heads = c.heads / c.shared;
    return for_each(c.parallel, few, c.batch * heads, [&](long i) { single(c, i / heads, i % heads); });
  }
  // a task is a few heads beside each other in memory; or one; or a part of one, so that all threads
  // have work
  const long heads = c.batch * c.heads, rows = up(c.queries, ROWS) / ROWS;
  const long parts = heads >= 2 * c.threads ? 1 : least(rows, (2 * c.threads + heads - 1) / heads);
  const long size = (rows + parts - 1) / parts * ROWS, cuts = (c.queries + size - 1) / size;
  const long each = cuts > 1 ? 1 : least(4, (heads + 8 * c.threads - 1) / (8 * c.threads));
  for_each(c.parallel, c.threads, (heads * cuts + each - 1) / each, [&](long task) {
    for (long i = task * each; i < least(task * each + each, heads * cuts); i++) {
      const long at = i / cuts, from = i % cuts * size;
      part(c, at / c.heads, at % c.heads, from, least(from + size, c.queries));
    }
  });
}
// All heads of one element of the batch, by this thread: q, k and v of the call are numbers from x on.
void attention_unit(const Call* call, int64_t b, const float* x) {
  Call c = *call;
  c.q = x + (intptr_t)c.q, c.k = x + (intptr_t)c.k, c.v = x + (intptr_t)c.v;
  c.q_batch = c.k_batch = c.v_batch = 0;
  for (long h = 0; h < c.heads; h++) part(c, b, h, 0, c.queries);
}
}

#ifdef SHIM  // as ops of compiled programs
#include "attention_shim.h"
#endif
