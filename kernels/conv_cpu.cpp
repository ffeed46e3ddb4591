// Depthwise convolutions on a CPU, between two products over channels or by themselves.
//
//   m[h,w,:] = first(x[h,w,:])                          a product, or x itself
//   d[h,w,c] = f(Σ_ij m[h·s − top + i·d, w·s − left + j·d, c]·weight[i,j,c]·scale[c] + bias[c])
//   y[h,w,:] = last(d[h,w,:]) + add[h,w,:]              a product, or d itself
//
// where f is nothing, ReLU, SiLU, ReLU6 or hardswish, and what lies outside of m is zero. Channels lie
// beside each other. A few rows of m and of d at a time are in the second-level cache, where one step
// leaves them for the next: they are never in memory as a whole.
//
// With levels, m is rounded before by the range of its image, s and z as in int8_conv.py, and the
// weights are whole numbers: Σ over m/s, exact in float32. All of m is made before its range is known.
//
// The products are int8_rows of int8_cpu.cpp. Vector extensions of GCC and Clang, threads as threads.h
// has them. A sum is made by one thread in one order: results do not depend on the number of threads.

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "threads.h"
#include "vectors.h"

namespace {

constexpr int SUMS = V;  // in registers, half of those that there are
constexpr int WIDTH = 4;                 // vectors of channels at a time
constexpr long CACHE = 96 * 1024;        // floats of m and d that stay in the second-level cache
constexpr long KEPT = 1 << 22;           // floats of m that a thread keeps from call to call
constexpr double LARGE = 1e30;           // a step above which sums may be beyond float32

typedef int64_t (*Product)(const void*, const float*, float*, const float*, int64_t);

}  // namespace

// The arguments, as Python fills them in (kernels/conv_cpu.py: _Call) ------------------------------

struct Call {
  const float* x;      // [images, height, width, in]
  float* y;            // [images, out_height, out_width, out]
  const float* add;    // as y, or null
  const void *first, *last;  // what `product` multiplies by, or null
  Product product;
  const float* weight;  // [channels/V, taps, V], zeros behind the last channel
  const float* scale;   // [channels] up to a multiple of V, or null: with levels
  const float* bias;    // the same, or null
  Parallel parallel;
  int64_t images, height, width, in, channels, out, out_height, out_width;
  int64_t taps_high, taps_wide, stride_high, stride_wide, step_high, step_wide, top, left;
  int64_t then, threads;
};

