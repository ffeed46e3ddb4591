// What the kernels need of torch's C interface to be called by compiled programs: by code that
// Inductor generates, through the C functions it declares, and by the dispatcher (shims.cpp).
//
// Only what torch keeps binary compatible is used. An error is an exception, which both pass on.

#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <stdexcept>

namespace {

typedef AtenTensorHandle Handle;

inline void must(bool holds, const char* otherwise) {
  if (!holds) throw std::runtime_error(otherwise);
}

inline void done(AOTITorchError error) { must(error == AOTI_TORCH_SUCCESS, "rewriter: torch failed"); }

// A tensor on the CPU, as it is.
struct View {
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  void* data = nullptr;

  explicit View(Handle tensor) {
    int32_t device;
    done(aoti_torch_get_device_type(tensor, &device));
    must(device == aoti_torch_device_type_cpu(), "rewriter: a compiled kernel was given a tensor that is not on the CPU");
    done(aoti_torch_get_dim(tensor, &dim));
    done(aoti_torch_get_sizes(tensor, &sizes));
    done(aoti_torch_get_strides(tensor, &strides));
    done(aoti_torch_get_dtype(tensor, &dtype));
    done(aoti_torch_get_data_ptr(tensor, &data));
  }

  bool contiguous() const {
    int64_t size = 1;
    bool dense = true;
    for (int64_t d = dim - 1; d >= 0; size *= sizes[d--]) dense &= sizes[d] == 1 || strides[d] == size;
    return dense || !size;
  }

  const float* floats(const char* otherwise) const {
    must(dtype == aoti_torch_dtype_float32() && contiguous(), otherwise);
    return (const float*)data;
  }
};

inline Handle made(int64_t dim, const int64_t* sizes, const int64_t* strides) {
  Handle found;
  const int32_t device = aoti_torch_device_type_cpu();
  done(aoti_torch_empty_strided(dim, sizes, strides, aoti_torch_dtype_float32(), device, 0, &found));
  return found;
}

inline void* data_of(Handle tensor) {
  void* found;
  done(aoti_torch_get_data_ptr(tensor, &found));
  return found;
}

// GOMP_parallel of the runtime that torch has loaded; null where there is none, and one thread works.
inline void* own_threads() {
  static void* const found = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  return found;
}

inline int64_t threads_now() {
  uint32_t found = 1;
  if (own_threads()) done(torch_get_num_threads(&found));
  return found;
}

}  // namespace
