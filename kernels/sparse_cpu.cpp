// Layers on a CPU that read only the weights of active inputs.
//
//   sparse_linear   y[r,:] = Σ_{i ∈ S(r)} x[r,i]·w[i,:] + bias           w[i,:] is one contiguous row
//   sparse_gated    a[r,n] = act(Σ_k x[r,k] gate[n,k]),   n ∈ S(r) by a
//                   y[r,:] = Σ_{n ∈ S(r)} a[r,n]·(Σ_k x[r,k] up[n,k])·down[n,:] + bias
//                   (or with an a, or an S, that the caller has; without `up` its product counts as 1)
//
// With `screen`, levels of 8 bits of the gate, S(r) goes by those, and of the gate itself only the rows
// in S(r) are read: a quarter of the bytes of a float gate for a choice that is seldom another one.
//
// S(r) holds the k entries of largest score |x[r,i]|·importance[i], ties by the lower index, or those
// whose score is not below a threshold. With blocks, neighbours stand or fall together by the largest
// score among them, which unlike a sum does not depend on an order. NaN counts as the largest.
//
// Rows of x are taken up to eight at a time, with the union of what is active in them: each row of w
// is read once for all of them. More active rows than `limit` and nothing is multiplied: a dense
// product is faster then, and the caller has one.
//
// Weights are float32, bfloat16, or int8 with a scale for each output (of `gate` and `up`: each
// neuron); of sparse_linear also 4 bits with a scale for each output and group of inputs
// (sparse_int4.h). C++17 with vector extensions and Intel's intrinsics; threads as threads.h has them. Every
// output is summed by one thread in an order that depends on sizes and active entries alone: results
// do not depend on the number of threads.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "sparse_active.h"
#include "sparse_int4.h"
#include "threads.h"
#include "vectors.h"

#if !defined(__AVX2__) || !defined(__FMA__)
#error "neither AVX-512 nor AVX2"
#endif

// The arguments, as Python fills them in (kernels/sparse_cpu.py) -----------------------------------

struct Select {
  const float* importance;  // [width] or null
  double threshold;         // of scores; used where k is 0
  int64_t k, block;
};

struct Linear {
  const float* x;     // [rows, in]
  const void* weight; // [in, out]; of 4 bits [in, ⌈out/2⌉] bytes
  const void *scale, *zero;  // float [out] or null; of 4 bits [groups, out], zero or null
  const float* bias;         // [out] or null
  float* y;           // [rows, out]
  int64_t* active;    // result: rows of w that were read, over all groups of rows of x
  Parallel parallel;
  int64_t rows, in, out, type, group, floats, limit, threads;  // of 4 bits: inputs in a group; float scales
  Select select;
};

struct Gated {
  const float* x;  // [rows, in]
  const void *gate, *up, *down;  // [hidden, in], [hidden, in], [hidden, out]
  const float *gate_scale, *up_scale, *down_scale;  // [hidden], [hidden], [out] or null
  const float *gate_bias, *up_bias, *bias;          // [hidden], [hidden], [out] or null
  const int8_t* screen;       // [hidden, in] or null: S is chosen by these levels of the gate
  const float* screen_scale;  // [hidden]
  const float* given;         // [rows, hidden] or null: a, and nothing is read of the gate
  const float* scores;        // [rows, experts] or null: S are the neurons of the `best` experts with
  const int32_t* expert_of;   // [hidden]             the largest, and of the gate no others are read
  float* y;                                         // [rows, out]
  int64_t* active;
  Parallel parallel;
  int64_t rows, in, hidden, out, type, then, limit, threads, experts, best;
  Select select;
};