namespace {

enum Then { NOTHING, RELU, GELU, SILU, RELU6, HARDSWISH };  // as int8_cpu.cpp

INLINE vec finished(long then, vec y) {
  if (then == RELU) return at_least(y, 0);
  if (then == RELU6) return at_most(at_least(y, 0), 6);
  if (then == HARDSWISH) return y * at_most(at_least(y + 3, 0), 6) * (1.0f / 6);
  if (then == SILU) {
    const vec e = exponential(y < 0 ? y : -y), p = 1 / (1 + e);
    return y * (y < 0 ? e * p : p);
  }
  return y;
}

// Memory of a thread, kept from call to call where it is not much.
struct Buffer {
  void* held = nullptr;
  long size = 0;
  float* of(long floats) {
    const long bytes = up(floats * (long)sizeof(float), 64);
    if (size < bytes) {
      free(held);
      held = aligned_alloc(64, size = bytes);
      if (!held) std::abort();
    }
    return (float*)held;
  }
  ~Buffer() { free(held); }
};

// The rows of m that one row of outputs reads, and the weights of each.
struct Rows {
  const float* x[32];
  long tap[32];
  int count = 0;
};

// Sums of P pixels × Q vectors of channels over the taps [from, to) of each row.
template <int P, int Q, bool PART>
INLINE void pixels(const Call& c, const Rows& rows, long from, long to, long at, long channel, float* y) {
  const long taps = c.taps_high * c.taps_wide, next = c.stride_wide * c.channels;
  const long part = PART ? c.channels - channel : V;
  const float* weight = c.weight + channel * taps;
  vec sum[P][Q];
  for (int p = 0; p < P; p++)
    for (int q = 0; q < Q; q++) sum[p][q] = vec{};
  for (int i = 0; i < rows.count; i++) {
    const float* x = rows.x[i] + (at * c.stride_wide - c.left) * c.channels + channel;
    for (long j = from; j < to; j++) {
      const float *w = weight + (rows.tap[i] + j) * V, *m = x + j * c.step_wide * c.channels;
      vec k[Q];
      for (int q = 0; q < Q; q++) k[q] = load(w + q * taps * V);
      for (int p = 0; p < P; p++)
        for (int q = 0; q < Q; q++)
          sum[p][q] += (PART ? load(m + p * next, part) : load(m + p * next + q * V)) * k[q];
    }
  }
  for (int q = 0; q < Q; q++) {
    const long n = channel + q * V;
    const vec bias = c.bias ? load(c.bias + n) : vec{};
    for (int p = 0; p < P; p++) {
      const vec v = finished(c.then, (c.scale ? sum[p][q] * load(c.scale + n) : sum[p][q]) + bias);
      float* to_pixel = y + (at + p) * c.channels + n;
      PART ? store(to_pixel, v, part) : store(to_pixel, v);
    }
  }
}

template <int P, int Q, bool PART>
INLINE void up_to(const Call& c, const Rows& rows, long at, long end, long channel, float* y) {
  for (; at + P <= end; at += P) pixels<P, Q, PART>(c, rows, 0, c.taps_wide, at, channel, y);
  if constexpr (P > 1)
    if (at < end) up_to<P / 2, Q, PART>(c, rows, at, end, channel, y);
}

// One row of outputs in Q vectors of channels.
template <int Q, bool PART>
__attribute__((noinline)) void group(const Call& c, const Rows& rows, long channel, float* y) {
  const long reach = (c.taps_wide - 1) * c.step_wide, s = c.stride_wide;
  const long begin = least((c.left + s - 1) / s, c.out_width);
  long end = c.width - 1 + c.left - reach;
  end = end < 0 ? begin : least(end / s + 1, c.out_width);
  if (end < begin) end = begin;
  up_to<SUMS / Q, Q, PART>(c, rows, begin, end, channel, y);
  for (long at = 0; at < c.out_width; at++) {
    if (at == begin) at = end;
    if (at >= c.out_width) break;
    const long start = at * s - c.left, d = c.step_wide;
    const long from = start < 0 ? (-start + d - 1) / d : 0;
    const long to = c.width > start ? least((c.width - start + d - 1) / d, c.taps_wide) : 0;
    pixels<1, Q, PART>(c, rows, from, to, at, channel, y);
  }
}

// Row h of the outputs, where row r of m lies at m + r·width·channels.
void depthwise(const Call& c, const float* m, long h, float* y) {
  Rows rows;
  for (long i = 0; i < c.taps_high; i++) {
    const long r = h * c.stride_high - c.top + i * c.step_high;
    if (r < 0 || r >= c.height) continue;
    rows.x[rows.count] = m + r * c.width * c.channels;
    rows.tap[rows.count++] = i * c.taps_wide;
  }
  long channel = 0;
  for (; channel + WIDTH * V <= c.channels; channel += WIDTH * V)
    group<WIDTH, false>(c, rows, channel, y);
  if (channel + 2 * V <= c.channels) group<2, false>(c, rows, channel, y), channel += 2 * V;
  if (channel + V <= c.channels) group<1, false>(c, rows, channel, y), channel += V;
  if (channel < c.channels) group<1, true>(c, rows, channel, y);
}

// Levels ------------------------------------------------------------------------------------------

struct Range {
  float low = 0, high = 0;
  bool bad = false;  // a value is NaN or infinite
  void add(const Range& other) {
    low = other.low < low ? other.low : low;
    high = other.high > high ? other.high : high;
    bad |= other.bad;
  }
};

Range range_of(const float* x, long n) {
  vec low{}, high{}, spoiled{};
  long i = 0;
  for (; i + V <= n; i += V) {
    const vec v = load(x + i);
    low = v < low ? v : low, high = v > high ? v : high;
    spoiled += v * 0;  // NaN where any is NaN or infinite
  }
  if (i < n) {
    const vec v = load(x + i, n - i);
    low = v < low ? v : low, high = v > high ? v : high;
    spoiled += v * 0;
  }
  Range found;
  for (int j = 0; j < V; j++) found.add({low[j], high[j], !(spoiled[j] == 0)});
  return found;
}

// What rounds to 256 levels, one of which is zero.
struct Levels {
  double step;
  float inverse, half, zero;
  bool bad;

