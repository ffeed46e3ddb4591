// Tile registers of AMX for the C++ kernels: whether a process may use them, and a thread's own.
//
// Linux lets a process have them when it asks, and refuses where a thread has too little room for
// signals. A thread has tiles between a `Tiles` and its end alone: while it has some, a change of
// threads saves 8 KB more.

#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace {
namespace amx {

constexpr long TILE = 16;  // rows of a tile, of 64 bytes each

// Whether this CPU has the instructions, and Linux lets this process use them.
inline bool ask() {
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned NEEDED = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;              // ARCH_REQ_XCOMP_PERM, XTILEDATA
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
  const bool held;

  explicit Tiles(bool held = true) : held(held) {
    if (!held) return;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = TILE;
    asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() {
    if (held) asm volatile("tilerelease" ::: "memory");
  }
};

// What a tile is loaded from is in memory by now: the compiler does not know that it reads.
inline void written() { asm volatile("" ::: "memory"); }

}  // namespace amx
}  // namespace