namespace {

enum { FLOAT, BF16, INT8, INT4 };

// Weights as floats -------------------------------------------------------------------------------

INLINE vec load(const uint16_t* p) {
#if defined(__AVX512F__) && !defined(VECTORS_NARROW)
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#endif
}

INLINE vec load(const int8_t* p) {
#if defined(__AVX512F__) && !defined(VECTORS_NARROW)
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#endif
}

INLINE float number(const float* p) { return *p; }
INLINE float number(const int8_t* p) { return *p; }
INLINE float number(const uint16_t* p) {
  const uint32_t bits = (uint32_t)*p << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

INLINE float sum_of(vec v) {
#if defined(__AVX512F__) && !defined(VECTORS_NARROW)
  return _mm512_reduce_add_ps((__m512)v);
#else
  const __m256 w = (__m256)v;
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
#endif
}

// Selection ---------------------------------------------------------------------------------------

// Scores are never negative: as integers their bits have the same order, and NaN comes last.
INLINE uint32_t bits_of(float score) {
  uint32_t bits;
  memcpy(&bits, &score, 4);
  return bits & 0x7fffffff;
}

// The k-th largest of n numbers below 2³¹.
uint32_t kth_largest(const uint32_t* keys, long n, long k, std::vector<uint32_t>& room) {
  long counts[2048] = {};
  for (long i = 0; i < n; i++) counts[keys[i] >> 20]++;
  long bucket = 2047;
  for (; counts[bucket] < k; bucket--) k -= counts[bucket];
  room.clear();
  for (long i = 0; i < n; i++)
    if ((long)(keys[i] >> 20) == bucket) room.push_back(keys[i]);
  std::nth_element(room.begin(), room.begin() + (k - 1), room.end(), std::greater<uint32_t>());
  return room[k - 1];
}

// chosen[i] = 1 where entry i is active.
void choose(const Select& s, const float* x, long width, uint8_t* chosen) {
  thread_local std::vector<uint32_t> keys, room;
  const long block = s.block, count = (width + block - 1) / block;
  keys.resize(up(count * block, 64));  // whole lines: loops that are whole vectors
  uint32_t* key = keys.data();
  if (s.importance)
    for (long i = 0; i < width; i++) key[i] = bits_of(x[i] * s.importance[i]);
  else
    for (long i = 0; i < width; i++) key[i] = bits_of(x[i]);
  for (long b = 0; block > 1 && b < count; b++) {
    uint32_t most = 0;
    for (long i = b * block; i < least((b + 1) * block, width); i++) most = key[i] > most ? key[i] : most;
    key[b] = most;
  }
  uint32_t from = bits_of((float)s.threshold);
  long ties = count;
  if (s.k) {
    const long k = least((s.k + block - 1) / block, count);
    from = kth_largest(key, count, k, room);
    long above = 0, equal = 0;
    for (long b = 0; b < count; b++) above += key[b] > from, equal += key[b] == from;
    ties = k - above < equal ? k - above : count;
  }
  if (block == 1 && ties == count) {
    for (long i = 0; i < width; i++) chosen[i] = key[i] >= from;
    return;
  }
  for (long b = 0; b < count; b++) {
    const bool own = key[b] > from || (key[b] == from && ties-- > 0);
    for (long i = b * block; i < least((b + 1) * block, width); i++) chosen[i] = own;
  }
}

// own[e] = `yes` where expert e is among the `best` of largest score, ties by the lower index, NaN being
// the largest; else 0.
template <class T>
void choose_experts(const float* scores, long experts, long best, T yes, std::vector<T>& own) {
  thread_local std::vector<int32_t> order;
  order.resize(experts);
  own.assign(experts, 0);
  for (long i = 0; i < experts; i++) order[i] = (int32_t)i;
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const float x = scores[a], y = scores[b];
    return x > y || (x != x && y == y);
  });
  for (long i = 0; i < best; i++) own[order[i]] = yes;
}

// Nothing but the count is found where that is above `limit`; without x the values are 1.
void gather(const float* x, long apart, long rows, long width, const uint8_t* chosen, long limit, Active& active) {
  const uint8_t* any = chosen;
  if (rows > 1) {
    active.any.assign(chosen, chosen + width);
    uint8_t* to = active.any.data();
    for (long r = 1; r < rows; r++)
      for (long i = 0; i < width; i++) to[i] |= chosen[r * width + i];
    any = to;
  }
  long count = 0;
  for (long i = 0; i < width; i++) count += any[i];
  active.count = count;
  if (count > limit) return;
  const long batches = (count + BATCH - 1) / BATCH;
  active.index.resize(batches * BATCH + 1);
  int32_t* index = active.index.data();
  for (long i = 0, n = 0; i < width; i++) {  // without a branch that nobody foresees
    index[n] = (int32_t)i;
    n += any[i];
  }
  for (long n = count; n < batches * BATCH; n++) index[n] = index[count - 1];
  active.value.assign(batches * BATCH * GROUP, 0.0f);
  for (long r = 0; r < rows; r++) {
    float* value = active.value.data() + r * BATCH;
    for (long n = 0; n < count; n++) {
      const long i = index[n];
      value[n / BATCH * GROUP * BATCH + n % BATCH] = !chosen[r * width + i] ? 0.0f : x ? x[r * apart + i] : 1.0f;
    }
  }
}

