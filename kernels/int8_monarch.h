// Monarch layers with 8-bit factors, the last part of int8_cpu.cpp: both products in one call.
//
//   mid[r,l,(k,j)] = s·Σ_i q(x[r, k·ib + i])·right[k,(l,j),i] + …        block by block, as int8_linear
//   y[r, l·ob + n] = f(s·Σ_(k,j) q(mid[r,l,(k,j)])·left[l,n,(k,j)] + …)  has it, with K inputs' blocks
//   y[r, n·L + l]  where they are interleaved                            and L outputs' blocks
//
// A thread takes a few rows through both factors while they are in its cache; of fewer rows than
// that, threads share the columns of each factor.

#pragma once

// The arguments, as Python fills them in (kernels/int8_monarch_cpu.py: _Call).
struct Monarch {
  const float* x;             // [rows, in]
  const int8_t* right;        // K times int8_pack of [(l, j), ib]
  const float* right_scale;   // [K, (l, j)]
  const int32_t* right_sums;  // [K, (l, j)]
  const int8_t* left;         // L times int8_pack of [ob, (k, j)]
  const float* left_scale;    // [L, ob]
  const int32_t* left_sums;   // [L, ob]
  const float* bias;          // [L, ob] or null
  const float* add;           // [rows, out] or null
  const float* norm_weight;   // [out] or null
  const float* norm_bias;     // [out] or null
  float* y;                   // [rows, out]
  Parallel parallel;
  int64_t rows, in, out, inputs, outputs, rank, interleaved, then, one_range, norm, threads;
  double eps;
};

namespace {

INLINE long larger(long a, long b) { return a > b ? a : b; }

// The sizes that follow from a Monarch's.
struct Sizes {
  long ib, ob, middle, gathered;  // columns of: a block of x, one of y, one of mid as it is made,
                                  // and as it is read
  bool direct;                    // panels of y's blocks lie in y side by side
  explicit Sizes(const Monarch& m)
      : ib((m.in + m.inputs - 1) / m.inputs), ob((m.out + m.outputs - 1) / m.outputs),
        middle(m.outputs * m.rank), gathered(m.inputs * m.rank),
        direct(m.outputs == 1 || (!m.interleaved && ob % COLS == 0)) {}
};

// s and the zero point of all that a factor multiplies, where it has one range.
struct OneRange {
  double step;
  int64_t zero;
};

// Memory for `most` rows; what blocks must not share where they run at the same time lies apart.
struct Room {
  long most, aside_size, z_size, q_size;
  float *mid, *aside, *z;
  char* q;

  static long floats(const Monarch& m, long most, bool apart) {
    const Sizes n(m);
    const long inputs = apart ? m.inputs : 1, outputs = apart ? m.outputs : 1;
    return most * (m.inputs * n.middle + larger(inputs, outputs) * larger(n.ib, n.gathered) +
                   outputs * n.ob);
  }
  static long bytes(const Monarch& m, long most, bool apart) {
    const Sizes n(m);
    return (apart ? larger(m.inputs, m.outputs) : 1) * each(n, most);
  }
  Room(const Monarch& m, long most, bool apart, void* floats, void* bytes) : most(most) {
    const Sizes n(m);
    const long slots = apart ? larger(m.inputs, m.outputs) : 1;
    aside_size = apart ? most * larger(n.ib, n.gathered) : 0, z_size = apart ? most * n.ob : 0;
    q_size = apart ? each(n, most) : 0;
    mid = (float*)floats, aside = mid + most * m.inputs * n.middle;
    z = aside + slots * most * larger(n.ib, n.gathered), q = (char*)bytes;
  }

 private:
  static long each(const Sizes& n, long most) {
    return up(int8_scratch(most, larger(n.ib, n.gathered)), 64);
  }
};

// A product with one block of a factor: its rows quantized, and the panels that they meet.
struct Block {
  Call call;
  Rows rows;
  long count, first, panels;
  bool bad;

  Block(const Call& c, void* q, long count, long first, long panels)
      : call(c), rows(c, q, count), count(count), first(first), panels(panels),
        bad(rows.quantize(c, c.x, 0, count, 0)) {}

