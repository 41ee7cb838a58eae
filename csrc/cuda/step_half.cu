// The step kernels of float16 parameters.
#include "cuda/kernels.h"
#include "cuda/step.cuh"

namespace maxva::cuda {

Kernel step_kernel_half(DType grad, Algorithm algorithm, bool statistics) {
  return select_grad<Half, float>(grad, algorithm, statistics);
}

}  // namespace maxva::cuda
