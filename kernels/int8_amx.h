// Products of int8_cpu.cpp by AMX: 16 rows of x × 16 columns of the weight × 64 values of k in one
// instruction, eight times as many a cycle as by AVX-512-VNNI.
//
//   C[m,n] += Σ_k A[m,k]·B[k,n]      A 16 rows of 64 levels, as they lie in q
//                                    B 16 groups of 4 values of 16 columns, as they lie in a panel
//
// Of the eight tile registers four hold sums, of 32 rows × one panel. While they are made, the sums
// before them are finished: the one is the work of the tile unit, the other of the vector units.
//
// A thread has tiles between a `Tiles` and its end alone: while it has some, a change of threads
// saves 8 KB more. Linux lets a process have them when it asks.

#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {
namespace amx {

constexpr long TILE = 16;   // rows of a tile
constexpr long LEAST = 4;   // rows from which on it is faster than AVX-512-VNNI

static_assert(COLS == 2 * TILE && UNIT == 2 * TILE && DOT == 4, "a panel is two tiles wide");

// Whether this CPU has the instructions, and Linux lets this process use them.
inline bool ask() {
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned NEEDED = 1u << 24 | 1u << 25;  // AMX-TILE, AMX-INT8
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d & NEEDED) == NEEDED && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

inline bool allowed() {
  static const bool found = ask();
  return found;
}

inline std::atomic<bool>& wanted() {
  static std::atomic<bool> own{true};
  return own;
}

inline bool on() { return wanted().load(std::memory_order_relaxed) && allowed(); }

inline bool use(bool want) {
  wanted().store(want, std::memory_order_relaxed);
  return on();
}

// This thread's tiles, all of 16 rows of 64 bytes.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = TILE;
    asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");  // what is in q is in memory now
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
};

// Sums of up to 32 rows × one panel, and what they become.
struct Sums {
  alignas(64) int32_t sum[UNIT][COLS];
  const Row* row;
  long r, n, rows = 0, done = 0;

  template <int THEN>
  void finish(const Call& c, long to) {
    for (long j = 0; j < COLS && n + j < c.out; j += V) {
      const Columns columns(c, n + j);
      for (long m = done; m < to; m++)
        columns.finish(c, _mm512_load_si512(sum[m] + j), row[m], r + m, n + j, THEN);
    }
    done = to;
  }
  // The rows up to this one, where they are not finished yet.
  void finish_to(const Call& c, long to) {
    if (to > rows) to = rows;
    if (done >= to) return;
    switch (c.then) {
      case RELU: return finish<RELU>(c, to);
      case GELU: return finish<GELU>(c, to);
      case SILU: return finish<SILU>(c, to);
      case RELU6: return finish<RELU6>(c, to);
      case HARDSWISH: return finish<HARDSWISH>(c, to);
      default: return finish<NOTHING>(c, to);
    }
  }
};

// The sums of 16·H rows of q × the panel w, while `before` is finished.
template <int H>
INLINE void multiply(const Call& c, const level* q, long width, const int8_t* w, Sums& to, Sums& before) {
  const long steps = width / DEPTH, each = (before.rows + steps - 1) / steps;
  _tile_zero(0);
  _tile_zero(1);
  if (H > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long i = 0; i < steps; i++, q += DEPTH, w += DEPTH * COLS) {
    _tile_loadd(6, w, COLS * DOT);
    _tile_loadd(4, q, width);
    _tile_loadd(7, w + TILE * DOT, COLS * DOT);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    if (H > 1) {
      _tile_loadd(5, q + TILE * width, width);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    before.finish_to(c, (i + 1) * each);
  }
  _tile_stored(0, to.sum[0], COLS * sizeof(int32_t));
  _tile_stored(1, to.sum[0] + TILE, COLS * sizeof(int32_t));
  if (H > 1) {
    _tile_stored(2, to.sum[TILE], COLS * sizeof(int32_t));
    _tile_stored(3, to.sum[TILE] + TILE, COLS * sizeof(int32_t));
  }
}

// Whether so many rows of x are multiplied here.
INLINE bool takes(const Call& c, long width, long count) {
  return count >= LEAST && width % DEPTH == 0 && on();
}

// Rows [r, r + count) of y in the columns of these panels.
void block(const Call& c, const level* q, long width, const Row* row, long r, long count, long panel,
           long end) {
  Sums sums[2];
  int at = 0;
  {
    const Tiles own;
    for (long p = panel; p < end; p++) {
      const int8_t* w = c.weight + p * width * COLS;
      for (long m = 0; m < count; m += UNIT, at ^= 1) {
        const long rows = least(UNIT, count - m);
        Sums &now = sums[at], &before = sums[at ^ 1];
        if (rows > TILE)
          multiply<2>(c, q + m * width, width, w, now, before);
        else
          multiply<1>(c, q + m * width, width, w, now, before);
        now.row = row + m, now.r = r + m, now.n = p * COLS, now.rows = rows, now.done = 0;
      }
    }
  }
  sums[at ^ 1].finish_to(c, UNIT);
}

}  // namespace amx
}  // namespace
