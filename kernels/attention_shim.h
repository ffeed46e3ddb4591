// Attention as an op of compiled programs; the end of attention_cpu.cpp.

#include <vector>

#include "shim.h"

namespace {

// A tensor of four dimensions whose last one is dense.
struct Operand {
  View of;
  std::vector<float> copied;
  const float* data;
  int64_t batch, head, row;

  explicit Operand(Handle tensor) : of(tensor) {
    must(of.dim == 4 && of.dtype == aoti_torch_dtype_float32(), "rewriter: attention takes [batch, heads, rows, depth] in float32");
    data = (const float*)of.data, batch = of.strides[0], head = of.strides[1], row = of.strides[2];
    const int64_t* n = of.sizes;
    if (of.strides[3] == 1 || n[3] == 1) return;
    copied.reserve(n[0] * n[1] * n[2] * n[3]);
    for (int64_t b = 0; b < n[0]; b++)
      for (int64_t h = 0; h < n[1]; h++)
        for (int64_t r = 0; r < n[2]; r++)
          for (int64_t d = 0; d < n[3]; d++)
            copied.push_back(data[b * of.strides[0] + h * of.strides[1] + r * of.strides[2] + d * of.strides[3]]);
    data = copied.data(), row = n[3], head = n[2] * row, batch = n[1] * head;
  }
};

// The mask, where there is one, spread to [batch, heads, queries, keys].
void take(Call& c, Handle* mask) {
  if (!mask) return;
  const View of(*mask);
  const int64_t to[4] = {c.batch, c.heads, c.queries, c.keys};
  int64_t strides[4] = {};
  must(of.dim <= 4, "rewriter: attention's mask has more than four dimensions");
  for (int64_t d = 4 - of.dim; d < 4; d++) {
    const int64_t size = of.sizes[d - 4 + of.dim];
    must(size == to[d] || size == 1, "rewriter: attention's mask does not fit");
    strides[d] = size == 1 ? 0 : of.strides[d - 4 + of.dim];
  }
  c.truths = of.dtype == aoti_torch_dtype_bool();
  must(c.truths || of.dtype == aoti_torch_dtype_float32(),
       "rewriter: attention's mask is neither of truths nor of float32");
  c.mask = of.data;
  c.mask_batch = strides[0], c.mask_head = strides[1], c.mask_row = strides[2], c.mask_column = strides[3];
}

void one_unit(const void* call, int64_t b, const float* x) { attention_unit((const Call*)call, b, x); }

}  // namespace

extern "C" void int8_handed_on(Handle, Handle, int64_t, void (*)(const void*, int64_t, const float*), const void*);
extern "C" AOTITorchError aoti_torch_cpu_native_int8(Handle, Handle, Handle*, int64_t, Handle*);

extern "C" AOTITorchError aoti_torch_cpu_native_int8_attention(Handle x, Handle layer, Handle* mask, int64_t heads,
                                                               int64_t shared, int64_t depth, int64_t causal,
                                                               double scale, int64_t bf16, Handle* ret) {
  const View in(x);
  must(in.dim == 3 && depth % V == 0, "rewriter: x is not [batch, rows, features], or a head no multiple of the vector width");
  const int64_t batch = in.sizes[0], rows = in.sizes[1], out = (heads + 2 * shared) * depth;
  Call c{};
  c.parallel = (Parallel)own_threads(), c.threads = threads_now();
  c.batch = batch, c.heads = heads, c.shared = heads / shared, c.queries = c.keys = rows, c.depth = depth;
  c.q_head = c.k_head = c.v_head = depth, c.q_row = c.k_row = c.v_row = out;
  c.causal = causal, c.scale = scale, c.bf16 = bf16 && attention_bf16();
  take(c, mask);
  const int64_t sizes[3] = {batch, rows, heads * depth}, strides[3] = {rows * heads * depth, heads * depth, 1};
  *ret = made(3, sizes, strides);
  if (!batch || !rows) return AOTI_TORCH_SUCCESS;
  c.y = (float*)data_of(*ret);
  const int64_t k = heads * depth, v = k + shared * depth;
  // as many for each thread, or so many that one more does not matter
  if (batch >= c.threads && (batch % c.threads == 0 || batch >= 8 * c.threads)) {
    c.q = nullptr, c.k = (const float*)(intptr_t)k, c.v = (const float*)(intptr_t)v;  // from y on
    int8_handed_on(x, layer, rows, one_unit, &c);
    return AOTI_TORCH_SUCCESS;
  }
  Handle product;
  aoti_torch_cpu_native_int8(x, layer, nullptr, out, &product);
  c.q = (const float*)data_of(product), c.k = c.q + k, c.v = c.q + v;
  c.q_batch = c.k_batch = c.v_batch = rows * out;
  attention(&c);
  done(aoti_torch_delete_tensor_object(product));
  return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError aoti_torch_cpu_native_attention(Handle q, Handle k, Handle v, Handle* mask, int64_t causal,
                                                          double scale, int64_t bf16, Handle* ret) {
  const Operand own(q), keys(k), values(v);
  const int64_t *n = own.of.sizes, *m = keys.of.sizes, *o = values.of.sizes;
  must(n[0] == m[0] && n[0] == o[0] && m[1] == o[1] && m[2] == o[2] && m[1] && n[1] % m[1] == 0,
       "rewriter: attention's operands differ in batch, heads or rows");
  must(n[3] == m[3] && n[3] == o[3] && n[3] % V == 0, "rewriter: a head is no multiple of the vector width: export the model again, here");
  Call c{};
  c.q = own.data, c.k = keys.data, c.v = values.data;
  c.parallel = (Parallel)own_threads(), c.threads = threads_now();
  c.batch = n[0], c.heads = n[1], c.shared = n[1] / m[1], c.queries = n[2], c.keys = m[2], c.depth = n[3];
  c.q_batch = own.batch, c.q_head = own.head, c.q_row = own.row;
  c.k_batch = keys.batch, c.k_head = keys.head, c.k_row = keys.row;
  c.v_batch = values.batch, c.v_head = values.head, c.v_row = values.row;
  c.causal = causal, c.scale = scale, c.bf16 = bf16 && attention_bf16();
  take(c, mask);
  const int64_t strides[4] = {n[2] * n[1] * n[3], n[3], n[1] * n[3], 1};
  *ret = made(4, n, strides);
  c.y = (float*)data_of(*ret);
  if (!(n[0] && n[1] && n[2] && n[3])) return AOTI_TORCH_SUCCESS;
  if (m[2])
    attention(&c);
  else  // none to look at
    for (int64_t i = 0; i < n[0] * n[1] * n[2] * n[3]; i++) c.y[i] = 0;
  return AOTI_TORCH_SUCCESS;
}
