// The loop over elements whose state is kept in bfloat16, see Note [Stochastic rounding] and Note [Vectors in the
// source].
#pragma once

#include <cstdint>

#include "cpu/vector.h"
#include "rounding.h"

namespace maxva::cpu {
namespace {

// A block's operands: float32 parameters and gradients, state in bfloat16.
struct RoundedBlock {
  float* param;
  const float* grad;
  BFloat16 *exp_avg, *grad_mean, *grad_var, *weight_sum, *max_denom;
};

// Elements between the two halves of their step.
struct Begun {
  Floats grad, grad_mean, grad_var, weight_sum;
};

// So many vectors are begun before they are finished: each half alone needs fewer registers, and is short enough for a
// core to see the next vector's divisions while it waits for one's.
constexpr int64_t kAhead = 256 / kLanes;

MAXVA_FN Begun begin_lanes(const RoundedBlock& block, int64_t i, const Coefficients<Floats>& c, const Modes modes) {
  Begun begun;
  begun.grad_mean = load(block.grad_mean + i);
  begun.grad_var = load(block.grad_var + i);
  begun.weight_sum = modes.saturated ? Floats(1) : load(block.weight_sum + i);
  Update<Floats> unused;
  begun.grad = begin_update(load(block.param + i), load(block.grad + i), begun.grad_mean, begun.grad_var,
                            begun.weight_sum, c, modes, unused);
  return begun;
}

template <Algorithm kAlgorithm>
MAXVA_FN void finish_lanes(const RoundedBlock& block, int64_t i, const Begun& begun, const Coefficients<Floats>& c,
                           const Modes modes, const RandomBits<Words>& random) {
  const Floats param = load(block.param + i);
  Floats exp_avg = load(block.exp_avg + i);
  Floats most = modes.amsgrad ? load(block.max_denom + i) : Floats(0);
  Update<Floats> update;
  finish_update<kAlgorithm>(param, begun.grad, exp_avg, begun.grad_mean, begun.grad_var, begun.weight_sum, most, c,
                            modes, update);
  store(param - update.change, block.param + i);

  // Where a moment is a NaN the update is one: so one comparison tells, in the place of one for each moment.
  const bool special = any_nan(update.adaptive);
  const auto keep = [&](Floats value, const Words& its_random, BFloat16* to) {
    store_upper(special ? add_random(value, its_random) : to_bits(value) + its_random, to + i);
  };
  keep(exp_avg, random.exp_avg, block.exp_avg);
  keep(begun.grad_mean, random.grad_mean, block.grad_mean);
  keep(begun.grad_var, random.grad_var, block.grad_var);
  if (!modes.saturated) {
    keep(begun.weight_sum, random.weight_sum, block.weight_sum);
  }
  if (modes.amsgrad) {
    alignas(64) float rounded[kLanes];
    store(most, rounded);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      convert(rounded[lane], block.max_denom[i + lane]);
    }
  }
}

// Updates the first of a block's n elements and returns how many: what is left does not fill a vector. `place` is that
// of the first.
template <Algorithm kAlgorithm, EpsMode kEps, WeightDecay kDecay, bool kAmsgrad, bool kSaturated>
inline int64_t update_rounded(const RoundedBlock& operands, int64_t n, const Coefficients<float>& coefficients,
                              RoundingKey key, uint32_t place) {
  constexpr Modes kModes{kEps, kDecay, kAmsgrad, kSaturated};
  const RoundedBlock block = operands;
  const Coefficients<Floats> c = broadcast(coefficients);
  Words places = Words::from(place + key.low);  // once, in place of an addition for each vector
  key.low = 0;
  int64_t i = 0;
  while (i + kLanes <= n) {
    const int64_t left = (n - i) / kLanes, vectors = left < kAhead ? left : kAhead;
    Begun begun[kAhead];
    for (int64_t k = 0; k < vectors; ++k) {
      begun[k] = begin_lanes(block, i + k * kLanes, c, kModes);
    }
    for (int64_t k = 0; k < vectors; ++k, i += kLanes, places = places + uint32_t(kLanes)) {
      finish_lanes<kAlgorithm>(block, i, begun[k], c, kModes, random_bits(key, places));
    }
  }
  return i;
}

}  // namespace
}  // namespace maxva::cpu