// Products ----------------------------------------------------------------------------------------

// y[r, from:to] += Σ over one batch of value[r][n]·w[index[n], from:to]
template <class T, int R>
INLINE void add_batch(const T* const* row, const T* const* next, const float* value, float* y, long apart,
                      long from, long to) {
  long j = from;
  for (; j + V <= to; j += V) {
    vec sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sum[r] = load(y + r * apart + j);
#pragma GCC unroll 8
    for (int n = 0; n < BATCH; n++) {
      const vec w = load(row[n] + j);
      if ((j * sizeof(T)) % 64 < V * sizeof(T)) _mm_prefetch((const char*)(next[n] + j), _MM_HINT_T0);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sum[r] += w * all(value[r * BATCH + n]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) store(y + r * apart + j, sum[r]);
  }
  for (; j < to; j++)
    for (int r = 0; r < R; r++) {
      float sum = y[r * apart + j];
      for (int n = 0; n < BATCH; n++) sum = std::fma(number(row[n] + j), value[r * BATCH + n], sum);
      y[r * apart + j] = sum;
    }
}

// y[r, from:to] = Σ value·w (·scale) (+ bias)
template <class T, int R>
__attribute__((noinline)) void add_rows(const T* weight, long out, const Active& active, const float* scale,
                                        const float* bias, float* y, long from, long to) {
  for (int r = 0; r < R; r++) std::fill(y + r * out + from, y + r * out + to, 0.0f);
  const long batches = (active.count + BATCH - 1) / BATCH;
  const T *row[BATCH], *next[BATCH];
  for (long b = 0; b < batches; b++) {
    const long ahead = b + 1 < batches ? b + 1 : b;
    for (int n = 0; n < BATCH; n++) {
      row[n] = weight + active.index[b * BATCH + n] * out;
      next[n] = weight + active.index[ahead * BATCH + n] * out;
    }
    add_batch<T, R>(row, next, active.value.data() + b * GROUP * BATCH, y, out, from, to);
  }
  for (int r = 0; r < R; r++)
    for (long j = from; j < to; j++) {
      float& to_ = y[r * out + j];
      if (scale) to_ *= scale[j];
      if (bias) to_ += bias[j];
    }
}

template <class T>
void add_rows(const T* weight, long out, const Active& active, const float* scale, const float* bias, float* y,
              long rows, long from, long to) {
  switch (rows) {
    case 1: return add_rows<T, 1>(weight, out, active, scale, bias, y, from, to);
    case 2: return add_rows<T, 2>(weight, out, active, scale, bias, y, from, to);
    case 3: return add_rows<T, 3>(weight, out, active, scale, bias, y, from, to);
    case 4: return add_rows<T, 4>(weight, out, active, scale, bias, y, from, to);
    case 5: return add_rows<T, 5>(weight, out, active, scale, bias, y, from, to);
    case 6: return add_rows<T, 6>(weight, out, active, scale, bias, y, from, to);
    case 7: return add_rows<T, 7>(weight, out, active, scale, bias, y, from, to);
    default: return add_rows<T, 8>(weight, out, active, scale, bias, y, from, to);
  }
}

// Below so many products one thread is done before a second one has woken up.
constexpr long ALONE = 1 << 16;

// add(from, to) over all outputs, of so many products in all.
template <class Add>
void over_strips(Parallel parallel, long threads, long out, long products, const Add& add) {
  threads = products < ALONE ? 1 : threads;
  const long strip = up(std::max(256L, (out + 2 * threads - 1) / (2 * threads)), 64);
  for_each(parallel, threads, (out + strip - 1) / strip, [&](long task) {
    add(task * strip, least((task + 1) * strip, out));
  });
}

template <class T>
void all_rows(Parallel parallel, long threads, const T* weight, long out, const Active& active, const float* scale,
              const float* bias, float* y, long rows) {
  over_strips(parallel, threads, out, active.count * out * rows, [&](long from, long to) {
    add_rows<T>(weight, out, active, scale, bias, y, rows, from, to);
  });
}


// R inner products of x with one row of w.
template <class T, int R>
INLINE void dots(const float* x, long in, const T* w, float* to) {
  constexpr int U = R == 1 ? 4 : R <= 4 ? 2 : 1;  // sums that wait for no other
  vec sum[U][R];
  for (int u = 0; u < U; u++)
    for (int r = 0; r < R; r++) sum[u][r] = all(0);
  long k = 0;
  for (; k + U * V <= in; k += U * V)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      const vec v = load(w + k + u * V);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sum[u][r] += v * load(x + r * in + k + u * V);
    }
  for (; k + V <= in; k += V) {
    const vec v = load(w + k);
    for (int r = 0; r < R; r++) sum[0][r] += v * load(x + r * in + k);
  }
  for (int r = 0; r < R; r++) {
    vec all_of = sum[0][r];
    for (int u = 1; u < U; u++) all_of += sum[u][r];
    to[r] = sum_of(all_of);
  }
  for (; k < in; k++)
    for (int r = 0; r < R; r++) to[r] = std::fma(x[r * in + k], number(w + k), to[r]);
}

