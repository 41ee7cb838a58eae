// The step kernels of float16 parameters with state in bfloat16.
#include "cuda/kernels.h"
#include "cuda/step.cuh"

namespace maxva::cuda {

Kernel step_kernel_half_rounded(DType grad, Algorithm algorithm, bool statistics) {
  return select_grad<Half, BFloat16>(grad, algorithm, statistics);
}

}  // namespace maxva::cuda
