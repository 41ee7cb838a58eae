// The step kernel for the dtypes of a parameter and its state.
#include "cuda/kernels.h"

namespace maxva::cuda {

Kernel step_kernel_for(DType param, DType grad, DType state, Algorithm algorithm, bool statistics) {
  const bool rounded = state == DType::kBFloat16;
  if (state != (param == DType::kDouble ? DType::kDouble : DType::kFloat) && !rounded) {
    return {};
  }
  const auto select = [&](auto* kept, auto* kept_rounded) {
    return (rounded ? kept_rounded : kept)(grad, algorithm, statistics);
  };
  switch (param) {
    case DType::kFloat:
      return select(step_kernel_float, step_kernel_float_rounded);
    case DType::kHalf:
      return select(step_kernel_half, step_kernel_half_rounded);
    case DType::kBFloat16:
      return select(step_kernel_bfloat16, step_kernel_bfloat16_rounded);
    case DType::kDouble:
      return rounded ? Kernel{} : step_kernel_double(grad, algorithm, statistics);
  }
  return {};
}

}  // namespace maxva::cuda
