// The compiled kernels, as what cudaLaunchKernel takes. Each step_*.cu holds those of one parameter dtype, so that they
// compile side by side.
#pragma once

#include "cuda/launch.h"

namespace maxva::cuda {

struct Kernel {
  const void* function;  // null: there is none for these dtypes
  int threads;
};

// Takes a StepLaunch<double> for kDouble parameters, whose gradients are kDouble, and else a StepLaunch<float>, for
// gradients of 32 and 16 bits.
Kernel step_kernel_for(DType param, DType grad, Algorithm algorithm);

// Takes a NormLaunch<double> if `twice`, or else a NormLaunch<float>, for gradients of 32 and 16 bits.
Kernel norm_chunks_kernel_for(DType grad, bool twice);
Kernel norm_total_kernel_for(bool twice);

const void* step_kernel_float(DType grad, Algorithm algorithm);
const void* step_kernel_double(DType grad, Algorithm algorithm);
const void* step_kernel_half(DType grad, Algorithm algorithm);
const void* step_kernel_bfloat16(DType grad, Algorithm algorithm);

}  // namespace maxva::cuda
