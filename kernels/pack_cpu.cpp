// Groups of values as 8-bit integers, and back, in one pass over memory.
//
//   pack     s = (hi − lo)/255,  q = ⌊(x − lo)/s + u⌋ per group of 128      u uniform in [0, 1)
//   unpack   x = s q + lo
//
// A group is a row of FBGEMM's format: its integers, then s and lo in float32. u is a hash of the
// value's place and of the call's seed, so that it depends on no number of threads and is read from
// nowhere: drawn by a generator it would take longer than all the rest.
//
// Source of the hash: C. Wellons, "Prospecting for Hash Functions" (2018), lowbias32.
//
// Plain C++17 with the vector extensions of GCC and Clang; threads as threads.h has them.

#include <cstdint>
#include <cstring>

#include "threads.h"

namespace {

constexpr long GROUP = 128, ROW = GROUP + 8;
constexpr long TASK = 256;  // groups that a thread takes at once
constexpr int V = 8;

typedef float vec __attribute__((vector_size(V * 4)));
typedef float vec_u __attribute__((vector_size(V * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(V * 4), may_alias));
typedef uint32_t bits __attribute__((vector_size(V * 4)));

struct Call {
  const void* from;
  void* to;
  Parallel parallel;
  int64_t values, threads, seed;
};

inline vec uniform(bits place) {
  place ^= place >> 16;
  place *= 0x21f0aaadu;
  place ^= place >> 15;
  place *= 0x735a2d97u;
  place ^= place >> 15;
  return __builtin_convertvector((ints)(place >> 8), vec) * 0x1p-24f;
}

// NaN spoils its group: no comparison with it holds, so it is looked for by x != x.
void pack_group(const float* x, uint8_t* q, uint32_t first) {
  vec low = *(const vec_u*)x, high = low;
  ints odd = low != low;
  for (long i = V; i < GROUP; i += V) {
    const vec now = *(const vec_u*)(x + i);
    low = now < low ? now : low;
    high = now > high ? now : high;
    odd |= now != now;
  }
  float lo = low[0], hi = high[0];
  int32_t spoiled = odd[0];
  for (int i = 1; i < V; i++) {
    lo = low[i] < lo ? low[i] : lo;
    hi = high[i] > hi ? high[i] : hi;
    spoiled |= odd[i];
  }
  const float scale = spoiled ? __builtin_nanf("") : (hi - lo) / 255.0f;
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  alignas(V * 4) int32_t levels[GROUP];  // GCC narrows a loop over memory well, and vectors badly
  bits place = {0, 1, 2, 3, 4, 5, 6, 7};
  place += first;
  for (long i = 0; i < GROUP; i += V) {
    vec level = (*(const vec_u*)(x + i) - lo) * inverse + (scale > 0 ? uniform(place) : vec{});
    // also where infinity or NaN made it anything: to convert those would be undefined
    level = level >= 0.0f ? level : vec{};
    level = level <= 255.0f ? level : vec{} + 255.0f;
    *(ints*)(levels + i) = __builtin_convertvector(level, ints);
    place += V;
  }
  for (long i = 0; i < GROUP; i++) q[i] = (uint8_t)levels[i];
  memcpy(q + GROUP, &scale, 4);
  memcpy(q + GROUP + 4, &lo, 4);
}

void unpack_group(const uint8_t* q, float* x) {
  float scale, lo;
  memcpy(&scale, q + GROUP, 4);
  memcpy(&lo, q + GROUP + 4, 4);
  for (long i = 0; i < GROUP; i++) x[i] = (float)(int32_t)q[i] * scale + lo;
}

// The last group may be short: its last value once more widens no range.
void pack_some(const Call& c, long begin, long end) {
  const auto* x = (const float*)c.from;
  auto* q = (uint8_t*)c.to;
  for (long g = begin; g < end; g++) {
    const long first = g * GROUP, left = c.values - first;
    const uint32_t place = (uint32_t)first + (uint32_t)c.seed * 0x9e3779b9u;
    if (left >= GROUP) {
      pack_group(x + first, q + g * ROW, place);
    } else {
      float whole[GROUP];
      for (long i = 0; i < GROUP; i++) whole[i] = x[first + (i < left ? i : left - 1)];
      pack_group(whole, q + g * ROW, place);
    }
  }
}

void unpack_some(const Call& c, long begin, long end) {
  const auto* q = (const uint8_t*)c.from;
  auto* x = (float*)c.to;
  for (long g = begin; g < end; g++) {
    const long first = g * GROUP, left = c.values - first;
    if (left >= GROUP) {
      unpack_group(q + g * ROW, x + first);
    } else {
      float whole[GROUP];
      unpack_group(q + g * ROW, whole);
      memcpy(x + first, whole, left * 4);
    }
  }
}

typedef void (*Some)(const Call&, long, long);

void all(const Call* call, Some some) {
  const long groups = (call->values + GROUP - 1) / GROUP;
  for_each(call->parallel, call->threads, (groups + TASK - 1) / TASK, [&](long task) {
    const long first = task * TASK;
    some(*call, first, first + TASK < groups ? first + TASK : groups);
  });
}

}  // namespace

extern "C" {
void pack_groups(const Call* call) { all(call, pack_some); }
void unpack_groups(const Call* call) { all(call, unpack_some); }
}
