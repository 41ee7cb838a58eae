// The step kernels of bfloat16 parameters.
#include "cuda/kernels.h"
#include "cuda/step.cuh"

namespace maxva::cuda {

Kernel step_kernel_bfloat16(DType grad, Algorithm algorithm, bool statistics) {
  return select_grad<BFloat16, float>(grad, algorithm, statistics);
}

}  // namespace maxva::cuda