  void multiply(long from, long to) const {
    block(call, rows.q, width_of(call.in), rows.row, 0, count, first + from, first + to);
  }
};

// Of few values: a call of memcpy would take longer.
INLINE void copy(float* to, const float* from, long n) {
  for (long i = 0; i < n; i += V) store(to + i, load(from + i, first(n - i)), first(n - i));
}

Call product(const Monarch& m, const float* x, long stride, long in, const OneRange& range) {
  Call c = {};
  c.x = x, c.stride = stride, c.in = in, c.parallel = m.parallel, c.threads = 1;
  c.one_range = m.one_range, c.step = range.step, c.zero = range.zero;
  return c;
}

// Block k of x times that of right: rows of x, `count` from this one on.
Block right_block(const Monarch& m, const Room& room, const float* x, long count, long k,
                  const OneRange& range) {
  const Sizes n(m);
  long apart = m.in;
  const float* from = x + k * n.ib;
  if ((k + 1) * n.ib > m.in) {  // the formula has zeros behind x
    float* padded = room.aside + k * room.aside_size;
    const long real = m.in > k * n.ib ? m.in - k * n.ib : 0;
    for (long r = 0; r < count; r++) {
      if (real) memcpy(padded + r * n.ib, from + r * m.in, real * sizeof(float));
      memset(padded + r * n.ib + real, 0, (n.ib - real) * sizeof(float));
    }
    from = padded, apart = n.ib;
  }
  Call c = product(m, from, apart, n.ib, range);
  c.weight = m.right + k * int8_packed_size(n.middle, n.ib), c.out = n.middle;
  c.scale = m.right_scale + k * n.middle, c.sums = m.right_sums + k * n.middle;
  c.y = room.mid + k * room.most * n.middle;
  return Block(c, room.q + k * room.q_size, count, 0, (n.middle + COLS - 1) / COLS);
}

// Block l of mid, whose pieces are put together, times that of left.
Block left_block(const Monarch& m, const Room& room, float* y, const float* add, long count, long l,
                 const OneRange& range) {
  const Sizes n(m);
  float* row = room.aside + l * room.aside_size;
  const float* pieces = room.mid + l * m.rank;
  for (long r = 0; r < count; r++, row += n.gathered)
    for (long k = 0; k < m.inputs; k++)
      copy(row + k * m.rank, pieces + (k * room.most + r) * n.middle, m.rank);
  Call c = product(m, room.aside + l * room.aside_size, n.gathered, n.gathered, range);
  c.then = m.then;
  const long panels = (n.ob + COLS - 1) / COLS;
  void* q = room.q + l * room.q_size;
  if (n.direct) {  // the panels of all blocks, one after the other, are those of one wide product
    c.weight = m.left, c.scale = m.left_scale, c.sums = m.left_sums, c.bias = m.bias;
    c.out = m.out, c.y = y, c.add = add;
    return Block(c, q, count, l * panels, panels);
  }
  c.weight = m.left + l * int8_packed_size(n.ob, n.gathered), c.out = n.ob;
  c.scale = m.left_scale + l * n.ob, c.sums = m.left_sums + l * n.ob;
  c.bias = m.bias ? m.bias + l * n.ob : nullptr, c.y = room.z + l * room.z_size;
  return Block(c, q, count, 0, panels);
}

// Block l of y from where the product has left it, with what is added.
void place(const Monarch& m, const Room& room, float* y, const float* add, long count, long l) {
  const Sizes n(m);
  if (n.direct) return;
  const float* z = room.z + l * room.z_size;
  const long start = m.interleaved ? l : l * n.ob, step = m.interleaved ? m.outputs : 1;
  for (long r = 0; r < count; r++, z += n.ob)
    for (long s = 0, at = start; s < n.ob && at < m.out; s++, at += step)
      y[r * m.out + at] = z[s] + (add ? add[r * m.out + at] : 0);
}

void norm(const Monarch& m, float* y, long count) {
  if (!m.norm) return;
  Call c = {};
  c.y = y, c.out = m.out, c.eps = m.eps, c.norm_weight = m.norm_weight, c.norm_bias = m.norm_bias;
  norm_rows(c, 0, count);
}

// A thread's own rows through both factors; whether one has no finite range.
bool through(const Monarch& m, const Room& room, const float* x, float* y, const float* add,
             long count) {
  bool bad = false;
  for (long k = 0; k < m.inputs; k++) {
    const Block own = right_block(m, room, x, count, k, {});
    own.multiply(0, own.panels), bad |= own.bad;
  }
  for (long l = 0; l < m.outputs; l++) {
    const Block own = left_block(m, room, y, add, count, l, {});
    own.multiply(0, own.panels), bad |= own.bad;
    place(m, room, y, add, count, l);
  }
  norm(m, y, count);
  return bad;
}

// All blocks of a factor, each made by `of`, their panels shared by the threads.
template <class Of>
bool shared(const Monarch& m, long blocks, const Of& of) {
  const long wide = m.rows * m.in < (1 << 15) ? 1 : m.threads;
  Block** made = (Block**)malloc(blocks * sizeof(Block*));
  if (!made) std::abort();
  for_each(m.parallel, wide, blocks, [&](long i) { made[i] = new Block(of(i)); });
  const long parts = (4 * m.threads + blocks - 1) / blocks, panels = made[0]->panels;
  const long size = (panels + parts - 1) / parts, slices = (panels + size - 1) / size;
  for_each(m.parallel, m.threads, blocks * slices, [&](long task) {
    const long from = task % slices * size;
    made[task / slices]->multiply(from, least(from + size, panels));
  });
  bool bad = false;
  for (long i = 0; i < blocks; i++) bad |= made[i]->bad, delete made[i];
  free(made);
  return bad;
}

// The one range of n values, as float64 has it; false where it is not finite.
bool found(const Monarch& m, const float* x, long n, OneRange* range) {
  if (!m.one_range) return true;
  const Range of = range_of(x, n);
  const double low = of.low < 0 ? of.low : 0, high = of.high > 0 ? of.high : 0;
  range->step = (high - low + 1e-8) / 255;
  if (of.bad) return false;
  range->zero = (int64_t)__builtin_nearbyint(-low / range->step);
  return true;
}

// All rows through one factor, and then through the other.
bool by_columns(const Monarch& m, const float* x, float* y) {
  Buffer once;  // of much memory, which no thread keeps
  const Sizes n(m);
  const long floats = Room::floats(m, m.rows, true) * sizeof(float);
  Buffer& own = floats < (1 << 24) ? buffer() : once;
  const Room room(m, m.rows, true, own.of(0, floats), own.of(1, Room::bytes(m, m.rows, true)));
  OneRange range = {};
  if (!found(m, x, m.rows * m.in, &range)) return true;
  bool bad = shared(m, m.inputs, [&](long k) {
    return right_block(m, room, x, m.rows, k, range);
  });
  if (!found(m, room.mid, m.inputs * m.rows * n.middle, &range)) return true;
  bad |= shared(m, m.outputs, [&](long l) {
    return left_block(m, room, y, m.add, m.rows, l, range);
  });
  for (long l = 0; l < m.outputs; l++) place(m, room, y, m.add, m.rows, l);
  norm(m, y, m.rows);
  return bad;
}

}  // namespace

