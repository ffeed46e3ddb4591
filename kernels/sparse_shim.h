// Products that read only the weights of active inputs as ops of compiled programs; the end of
// sparse_cpu.cpp.
//
// Whatever share is active, they are computed here: who puts them into a program knows that few are.

#pragma once

#include "shim.h"

namespace {

// Data of a contiguous matrix [rows, columns] of this dtype.
const void* matrix(const View& own, int32_t dtype, int64_t rows, int64_t columns, const char* otherwise) {
  must(own.dtype == dtype && own.dim == 2 && own.sizes[0] == rows && own.sizes[1] == columns && own.contiguous(), otherwise);
  return own.data;
}

// Data of so many floats; null without a tensor.
const float* floats(Handle* tensor, int64_t count, const char* otherwise) {
  if (!tensor) return nullptr;
  const View own(*tensor);
  must(own.dim == 1 && own.sizes[0] == count, otherwise);
  return own.floats(otherwise);
}

// x, how many rows it has, and which of its entries are active.
Linear selecting(const View& in, Handle* threshold, Handle* importance, int64_t k, int64_t block) {
  Linear c{};
  c.x = in.floats("rewriter: x must be float32 and contiguous");
  must(in.dim > 0 && in.dim <= 64, "rewriter: x must be [*, in]");
  c.in = c.limit = in.sizes[in.dim - 1], c.rows = 1;
  for (int64_t d = 0; d + 1 < in.dim; d++) c.rows *= in.sizes[d];
  must(block > 0 && c.in % block == 0 && (threshold || (k > 0 && k <= c.in && k % block == 0)),
       "rewriter: neither a threshold nor a number of inputs, or blocks that do not divide them");
  const float* least = floats(threshold, 1, "rewriter: the threshold must be [1] float32");
  c.select = {floats(importance, c.in, "rewriter: the importance must be [in] float32"), least ? *least : 0.0, least ? 0 : k, block};
  c.parallel = (Parallel)own_threads(), c.threads = threads_now();
  return c;
}

// Sums of weights made floats one by one, of an x that is too large for sums of levels.
void of_large(const Linear& c) {
  std::vector<uint8_t> chosen(c.in);
  const auto wide = [&](const void* of, long i) { return c.floats ? ((const float*)of)[i] : number((const uint16_t*)of + i); };
  for (long r = 0; r < c.rows; r++) {
    const float* x = c.x + r * c.in;
    float* y = c.y + r * c.out;
    choose(c.select, x, c.in, chosen.data());
    for (long n = 0; n < c.out; n++) {
      float sum = 0;
      for (long i = 0; i < c.in; i++) {
        if (!chosen[i]) continue;
        const long byte = ((const uint8_t*)c.weight)[i * ((c.out + 1) / 2) + n / 2], at = i / c.group * c.out + n;
        const float level = (float)((n % 2 ? byte >> 4 : byte & 15) - 8);
        sum += x[i] * (level * wide(c.scale, at) + (c.zero ? wide(c.zero, at) : 0.0f));
      }
      y[n] = sum + (c.bias ? c.bias[n] : 0);
    }
  }
}

Handle product(const View& in, Linear& c) {
  int64_t sizes[64], strides[64], size = 1, active;
  for (int64_t d = 0; d < in.dim; d++) sizes[d] = d + 1 < in.dim ? in.sizes[d] : c.out;
  for (int64_t d = in.dim - 1; d >= 0; size *= sizes[d--]) strides[d] = size ? size : 1;
  Handle y = made(in.dim, sizes, strides);
  c.y = (float*)data_of(y), c.active = &active;
  if (!c.rows || !c.out) return y;
  if (!c.in)
    for (long i = 0; i < c.rows * c.out; i++) c.y[i] = c.bias ? c.bias[i % c.out] : 0;
  else if (!sparse_linear(&c))
    of_large(c);
  return y;
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_native_sparse_linear(Handle x, Handle columns, Handle* scale, Handle* bias, Handle* threshold,
                                                   Handle* importance, int64_t k, int64_t block, Handle* ret) {
  const View in(x), w(columns);
  Linear c = selecting(in, threshold, importance, k, block);
  const int32_t stored = scale ? aoti_torch_dtype_int8() : aoti_torch_dtype_float32();
  c.out = w.dim == 2 ? w.sizes[1] : 0, c.type = scale ? INT8 : FLOAT;
  c.weight = matrix(w, stored, c.in, c.out, "rewriter: the weight must be [in, out], contiguous, float32 or int8 with a scale");
  c.scale = floats(scale, c.out, "rewriter: the scale must be [out] float32");
  c.bias = floats(bias, c.out, "rewriter: the bias must be [out] float32");
  *ret = product(in, c);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_native_sparse_int4_linear(Handle x, Handle packed, Handle scale, Handle* zero, Handle* bias,
                                                        Handle* threshold, Handle* importance, int64_t k, int64_t block,
                                                        int64_t group, Handle* ret) {
  const View in(x), w(packed), s(scale);
  Linear c = selecting(in, threshold, importance, k, block);
  must(group > 0 && group <= MOST && s.dim == 2, "rewriter: scales must be [groups, out], of groups of up to 128 inputs");
  c.type = INT4, c.group = group, c.floats = s.dtype == aoti_torch_dtype_float32(), c.out = s.sizes[1];
  const int64_t groups = (c.in + group - 1) / group;
  const int32_t dtype = c.floats ? s.dtype : aoti_torch_dtype_bfloat16();
  c.weight = matrix(w, aoti_torch_dtype_uint8(), c.in, (c.out + 1) / 2, "rewriter: packed must be [in, out/2] uint8, contiguous");
  c.scale = matrix(s, dtype, groups, c.out, "rewriter: the scales must be [groups, out], contiguous, float32 or bfloat16");
  if (zero) c.zero = matrix(View(*zero), dtype, groups, c.out, "rewriter: the zeros do not fit the scales");
  c.bias = floats(bias, c.out, "rewriter: the bias must be [out] float32");
  *ret = product(in, c);
  return AOTI_TORCH_SUCCESS;
}
}
