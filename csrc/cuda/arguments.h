// From what Python passes to the arguments of a launch. Neither torch nor CUDA is known here, so that tests can fill a
// launch on any machine and hand it to a simulated kernel.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace maxva::cuda {

// A parameter group as maxva_kernels/launch.py packs it: eight bytes for each field.
struct PackedGroup {
  double lr;
  uint64_t lr_address;  // of a device scalar in place of lr, or 0
  double beta1, beta2_lower, beta2_upper, beta2_init, eps, weight_decay;
  int64_t decoupled_weight_decay, maximize, adam_eps, stochastic_rounding;
};

// Addresses are of device memory. The scalars have the arithmetic's type; an address 0 is a scalar that is absent.
struct StepInput {
  int64_t param_dtype, grad_dtype, state_dtype;
  uint64_t rows, chunk_rows;
  int64_t chunks;
  uint64_t ticket, grad_scale, found_inf, grad_norm, trust_ratios, statistics, saturation, squares, norms;
  double max_grad_norm;
  const PackedGroup* groups = nullptr;
  int64_t group_count = 0;
  const uint64_t* grads = nullptr;
  int64_t tensors = 0;
};

struct NormInput {
  uint64_t rows, chunk_rows;
  int64_t chunks;
  uint64_t sums;
  const uint64_t* grads = nullptr;
  int64_t tensors = 0;
};

// Raises unless the groups and tensors fit a launch. What lies beyond them in `launch` stays as it is.
template <typename T>
void fill(StepLaunch<T>& launch, const StepInput& input);
template <typename T>
void fill(NormLaunch<T>& launch, const NormInput& input);

}  // namespace maxva::cuda
