// The dispatcher's way to the kernels that compiled programs call: what C++ calls of Inductor's name
// directly (int8_shim.h, attention_shim.h, weight_shim.h, sparse_shim.h), others find by the op.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

using torch::stable::Tensor;
typedef AtenTensorHandle Handle;

extern "C" {
AOTITorchError aoti_torch_cpu_native_int8(Handle, Handle, Handle*, int64_t, Handle*);
AOTITorchError aoti_torch_cpu_native_int8_two(Handle, Handle, Handle, Handle*, int64_t, int64_t, Handle*);
AOTITorchError aoti_torch_cpu_native_int8_attention(Handle, Handle, Handle*, int64_t, int64_t, int64_t, int64_t, double,
                                                    int64_t, Handle*);
AOTITorchError aoti_torch_cpu_native_attention(Handle, Handle, Handle, Handle*, int64_t, double, int64_t, Handle*);
AOTITorchError aoti_torch_cpu_native_int8_weight_linear(Handle, Handle, Handle, Handle*, Handle*);
AOTITorchError aoti_torch_cpu_native_int4_linear(Handle, Handle, Handle, Handle*, Handle*, Handle*);
AOTITorchError aoti_torch_cpu_native_int4_dynamic_linear(Handle, Handle, Handle, Handle*, Handle*, Handle*);
AOTITorchError aoti_torch_cpu_native_weight_linears(Handle, Handle, Handle, Handle*, Handle*, Handle, Handle, Handle*, Handle*,
                                                    Handle*, Handle*, Handle*, Handle*, int64_t, Handle*);
AOTITorchError aoti_torch_cpu_native_sparse_linear(Handle, Handle, Handle*, Handle*, Handle*, Handle*, int64_t, int64_t, Handle*);
AOTITorchError aoti_torch_cpu_native_sparse_int4_linear(Handle, Handle, Handle, Handle*, Handle*, Handle*, Handle*, int64_t,
                                                        int64_t, int64_t, Handle*);
}

namespace {

// A pointer to the handle, or null.
struct Maybe {
  Handle handle = nullptr;
  explicit Maybe(const std::optional<Tensor>& tensor) {
    if (tensor) handle = tensor->get();
  }
  operator Handle*() { return handle ? &handle : nullptr; }
};

Tensor int8(Tensor x, Tensor layer, std::optional<Tensor> add, int64_t out) {
  Handle y;
  aoti_torch_cpu_native_int8(x.get(), layer.get(), Maybe(add), out, &y);
  return Tensor(y);
}

Tensor int8_two(Tensor x, Tensor first, Tensor second, std::optional<Tensor> add, int64_t mid, int64_t out) {
  Handle y;
  aoti_torch_cpu_native_int8_two(x.get(), first.get(), second.get(), Maybe(add), mid, out, &y);
  return Tensor(y);
}

Tensor int8_attention(Tensor x, Tensor layer, std::optional<Tensor> mask, int64_t heads, int64_t shared, int64_t depth,
                      int64_t causal, double scale, int64_t bf16) {
  Handle y;
  aoti_torch_cpu_native_int8_attention(x.get(), layer.get(), Maybe(mask), heads, shared, depth, causal, scale, bf16, &y);
  return Tensor(y);
}

Tensor attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask, int64_t causal, double scale, int64_t bf16) {
  Handle y;
  aoti_torch_cpu_native_attention(q.get(), k.get(), v.get(), Maybe(mask), causal, scale, bf16, &y);
  return Tensor(y);
}

Tensor int8_weight(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias) {
  Handle y;
  aoti_torch_cpu_native_int8_weight_linear(x.get(), weight.get(), scale.get(), Maybe(bias), &y);
  return Tensor(y);
}

Tensor int4(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> zero, std::optional<Tensor> bias) {
  Handle y;
  aoti_torch_cpu_native_int4_linear(x.get(), weight.get(), scale.get(), Maybe(zero), Maybe(bias), &y);
  return Tensor(y);
}

Tensor int4_dynamic(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> zero, std::optional<Tensor> bias) {
  Handle y;
  aoti_torch_cpu_native_int4_dynamic_linear(x.get(), weight.get(), scale.get(), Maybe(zero), Maybe(bias), &y);
  return Tensor(y);
}

Tensor weights(Tensor x, Tensor w1, Tensor s1, std::optional<Tensor> z1, std::optional<Tensor> b1, Tensor w2, Tensor s2,
               std::optional<Tensor> z2, std::optional<Tensor> b2, std::optional<Tensor> w3, std::optional<Tensor> s3,
               std::optional<Tensor> z3, std::optional<Tensor> b3, int64_t kind) {
  Handle y;
  aoti_torch_cpu_native_weight_linears(x.get(), w1.get(), s1.get(), Maybe(z1), Maybe(b1), w2.get(), s2.get(), Maybe(z2), Maybe(b2),
                                       Maybe(w3), Maybe(s3), Maybe(z3), Maybe(b3), kind, &y);
  return Tensor(y);
}

Tensor sparse(Tensor x, Tensor columns, std::optional<Tensor> scale, std::optional<Tensor> bias, std::optional<Tensor> threshold,
              std::optional<Tensor> importance, int64_t k, int64_t block) {
  Handle y;
  aoti_torch_cpu_native_sparse_linear(x.get(), columns.get(), Maybe(scale), Maybe(bias), Maybe(threshold), Maybe(importance), k,
                                      block, &y);
  return Tensor(y);
}

Tensor sparse_int4(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> zero, std::optional<Tensor> bias,
                   std::optional<Tensor> threshold, std::optional<Tensor> importance, int64_t k, int64_t block, int64_t group) {
  Handle y;
  aoti_torch_cpu_native_sparse_int4_linear(x.get(), packed.get(), scale.get(), Maybe(zero), Maybe(bias), Maybe(threshold),
                                           Maybe(importance), k, block, group, &y);
  return Tensor(y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rewriter, CPU, m) {
  m.impl("native_int8", TORCH_BOX(&int8));
  m.impl("native_int8_two", TORCH_BOX(&int8_two));
  m.impl("native_int8_attention", TORCH_BOX(&int8_attention));
  m.impl("native_attention", TORCH_BOX(&attention));
  m.impl("native_int8_weight_linear", TORCH_BOX(&int8_weight));
  m.impl("native_int4_linear", TORCH_BOX(&int4));
  m.impl("native_int4_dynamic_linear", TORCH_BOX(&int4_dynamic));
  m.impl("native_weight_linears", TORCH_BOX(&weights));
  m.impl("native_sparse_linear", TORCH_BOX(&sparse));
  m.impl("native_sparse_int4_linear", TORCH_BOX(&sparse_int4));
}
