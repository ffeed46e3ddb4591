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

// x @ wᵀ + bias without its output; 4 bits where `four`.
Call prepared(const View& in, Handle weight, Handle scale, Handle* zero, Handle* bias, bool four, bool dynamic) {
  const View w(weight), s(scale);
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
  c.parallel = (Parallel)own_threads(), c.threads = threads_now();
  c.rows = 1;
  for (int64_t d = 0; d + 1 < in.dim; d++) c.rows *= in.sizes[d];
  return c;
}

// The products of one x, side by side in a row.
void run(const View& in, Call* calls, int64_t count, Handle* ret) {
  int64_t out = 0, sizes[64], strides[64], size = 1;
  for (int64_t i = 0; i < count; i++) {
    out += calls[i].out;
    must(calls[i].group == calls[0].group, "rewriter: weights that are multiplied together must have groups of one size");
  }
  for (int64_t d = 0; d < in.dim; d++) sizes[d] = d + 1 < in.dim ? in.sizes[d] : out;
  for (int64_t d = in.dim - 1; d >= 0; size *= sizes[d--]) strides[d] = size ? size : 1;
  *ret = made(in.dim, sizes, strides);
  float* y = (float*)data_of(*ret);
  for (int64_t i = 0; i < count; y += calls[i++].out) calls[i].y = y, calls[i].apart = out;
  if (!calls[0].rows || !out) return;
  if (calls[0].in) return weight_linears(calls, count);
  for (int64_t i = 0; i < count; i++)
    for (int64_t r = 0; r < calls[i].rows; r++)
      for (int64_t n = 0; n < calls[i].out; n++) calls[i].y[r * out + n] = calls[i].bias ? calls[i].bias[n] : 0;
}

void linear(Handle x, Handle weight, Handle scale, Handle* zero, Handle* bias, bool four, bool dynamic, Handle* ret) {
  const View in(x);
  Call c = prepared(in, weight, scale, zero, bias, four, dynamic);
  run(in, &c, 1, ret);
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

// Two products or three of one x; kind 0: weights of 8 bits, 1: of 4, 2: of 4 and x in 8 bits.
AOTITorchError aoti_torch_cpu_native_weight_linears(Handle x, Handle w1, Handle s1, Handle* z1, Handle* b1, Handle w2, Handle s2,
                                                    Handle* z2, Handle* b2, Handle* w3, Handle* s3, Handle* z3, Handle* b3,
                                                    int64_t kind, Handle* ret) {
  must(kind >= 0 && kind <= 2 && !w3 == !s3, "rewriter: weights are of another kind, or a weight has no scales");
  const View in(x);
  const bool four = kind > 0, dynamic = kind == 2;
  Call calls[3] = {prepared(in, w1, s1, z1, b1, four, dynamic), prepared(in, w2, s2, z2, b2, four, dynamic), {}};
  if (w3) calls[2] = prepared(in, *w3, *s3, z3, b3, four, dynamic);
  run(in, calls, w3 ? 3 : 2, ret);
  return AOTI_TORCH_SUCCESS;
}
}
