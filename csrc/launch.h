// SUPY_LAUNCH(op, params, tensor): calls op_cpu or op_cuda, where the tensor lives, without holding Python's lock.
#pragma once
#include "tensor.h"

#ifdef SUPY_CUDA_VERSION
#define SUPY_LAUNCH_CUDA(op, params, tensor) op##_cuda(params, (tensor).device_index(), stream)
#else
#define SUPY_LAUNCH_CUDA(op, params, tensor) \
  throw std::runtime_error("supy." #op ": this build has no CUDA kernels (nvcc was not found when it was compiled)")
#endif

#define SUPY_LAUNCH(op, params, tensor)       \
  do {                                        \
    void* stream = (tensor).stream();         \
    (void)stream;                             \
    py::gil_scoped_release without_lock;      \
    if ((tensor).is_cuda())                   \
      SUPY_LAUNCH_CUDA(op, params, tensor);   \
    else                                      \
      op##_cpu(params);                       \
  } while (0)
