// Products of int8_cpu.cpp by AMX: 16 rows of x × 16 columns of the weight × 64 values of k in one
// instruction, eight times as many a cycle as by AVX-512-VNNI.
//
//   C[m,n] += Σ_k A[m,k]·B[k,n]      A 16 rows of 64 levels, as they lie in q
//                                    B 16 groups of 4 values of 16 columns, as they lie in a panel
//
// Of the eight tile registers four hold sums, of 32 rows × one panel, which takes as long as the four
// loads that it needs for each step of k. Sums are finished from the nearest cache.

#pragma once

#include "amx.h"

namespace {
namespace amx {

constexpr long LEAST = 4;  // rows from which on it is faster than AVX-512-VNNI

static_assert(COLS == 2 * TILE && UNIT == 2 * TILE && DOT == 4, "a panel is two tiles wide");

// The sums of 16·H rows of q × the panel w.
template <int H>
INLINE void multiply(const level* q, long width, const int8_t* w, int32_t (*sum)[COLS]) {
  _tile_zero(0);
  _tile_zero(1);
  if (H > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long k = 0; k < width; k += DEPTH, w += DEPTH * COLS) {
    _tile_loadd(6, w, COLS * DOT);
    _tile_loadd(4, q + k, width);
    _tile_loadd(7, w + TILE * DOT, COLS * DOT);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    if (H > 1) {
      _tile_loadd(5, q + TILE * width + k, width);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_stored(0, sum[0], COLS * sizeof(int32_t));
  _tile_stored(1, sum[0] + TILE, COLS * sizeof(int32_t));
  if (H > 1) {
    _tile_stored(2, sum[TILE], COLS * sizeof(int32_t));
    _tile_stored(3, sum[TILE] + TILE, COLS * sizeof(int32_t));
  }
}

// What sums of so many rows become, in V columns from n on.
template <int THEN>
__attribute__((noinline)) void finish(const Call& c, const int32_t (*sum)[COLS], const Row* row, long r, long n,
                                      long rows) {
  for (long j = 0; j < COLS && n + j < c.out; j += V) {
    const Columns columns(c, row[0], r, n + j);
    for (long m = 0; m < rows; m++) columns.finish(_mm512_load_si512(sum[m] + j), row[m], m, THEN);
  }
}

// Whether so many rows of x are multiplied here.
INLINE bool takes(const Call& c, long width, long count) {
  return count >= LEAST && width % DEPTH == 0 && on();
}

// Rows [r, r + count) of y in the columns of these panels.
void block(const Call& c, const level* q, long width, const Row* row, long r, long count, long panel,
           long end) {
  const auto then = c.then == RELU ? finish<RELU> : c.then == GELU ? finish<GELU>
                    : c.then == SILU ? finish<SILU> : c.then == RELU6 ? finish<RELU6>
                    : c.then == HARDSWISH ? finish<HARDSWISH> : finish<NOTHING>;
  alignas(64) int32_t sum[UNIT][COLS];
  const Tiles own;  // q is in memory now
  for (long p = panel; p < end; p++) {
    const int8_t* w = c.weight + p * width * COLS;
    for (long m = 0; m < count; m += UNIT) {
      const long rows = least(UNIT, count - m);
      if (rows > TILE)
        multiply<2>(q + m * width, width, w, sum);
      else
        multiply<1>(q + m * width, width, w, sum);
      then(c, sum, row + m, r + m, p * COLS, rows);
    }
  }
}

}  // namespace amx
}  // namespace
