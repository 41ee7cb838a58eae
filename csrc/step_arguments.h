// The arguments of maxva::step_ (schema: maxva_kernels/_ops.py), for the bindings of every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "maxva.h"
#include "operands.h"

namespace maxva {

struct StepArguments {
  // One entry for each parameter; max_denoms for each of a group with AMSGrad. Of masters (master.h) those have no
  // elements whose parameter has none; with no masters at all the list may be empty.
  std::vector<Tensor> params, grads, exp_avgs, grad_means, grad_vars, weight_sums, max_denoms, masters, steps;
  bool laprop;
  // One entry for each group.
  std::vector<int64_t> group_sizes;
  Tensor lr;
  std::vector<double> beta1, beta2_lower, beta2_upper, beta2_init, eps, weight_decay;
  std::vector<int64_t> decoupled_weight_decay, amsgrad, maximize, adam_eps, stochastic_rounding;
  // Of the whole step.
  std::optional<Tensor> grad_scale, found_inf, grad_norm;
  double max_grad_norm;
  // For each parameter: what its learning rate is multiplied by.
  std::optional<Tensor> trust_ratios;
  // For each parameter: the key by which 16-bit state and parameters are rounded stochastically (rounding.h). May
  // be empty where none are.
  std::vector<int64_t> rounding_keys;
  // For each chunk of each parameter: its StatisticsSums<float>.
  std::optional<Tensor> statistics;
  // For each parameter: its norm and that of its update at learning rate 1. Where these are asked for nothing is
  // stepped.
  std::optional<Tensor> update_norms;
  // For each chunk of each parameter: its stamp, see Note [Saturated chunks].
  std::optional<Tensor> saturation;

  // Whether a parameter has a master.
  bool has_master(size_t param) const { return !masters.empty() && masters[param].numel() > 0; }

  // Raises unless one step can be done on all of it; changes nothing.
  void check() const;

  template <typename T>
  Hyperparameters<T> hyperparameters(size_t group) const {
    const double rate = static_cast<const double*>(lr.const_data_ptr())[group];
    return make_hyperparameters<T>(rate, beta1[group], beta2_lower[group], beta2_upper[group], beta2_init[group],
                                   eps[group], weight_decay[group], decoupled_weight_decay[group] != 0);
  }
};

}  // namespace maxva