extern "C" {

// Layers one after the other, each of the columns that the one before has left; what lies between
// two of them is no one else's. 1 where a row has no finite range: y is nothing then.
int64_t int8_monarch(const Monarch* layers, int64_t count) {
  const Monarch& one = layers[0];
  const Monarch& end = layers[count - 1];
  bool few = one.rows < ROWS * one.threads && one.threads > 1;
  long widest = 0, floats = 0, bytes = 0;
  for (long i = 0; i < count; i++) few |= layers[i].one_range != 0;
  const long size = least(up(4 * ROWS, UNIT), up((one.rows + one.threads - 1) / one.threads, UNIT));
  for (long i = 0; i < count; i++) {
    if (i + 1 < count) widest = larger(widest, layers[i].out);
    floats = larger(floats, Room::floats(layers[i], size, false));
    bytes = larger(bytes, Room::bytes(layers[i], size, false));
  }
  if (few) {
    Buffer between;
    const float* x = one.x;
    bool bad = false;
    for (long i = 0; i < count; i++) {
      float* y = i + 1 < count ? (float*)between.of(i % 2, one.rows * widest * sizeof(float)) : end.y;
      bad |= by_columns(layers[i], x, y);
      x = y;
    }
    return bad;
  }
  std::atomic<long> spoiled{0};
  for_each(one.parallel, one.threads, (one.rows + size - 1) / size, [&](long task) {
    const long r = task * size, own = least(size, one.rows - r);
    float* memory = (float*)buffer().of(0, (floats + 2 * size * widest) * sizeof(float));
    void* levels = buffer().of(1, bytes);
    const float* x = one.x + r * one.in;
    bool bad = false;
    for (long i = 0; i < count; i++) {
      const Monarch& m = layers[i];
      float* y = i + 1 < count ? memory + floats + i % 2 * size * widest : m.y + r * m.out;
      const float* add = m.add ? m.add + r * m.out : nullptr;
      bad |= through(m, Room(m, size, false, memory, levels), x, y, add, own);
      x = y;
    }
    if (bad) spoiled.store(1, std::memory_order_relaxed);
  });
  return spoiled.load();
}
}
