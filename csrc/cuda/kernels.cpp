// The step kernel for a parameter's dtype.
#include "cuda/kernels.h"

namespace maxva::cuda {

Kernel step_kernel_for(DType param, DType grad, Algorithm algorithm, bool statistics) {
  switch (param) {
    case DType::kFloat:
      return {step_kernel_float(grad, algorithm, statistics), kStepThreads};
    case DType::kDouble:
      return {step_kernel_double(grad, algorithm, statistics), kStepThreads};
    case DType::kHalf:
      return {step_kernel_half(grad, algorithm, statistics), kStepThreads};
    case DType::kBFloat16:
      return {step_kernel_bfloat16(grad, algorithm, statistics), kStepThreads};
  }
  return {nullptr, kStepThreads};
}

}  // namespace maxva::cuda
