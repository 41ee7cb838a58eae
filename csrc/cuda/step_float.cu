// The step kernels of float32 parameters.
#include "cuda/kernels.h"
#include "cuda/step.cuh"

namespace maxva::cuda {

Kernel step_kernel_float(DType grad, Algorithm algorithm, bool statistics) {
  return select_grad<float, float>(grad, algorithm, statistics);
}

}  // namespace maxva::cuda