template <class T>
void dots(const float* x, long rows, long in, const T* w, float* to) {
  switch (rows) {
    case 1: return dots<T, 1>(x, in, w, to);
    case 2: return dots<T, 2>(x, in, w, to);
    case 3: return dots<T, 3>(x, in, w, to);
    case 4: return dots<T, 4>(x, in, w, to);
    case 5: return dots<T, 5>(x, in, w, to);
    case 6: return dots<T, 6>(x, in, w, to);
    case 7: return dots<T, 7>(x, in, w, to);
    default: return dots<T, 8>(x, in, w, to);
  }
}

// Activations -------------------------------------------------------------------------------------

enum { RELU = 1, GELU, SILU, GELU_TANH };

INLINE float activated(float v, long then) {
  if (then == RELU) return v != v ? v : v > 0 ? v : 0;
  if (then == GELU) return 0.5f * v * (1 + std::erf(v * 0.70710678f));
  if (then == GELU_TANH) return 0.5f * v * (1 + std::tanh(0.79788456f * (v + 0.044715f * v * v * v)));
  if (then == SILU) return v / (1 + std::exp(-v));
  return v;
}

// Whole layers ------------------------------------------------------------------------------------

struct Room {
  std::vector<uint8_t> chosen;
  std::vector<float> hidden;
  Active active;
};

void find_active(Parallel parallel, long threads, const Select& select, const float* x, long rows, long width,
                 long limit, Room& room) {
  room.chosen.resize(rows * width);
  for_each(parallel, rows * width < 4096 ? 1 : threads, rows, [&](long r) {
    choose(select, x + r * width, width, room.chosen.data() + r * width);
  });
  gather(x, width, rows, width, room.chosen.data(), limit, room.active);
}

// `add` multiplies what is active in some rows of x: (their first one, how many); false where it cannot.
template <class Add>
bool by_rows(const Linear& c, Room& room, const Add& add) {
  *c.active = 0;
  for (long r = 0; r < c.rows; r += GROUP) {
    const long rows = least(GROUP, c.rows - r);
    find_active(c.parallel, c.threads, c.select, c.x + r * c.in, rows, c.in, c.limit, room);
    *c.active += room.active.count;
    if (room.active.count > c.limit || !add(r, rows)) return false;
  }
  return true;
}

template <class T>
bool linear(const Linear& c) {
  thread_local Room room;
  return by_rows(c, room, [&](long r, long rows) {
    all_rows<T>(c.parallel, c.threads, (const T*)c.weight, c.out, room.active, (const float*)c.scale, c.bias,
                c.y + r * c.out, rows);
    return true;
  });
}

bool linear4(const Linear& c) {
  thread_local Room room;
  const Levels levels = {(const uint8_t*)c.weight, c.scale, c.zero, c.out, c.group, c.floats != 0};
  return by_rows(c, room, [&](long r, long rows) {
    const Active& active = room.active;
    if (!moderate(active)) return false;
    over_strips(c.parallel, c.threads, c.out, active.count * c.out * rows, [&](long from, long to) {
      add_groups(levels, active, c.bias, c.y + r * c.out, rows, from, to);
    });
    return true;
  });
}

