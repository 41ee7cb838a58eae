// What the elements of a tensor share, for the kernels that step and those that only take norms.
#pragma once

#include "cuda/launch.h"

namespace maxva::cuda {

// The last bias correction of a block. The chunks of a model mostly share it, and while one thread computes it, which
// takes some twenty multiplications in a row, its block loads nothing.
template <typename T>
struct BiasCorrection {
  uint64_t alpha_bits;
  int64_t step;  // 0: none yet
  T value;

  __device__ T of(uint64_t its_alpha_bits, int64_t its_step) {
    if (its_step != step || its_alpha_bits != alpha_bits) {
      *this = {its_alpha_bits, its_step, bias_correction<T>(its_alpha_bits, its_step)};
    }
    return value;
  }
};

// What a tensor's elements share. The gradient's factor is read here, on the device, as the step count is, so that no
// host waits for them and a captured graph sees their values of the day.
template <typename T>
__device__ Coefficients<T> read_coefficients(const StepLaunch<T>& launch, const StepGroup<T>& group, int tensor,
                                             T correction) {
  const T scale = launch.grad_scale != nullptr ? *launch.grad_scale : T(1);
  const T norm = launch.grad_norm != nullptr ? *launch.grad_norm : T(0);
  const T max_norm = launch.grad_norm != nullptr ? launch.max_grad_norm : T(-1);
  Hyperparameters<T> hyper = group.hyper;
  if (group.lr != nullptr) {
    hyper.lr = *group.lr;
  }
  if (launch.trust_ratios != nullptr) {
    hyper.lr = hyper.lr * launch.trust_ratios[tensor];
  }
  return make_coefficients(hyper, correction, grad_factor(scale, norm, max_norm, group.maximize));
}

}  // namespace maxva::cuda