  explicit Levels(const Range& r) {
    step = ((double)r.high - r.low + 1e-8) / 255;
    bad = r.bad || !(step <= LARGE);
    const double z = __builtin_nearbyint(-r.low / step);
    inverse = (float)(1 / step), half = (float)(z + 0.5), zero = (float)z;
  }

  // ⌊x/s + z + ½⌋, within 0 … 255
  INLINE ints of(vec x) const {
    return __builtin_convertvector(at_most(at_least(x * inverse + half, 0), 255.5f), ints);
  }

  void centered(const float* x, long n, float* y) const {
    long i = 0;
    for (; i + V <= n; i += V) store(y + i, __builtin_convertvector(of(load(x + i)), vec) - zero);
    if (i < n) store(y + i, __builtin_convertvector(of(load(x + i, n - i)), vec) - zero, n - i);
  }
};

// Rows of images ----------------------------------------------------------------------------------

// Rows [from, to) of the outputs of one image. With levels, all of m is `made` already.
bool strip(const Call& c, long image, long from, long to, const float* made, const Levels* levels) {
  static thread_local Buffer of_m, of_d;
  const long row = c.width * c.channels, out_row = c.out_width * c.channels;
  const long reach = (c.taps_high - 1) * c.step_high + 1;
  const bool direct = !levels && !c.first;  // m is x
  long size = 1;
  while (size < to - from && (size * c.stride_high + reach) * row * !direct + (size + 1) * out_row < CACHE)
    size++;
  const float* x = c.x + image * c.height * c.width * c.in;
  float* band = direct ? nullptr : of_m.of(((size - 1) * c.stride_high + reach) * row);
  float* y = c.y + image * c.out_height * c.out_width * c.out;
  const float* add = c.add ? c.add + image * c.out_height * c.out_width * c.out : nullptr;
  float* d = c.last ? of_d.of(size * out_row) : nullptr;
  bool bad = false;
  long held = 0, held_to = 0;  // rows of m in the band
  for (long h = from; h < to; h += size) {
    const long count = least(size, to - h);
    long low = h * c.stride_high - c.top, high = (h + count - 1) * c.stride_high - c.top + reach;
    low = low < 0 ? 0 : least(low, c.height), high = high < low ? low : least(high, c.height);
    const float* m = made ? made : x;
    if (!direct) {
      const long kept = held_to > low ? held_to - low : 0, next = low + kept;
      if (kept) memmove(band, band + (low - held) * row, kept * row * sizeof(float));
      if (next < high) {
        float* to_rows = band + kept * row;
        if (levels)
          levels->centered(m + next * row, (high - next) * row, to_rows);
        else
          bad |= c.product(c.first, x + next * c.width * c.in, to_rows, nullptr, (high - next) * c.width);
      }
      held = low, held_to = next > high ? next : high;
      m = band - low * row;
    }
    float* rows = c.last ? d : y + h * out_row;
    for (long i = 0; i < count; i++) depthwise(c, m, h + i, rows + i * out_row);
    if (c.last) {
      const long skip = h * c.out_width * c.out;
      bad |= c.product(c.last, d, y + skip, add ? add + skip : nullptr, count * c.out_width);
    }
  }
  return bad;
}

// The strips of one image or of all, each by one thread.
bool strips(const Call& c, long first_image, long images, const float* made, const Levels* levels) {
  const long each = images % c.threads ? least(c.threads, c.out_height) : 1;
  std::atomic<long> spoiled{0};
  for_each(c.parallel, c.threads, images * each, [&](long task) {
    const long i = task % each;
    const long from = c.out_height * i / each, to = c.out_height * (i + 1) / each;
    if (strip(c, first_image + task / each, from, to, made, levels))
      spoiled.store(1, std::memory_order_relaxed);
  });
  return spoiled.load();
}

// With levels, image by image: all of m and its range, then what comes behind.
bool by_levels(const Call& c) {
  static thread_local Buffer kept;
  Buffer once;  // of much memory, which no thread keeps
  Buffer& of_m = c.height * c.width * c.channels < KEPT ? kept : once;
  const long pixels = c.height * c.width, size = least(pixels, 1 + CACHE / 2 / c.channels);
  const long tasks = (pixels + size - 1) / size;
  float* m = c.first ? of_m.of(pixels * c.channels) : nullptr;
  Range* found = (Range*)malloc(tasks * sizeof(Range));
  float* scales = (float*)malloc(up(c.channels, V) * sizeof(float));
  if (!found || !scales) std::abort();
  std::atomic<long> spoiled{0};
  for (long image = 0; image < c.images && !spoiled.load(); image++) {
    const float* x = c.x + image * pixels * c.in;
    for_each(c.parallel, c.threads, tasks, [&](long task) {
      const long p = task * size, count = least(size, pixels - p);
      if (m && c.product(c.first, x + p * c.in, m + p * c.channels, nullptr, count))
        spoiled.store(1, std::memory_order_relaxed);
      found[task] = range_of((m ? m : x) + p * c.channels, count * c.channels);
    });
    Range range;
    for (long i = 0; i < tasks; i++) range.add(found[i]);
    const Levels levels(range);
    if (levels.bad || spoiled.load()) {
      spoiled.store(1);
      break;
    }
    for (long n = 0; n < up(c.channels, V); n++) scales[n] = (float)levels.step * c.scale[n];
    Call own = c;
    own.scale = scales;
    if (strips(own, image, 1, m ? m : x, &levels)) spoiled.store(1);
  }
  free(found), free(scales);
  return spoiled.load();
}

}  // namespace