INLINE float finished(float sum, const float* scale, const float* bias, long n) {
  return sum * (scale ? scale[n] : 1) + (bias ? bias[n] : 0);
}

// A neuron of no expert, as a damaged file may have it, is never active.
INLINE bool is_expert(int32_t number, long experts) { return number >= 0 && number < experts; }

// Whether no group of rows has more than `limit` neurons in its experts: else those before it would be
// multiplied for nothing.
bool few_in_all_groups(const Gated& c) {
  std::vector<long> sizes(c.experts, 0);
  for (long n = 0; n < c.hidden; n++)
    if (is_expert(c.expert_of[n], c.experts)) sizes[c.expert_of[n]]++;
  std::vector<uint8_t> own, any;
  for (long r0 = 0; r0 < c.rows; r0 += GROUP) {
    any.assign(c.experts, 0);
    for (long r = r0; r < least(r0 + GROUP, c.rows); r++) {
      choose_experts<uint8_t>(c.scores + r * c.experts, c.experts, c.best, 1, own);
      for (long e = 0; e < c.experts; e++) any[e] |= own[e];
    }
    long count = 0;
    for (long e = 0; e < c.experts; e++) count += any[e] ? sizes[e] : 0;
    if (count > c.limit) return false;
  }
  return true;
}

template <class T>
bool gated(const Gated& c) {
  thread_local Room kept;
  Room& room = kept;
  *c.active = 0;
  if (c.scores && c.rows > GROUP && !few_in_all_groups(c)) return false;
  const long strip = std::max(4L, (32L << 10) / (long)(c.in * sizeof(T)));  // neurons in one piece of work
  const long threads = c.hidden * c.in < ALONE ? 1 : c.threads;
  for (long r0 = 0; r0 < c.rows; r0 += GROUP) {
    const long rows = least(GROUP, c.rows - r0);
    const float* x = c.x + r0 * c.in;
    const bool whole = !c.given && !c.scores;  // all of the gate is read
    if (whole) room.hidden.resize(rows * c.hidden);
    const float* hidden = c.given ? c.given + r0 * c.hidden : room.hidden.data();
    float* made = room.hidden.data();
    for_each(c.parallel, threads, whole ? (c.hidden + strip - 1) / strip : 0, [&](long task) {
      float found[GROUP];
      for (long n = task * strip; n < least((task + 1) * strip, c.hidden); n++) {
        if (c.screen)
          dots<int8_t>(x, rows, c.in, c.screen + n * c.in, found);
        else
          dots<T>(x, rows, c.in, (const T*)c.gate + n * c.in, found);
        const float* scale = c.screen ? c.screen_scale : c.gate_scale;
        for (long r = 0; r < rows; r++)
          made[r * c.hidden + n] = activated(finished(found[r], scale, c.gate_bias, n), c.then);
      }
    });
    if (c.scores) {
      room.chosen.resize(rows * c.hidden);
      thread_local std::vector<uint8_t> own;
      for (long r = 0; r < rows; r++) {
        choose_experts<uint8_t>(c.scores + (r0 + r) * c.experts, c.experts, c.best, 1, own);
        uint8_t* chosen = room.chosen.data() + r * c.hidden;
        for (long n = 0; n < c.hidden; n++)
          chosen[n] = is_expert(c.expert_of[n], c.experts) ? own[c.expert_of[n]] : 0;
      }
      gather(nullptr, 0, rows, c.hidden, room.chosen.data(), c.limit, room.active);
    } else
      find_active(c.parallel, c.threads, c.select, hidden, rows, c.hidden, c.limit, room);
    const bool later = c.screen || c.scores;  // the gate's rows in S
    Active& active = room.active;
    *c.active += active.count;
    if (room.active.count > c.limit) return false;
    for_each(c.parallel, threads, (active.count + strip - 1) / strip, [&](long task) {
      float found[GROUP], gates[GROUP];
      for (long i = task * strip; i < least((task + 1) * strip, active.count); i++) {
        const long n = active.index[i];
        if (later) dots<T>(x, rows, c.in, (const T*)c.gate + n * c.in, gates);
        if (c.up) dots<T>(x, rows, c.in, (const T*)c.up + n * c.in, found);
        float* value = active.value.data() + i / BATCH * GROUP * BATCH + i % BATCH;
        for (long r = 0; r < rows; r++) {
          if (!room.chosen[r * c.hidden + n]) continue;
          if (later) value[r * BATCH] = activated(finished(gates[r], c.gate_scale, c.gate_bias, n), c.then);
          if (c.up) value[r * BATCH] *= finished(found[r], c.up_scale, c.up_bias, n);
        }
      }
    });
    all_rows<T>(c.parallel, c.threads, (const T*)c.down, c.out, active, c.down_scale, c.bias, c.y + r0 * c.out, rows);
  }
  return true;
}

}  // namespace

