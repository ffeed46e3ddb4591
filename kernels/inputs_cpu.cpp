// What a compiled program was given, checked and laid out as the program reads it
// (kernels/package_inputs.py).

#include "shim.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <string>

namespace {

// In the order of `DTYPES` in Python.
int32_t (*const DTYPES[])() = {
    aoti_torch_dtype_float32, aoti_torch_dtype_float64, aoti_torch_dtype_float16, aoti_torch_dtype_bfloat16,
    aoti_torch_dtype_int64,   aoti_torch_dtype_int32,   aoti_torch_dtype_int16,   aoti_torch_dtype_int8,
    aoti_torch_dtype_uint8,   aoti_torch_dtype_bool,
};
const char* const NAMES[] = {
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
};

std::string named(int32_t dtype) {
  for (size_t i = 0; i < sizeof(NAMES) / sizeof(*NAMES); i++)
    if (DTYPES[i]() == dtype) return NAMES[i];
  return "of another dtype";
}

std::string listed(const int64_t* sizes, int64_t count) {
  std::string text = "[";
  for (int64_t d = 0; d < count; d++)
    text += (d ? ", " : "") + (sizes[d] == -2 ? "any" : sizes[d] == -1 ? "1 or more" : std::to_string(sizes[d]));
  return text + "]";
}

}  // namespace

extern "C" AOTITorchError aoti_torch_cpu_package_input(Handle x, const char* name, const int64_t* sizes, int64_t count,
                                                       int64_t dtype, int64_t last, Handle* ret) {
  const View in(x);
  bool fits = in.dim == count;
  for (int64_t d = 0; fits && d < count; d++) fits = sizes[d] == -1 ? in.sizes[d] > 0 : sizes[d] == -2 || sizes[d] == in.sizes[d];
  if (!fits)
    throw std::runtime_error(std::string("rewriter: ") + name + " has the sizes " + listed(in.sizes, in.dim) +
                             ", and the package was exported for " + listed(sizes, count) +
                             " (export's dynamic_shapes= lets sizes vary)");
  if (dtype >= 0 && DTYPES[dtype]() != in.dtype)
    throw std::runtime_error(std::string("rewriter: ") + name + " is " + named(in.dtype) +
                             ", and the package was exported for " + NAMES[dtype]);
  int64_t strides[64], size = 1;
  must(count <= 64, "rewriter: an input has too many dimensions");
  const auto next = [&](int64_t d) { strides[d] = size, size *= in.sizes[d] ? in.sizes[d] : 1; };
  if (last) next(1);  // channels beside each other
  for (int64_t d = count - 1; d >= 0; d--)
    if (!last || d != 1) next(d);
  const int32_t device = aoti_torch_device_type_cpu();
  done(aoti_torch_empty_strided(in.dim, in.sizes, strides, in.dtype, device, 0, ret));
  done(aoti_torch_copy_(*ret, x, 0));
  return AOTI_TORCH_SUCCESS;
}
