// The step kernels of float64 parameters, the only ones with float64 arithmetic.
#include "cuda/kernels.h"
#include "cuda/step.cuh"

namespace maxva::cuda {

Kernel step_kernel_double(DType grad, Algorithm algorithm, bool statistics) {
  return grad == DType::kDouble ? select_algorithm<double, double, double, double>(algorithm, statistics) : Kernel{};
}

}  // namespace maxva::cuda