extern "C" {

int64_t conv_lanes() { return V; }

int64_t conv_most_rows() { return sizeof(Rows::x) / sizeof(float*); }

// 1 where a value is not finite, or a range beyond float32's: y is not to be used then.
int64_t conv_chain(const Call* call) {
  return call->scale ? by_levels(*call) : strips(*call, 0, call->images, nullptr, nullptr);
}

// The levels of n numbers by their own range, q[i] = ⌊x[i]/s + z + ½⌋; s, or NaN where they have
// none.
double conv_levels(const float* x, int64_t n, uint8_t* q, int64_t* zero, Parallel parallel, int64_t threads) {
  const long size = 1 << 14, tasks = (n + size - 1) / size;
  Range* found = (Range*)malloc(tasks * sizeof(Range));
  if (!found) std::abort();
  for_each(parallel, threads, tasks, [&](long i) {
    found[i] = range_of(x + i * size, least(size, n - i * size));
  });
  Range range;
  for (long i = 0; i < tasks; i++) range.add(found[i]);
  free(found);
  const Levels levels(range);
  if (range.bad) return __builtin_nan("");
  *zero = (int64_t)levels.zero;
  for_each(parallel, threads, tasks, [&](long task) {
    const long to = least(n, (task + 1) * size);
    long i = task * size;
    for (; i + V <= to; i += V) {
      typedef uint8_t bytes __attribute__((vector_size(V)));
      const bytes b = __builtin_convertvector(levels.of(load(x + i)), bytes);
      memcpy(q + i, &b, V);
    }
    for (; i < to; i++) q[i] = (uint8_t)levels.of(all(x[i]))[0];
  });
  return levels.step;
}
}