extern "C" {

const char* sparse_isa() { return V == 16 ? "AVX-512" : "AVX2"; }

// Whether the layer was computed; where it was not, more than `limit` rows of w are active, or with
// weights of 4 bits something in x is too large.
int sparse_linear(const Linear* c) {
  return c->type == INT4 ? linear4(*c) : c->type == FLOAT ? linear<float>(*c) : c->type == BF16 ? linear<uint16_t>(*c) : linear<int8_t>(*c);
}

// One of many calls with the same weight: `fixed` has what does not change.
int sparse_run(const Linear* fixed, const float* x, float* y, long rows, double threshold, long limit, long threads) {
  Linear c = *fixed;
  int64_t active;
  c.x = x, c.y = y, c.active = &active, c.rows = rows, c.limit = limit, c.threads = threads;
  c.select.threshold = threshold;
  return sparse_linear(&c);
}

int sparse_gated(const Gated* c) {
  return c->type == FLOAT ? gated<float>(*c) : c->type == BF16 ? gated<uint16_t>(*c) : gated<int8_t>(*c);
}

// chosen[r, i] = 1 where entry i of row r is active.
void sparse_choose(const float* x, uint8_t* chosen, long rows, long width, const Select* select, Parallel parallel,
                   long threads) {
  for_each(parallel, rows * width < 4096 ? 1 : threads, rows, [&](long r) {
    choose(*select, x + r * width, width, chosen + r * width);
  });
}

// What lies there is in no cache afterwards.
void sparse_evict(const char* from, long bytes) {
  for (long i = 0; i < bytes; i += 64) _mm_clflush(from + i);
  if (bytes) _mm_clflush(from + bytes - 1);
  _mm_mfence();
}

// y[r, i] = x[r, i] where it is active, else 0.
void sparse_masked(const float* x, float* y, long rows, long width, const Select* select, Parallel parallel,
                   long threads) {
  const long some = std::max(1L, 4096 / width);  // rows in one piece of work
  for_each(parallel, rows * width < 16384 ? 1 : threads, (rows + some - 1) / some, [&](long task) {
    thread_local std::vector<uint8_t> chosen;
    chosen.resize(width);
    for (long r = task * some; r < least((task + 1) * some, rows); r++) {
      choose(*select, x + r * width, width, chosen.data());
      const float* from = x + r * width;
      const uint8_t* own = chosen.data();
      float* to = y + r * width;
      for (long i = 0; i < width; i++) to[i] = own[i] ? from[i] : 0.0f;
    }
  });
}

// The same with what is chosen by as of `sparse_run`.
void sparse_run_masked(const Linear* fixed, const float* x, float* y, long rows, double threshold, long threads) {
  Select own = fixed->select;
  own.threshold = threshold;
  sparse_masked(x, y, rows, fixed->in, &own, fixed->parallel, threads);
}

// The same in place, as bits, where the expert of neuron i is among the `best` of row r.
void sparse_keep_experts(uint32_t* y, long rows, long width, const float* scores, long experts, long best,
                         const int32_t* expert_of, Parallel parallel, long threads) {
  const long some = std::max(1L, 4096 / width);
  for_each(parallel, rows * width < 16384 ? 1 : threads, (rows + some - 1) / some, [&](long task) {
    thread_local std::vector<uint32_t> kept;
    for (long r = task * some; r < least((task + 1) * some, rows); r++) {
      choose_experts<uint32_t>(scores + r * experts, experts, best, ~0u, kept);
      const uint32_t* own = kept.data();
      uint32_t* to = y + r * width;
      for (long i = 0; i < width; i++) to[i] &= is_expert(expert_of[i], experts) ? own[expert_of[i]] : 0;
    }
  });
}
}

#ifdef SHIM  // as ops of compiled programs
#include "sparse_shim.h"
#endif
