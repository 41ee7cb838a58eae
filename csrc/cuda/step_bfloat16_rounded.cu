// The step kernels of bfloat16 parameters with state in bfloat16.
#include "cuda/kernels.h"
#include "cuda/step.cuh"

namespace maxva::cuda {

Kernel step_kernel_bfloat16_rounded(DType grad, Algorithm algorithm, bool statistics) {
  return select_grad<BFloat16, BFloat16>(grad, algorithm, statistics);
}

}  // namespace maxva::cuda
