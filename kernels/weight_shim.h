// Linear layers with packed weights as ops of compiled programs; the end of weight_only_cpu.cpp.
//
// They read a layer's own tensors, as they are stored: nothing is packed for them.

#pragma once

#include "shim.h"

namespace {

// Whether a tensor is contiguous, of this dtype and these sizes.
bool is(const View& of, int32_t dtype, int64_t dim, int64_t first, int64_t second = 0) {
  return of.dtype == dtype && of.dim == dim && of.sizes[0] == first && (dim < 2 || of.sizes[1] == second) && of.contiguous();
}

// y = x @ wᵀ + bias; 4 bits where `four`.
void linear(Handle x, Handle weight, Handle scale, Handle* zero, Handle* bias, bool four, bool dynamic, Handle* ret) {
  const View in(x), w(weight), s(scale);
  must(in.dim > 0 && in.dim <= 64 && w.dim == 2 && s.dim == 1 + four, "rewriter: a packed weight was given in another form");
  Call c{};
  c.x = in.floats("rewriter: x must be float32 and contiguous");
  c.in = in.sizes[in.dim - 1], c.out = w.sizes[0], c.dynamic = dynamic;
  const int64_t stored = w.sizes[1], groups = four ? s.sizes[1] : 0;
  const int32_t bytes = four ? aoti_torch_dtype_uint8() : aoti_torch_dtype_int8(), plain = aoti_torch_dtype_float32();
  must(is(w, bytes, 2, c.out, stored), "rewriter: the weight must be contiguous, of 8-bit numbers");
  c.group = groups ? 2 * stored / groups : 0;
  const bool fits = !four ? stored == c.in
                          : c.group * groups == 2 * stored && c.group % BLOCK == 0 && c.in <= 2 * stored && c.in > 2 * stored - c.group;
  must(fits || !(c.in || stored), "rewriter: x does not fit the weight");
  c.floats = s.dtype == plain;
  must(is(s, four && !c.floats ? aoti_torch_dtype_bfloat16() : plain, 1 + four, c.out, groups), "rewriter: the scales do not fit the weight");
  c.weight = (const uint8_t*)w.data, c.scale = s.data;
  if (zero) {
    const View own(*zero);
    must(is(own, s.dtype, 2, c.out, groups), "rewriter: the zeros do not fit the scales");
    c.zero = own.data;
  }
  if (bias) {
    const View own(*bias);
    must(is(own, plain, 1, c.out), "rewriter: the bias does not fit the weight, or is not float32");
    c.bias = (const float*)own.data;
  }
  int64_t sizes[64], strides[64], size = 1;
  c.rows = 1;
  for (int64_t d = 0; d < in.dim; d++) sizes[d] = d + 1 < in.dim ? in.sizes[d] : c.out;
  for (int64_t d = 0; d + 1 < in.dim; d++) c.rows *= sizes[d];
  for (int64_t d = in.dim - 1; d >= 0; size *= sizes[d--]) strides[d] = size ? size : 1;
  *ret = made(in.dim, sizes, strides);
  c.y = (float*)data_of(*ret);
  c.parallel = (Parallel)own_threads(), c.threads = threads_now();
  if (!c.rows || !c.out) return;
  if (c.in) return weight_linear(&c);
  for (int64_t i = 0; i < c.rows * c.out; i++) c.y[i] = c.bias ? c.bias[i % c.out] : 0;
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_native_int8_weight_linear(Handle x, Handle weight, Handle scale, Handle* bias, Handle* ret) {
  linear(x, weight, scale, nullptr, bias, false, false, ret);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_native_int4_linear(Handle x, Handle weight, Handle scale, Handle* zero, Handle* bias, Handle* ret) {
  linear(x, weight, scale, zero, bias, true, false, ret);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_native_int4_dynamic_linear(Handle x, Handle weight, Handle scale, Handle* zero, Handle* bias,
                                                         Handle* ret) {
  linear(x, weight, scale, zero, bias, true, true, ret);
  return AOTI_TORCH_SUCCESS;
}
}
