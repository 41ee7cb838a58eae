// The compiled kernels, as what cudaLaunchKernel takes. Each step_*.cu holds those of one parameter dtype and one of
// the state, so that they compile side by side.
#pragma once

#include "cuda/launch.h"

namespace maxva::cuda {

struct Kernel {
  const void* function = nullptr;  // null: there is none for these dtypes
  int threads = 0;
};

// Takes a StepLaunch<double> for kDouble parameters, whose gradients and state are kDouble, and else a
// StepLaunch<float>, for gradients of 32 and 16 bits and state that is kFloat or kBFloat16. With statistics it writes
// those.
Kernel step_kernel_for(DType param, DType grad, DType state, Algorithm algorithm, bool statistics);

// Take a StepLaunch<double> if `twice`, or else a StepLaunch<float>: the first fills its squares, of parameters and
// gradients of any dtype, the second turns them into norms.
Kernel update_chunks_kernel_for(bool twice, Algorithm algorithm);
Kernel update_total_kernel_for(bool twice);

// Takes a NormLaunch<double> if `twice`, or else a NormLaunch<float>, for gradients of 32 and 16 bits, and if
// `twice` of 64.
Kernel norm_chunks_kernel_for(DType grad, bool twice);
Kernel norm_total_kernel_for(bool twice);

Kernel step_kernel_float(DType grad, Algorithm algorithm, bool statistics);
Kernel step_kernel_double(DType grad, Algorithm algorithm, bool statistics);
Kernel step_kernel_half(DType grad, Algorithm algorithm, bool statistics);
Kernel step_kernel_bfloat16(DType grad, Algorithm algorithm, bool statistics);
Kernel step_kernel_float_rounded(DType grad, Algorithm algorithm, bool statistics);
Kernel step_kernel_half_rounded(DType grad, Algorithm algorithm, bool statistics);
Kernel step_kernel_bfloat16_rounded(DType grad, Algorithm algorithm, bool statistics);

}  // namespace maxva::cuda
