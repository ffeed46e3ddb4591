// Linear layers with 8-bit integers as ops of compiled programs; the end of int8_cpu.cpp.
//
// A layer is one tensor of bytes: 64 with its layout, a Call whose pointers are distances from the
// beginning (0 for null), and what they point to (kernels/int8_cpu.py: Linear.layer).

#include <algorithm>

#include "shim.h"

namespace {

// Bytes of a tensor, in memory as the kernels read it.
struct Layer {
  Call call;
  void* copied = nullptr;

  explicit Layer(Handle tensor) {
    const View of(tensor);
    must(of.dim == 1 && of.contiguous() && of.sizes[0] > 64 + (int64_t)sizeof(Call), "rewriter: no packed layer");
    const char* bytes = (const char*)of.data;
    if ((uintptr_t)bytes % 64) {  // of a file that is mapped into memory
      copied = aligned_alloc(64, up(of.sizes[0], 64));
      if (!copied) std::abort();
      bytes = (const char*)memcpy(copied, of.data, of.sizes[0]);
    }
    int64_t layout;
    memcpy(&layout, bytes, 8), memcpy(&call, bytes + 64, sizeof(Call));
    must(layout == int8_layout(), "rewriter: a layer was packed for another CPU or by another version: export the model again, here");
    at(call.weight, bytes), at(call.scale, bytes), at(call.sums, bytes), at(call.bias, bytes);
    at(call.norm_weight, bytes), at(call.norm_bias, bytes), at(call.multiplier, bytes);
    call.parallel = (Parallel)own_threads();
  }

  Layer(const Layer&) = delete;
  ~Layer() { free(copied); }

  template <class T>
  void at(const T*& pointer, const char* bytes) {
    if (pointer) pointer = (const T*)(bytes + (intptr_t)pointer);
  }
};

// Products of two numbers, below which one thread is done before a second one has woken up.
constexpr int64_t ALONE = 1 << 22;

// y = layers(x) + add, of one layer or of two.
void run(Handle x, Layer& first, Layer* second, Handle* add, int64_t out, Handle* ret) {
  const View in(x);
  Call &a = first.call, &last = second ? second->call : a;
  must(in.dim > 0 && in.sizes[in.dim - 1] == a.in, "rewriter: x does not fit the layer");
  must(last.out == out && (!second || last.in == a.out), "rewriter: the layers do not fit");
  a.x = in.floats("rewriter: x must be float32 and contiguous"), a.stride = a.in;
  int64_t rows = 1, sizes[64], strides[64], size = 1;
  must(in.dim <= 64, "rewriter: x has too many dimensions");
  for (int64_t d = 0; d < in.dim; d++) sizes[d] = d + 1 < in.dim ? in.sizes[d] : out;
  for (int64_t d = 0; d + 1 < in.dim; d++) rows *= sizes[d];
  for (int64_t d = in.dim - 1; d >= 0; size *= sizes[d--]) strides[d] = size ? size : 1;
  if (add) {
    const View with(*add);
    must(with.dim == in.dim && std::equal(sizes, sizes + in.dim, with.sizes), "rewriter: what is added does not fit");
    last.add = with.floats("rewriter: what is added must be float32 and contiguous");
  }
  *ret = made(in.dim, sizes, strides);
  if (!rows) return;
  last.y = (float*)data_of(*ret);
  a.rows = last.rows = rows;
  a.threads = last.threads = rows * a.in * a.out < ALONE ? 1 : threads_now();
  if (second) {
    int8_two(&a, &last);
    return;
  }
  const long bytes = int8_scratch(rows, a.in);
  static thread_local Buffer kept;
  Buffer once;  // of much memory, which no thread keeps
  a.q = (bytes > 1 << 24 ? once : kept).of(0, bytes);
  int8_linear(&a);
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_native_int8(Handle x, Handle layer, Handle* add, int64_t out, Handle* ret) {
  Layer one(layer);
  run(x, one, nullptr, add, out, ret);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_native_int8_two(Handle x, Handle first, Handle second, Handle* add, int64_t mid,
                                              int64_t out, Handle* ret) {
  Layer one(first), two(second);
  must(one.call.out == mid, "rewriter: the layers do not fit");
  run(x, one, &two, add, out, ret);
  return AOTI_TORCH_SUCCESS;
}

// The product of `unit` rows of x at a time, each handed on to next(to, number of the unit, y).
void int8_handed_on(Handle x, Handle layer, int64_t unit, void (*next)(const void*, int64_t, const float*),
                    const void* to) {
  Layer one(layer);
  const View in(x);
  Call& c = one.call;
  must(in.dim == 3 && in.sizes[2] == c.in, "rewriter: x does not fit the layer");
  c.x = in.floats("rewriter: x must be float32 and contiguous"), c.stride = c.in;
  c.rows = in.sizes[0] * in.sizes[1], c.threads = threads_now();
  int8_units(&c, unit, next, to);
}
}
