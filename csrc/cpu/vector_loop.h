// The loop over float32 arithmetic, written in vectors, see Note [Vectors in the source].
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/square_lanes.h"
#include "cpu/vector.h"
#include "rounding.h"

namespace maxva::cpu {
namespace {

// A block's operands. Moments are kept in float32 or, rounded stochastically, in bfloat16, see Note [Stochastic
// rounding].
template <typename Kept>
struct VectorBlock {
  float* param;
  const float* grad;
  Kept *exp_avg, *grad_mean, *grad_var, *weight_sum, *max_denom;
};

// Elements between the two halves of their step.
struct Begun {
  Floats grad, grad_mean, grad_var, weight_sum;
};

// So many vectors are begun before they are finished: each half alone needs fewer registers, and is short enough for a
// core to see the next vector's divisions while it waits for one's.
constexpr int64_t kAhead = 256 / kLanes;

// While a batch of vectors is begun, memory is asked for the next: each array is read for one batch and then left alone
// for as long, which the hardware does not foresee. Behind a block's end the next block lies, or nothing is fetched.
template <typename T>
MAXVA_FN void fetch(const T* from) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t lane = 0; lane < kLanes; lane += kLine) {
    __builtin_prefetch(from + lane);
  }
}
template <typename Kept>
MAXVA_FN void fetch_lanes(const VectorBlock<Kept>& block, int64_t i, const Modes modes) {
  fetch(block.param + i);
  fetch(block.grad + i);
  fetch(block.exp_avg + i);
  fetch(block.grad_mean + i);
  fetch(block.grad_var + i);
  if (!modes.saturated) {
    fetch(block.weight_sum + i);
  }
}

MAXVA_FN void nearest(Floats x, float* to) {
  store(x, to);
}
MAXVA_FN void nearest(Floats x, BFloat16* to) {
  alignas(64) float lanes[kLanes];
  store(x, lanes);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    convert(lanes[lane], to[lane]);
  }
}

template <typename Kept>
MAXVA_FN Begun begin_lanes(const VectorBlock<Kept>& block, int64_t i, const Coefficients<Floats>& c,
                           const Modes modes) {
  Begun begun;
  begun.grad_mean = load(block.grad_mean + i);
  begun.grad_var = load(block.grad_var + i);
  begun.weight_sum = modes.saturated ? Floats(1) : load(block.weight_sum + i);
  Update<Floats> unused;
  begun.grad = begin_update(load(block.param + i), load(block.grad + i), begun.grad_mean, begun.grad_var,
                            begun.weight_sum, c, modes, unused);
  return begun;
}

template <Algorithm kAlgorithm, typename Kept>
MAXVA_FN void finish_lanes(const VectorBlock<Kept>& block, int64_t i, const Begun& begun, const Coefficients<Floats>& c,
                           const Modes modes, const RandomBits<Words>& random) {
  const Floats param = load(block.param + i);
  Floats exp_avg = load(block.exp_avg + i);
  Floats most = modes.amsgrad ? load(block.max_denom + i) : Floats(0);
  Update<Floats> update;
  finish_update<kAlgorithm>(param, begun.grad, exp_avg, begun.grad_mean, begun.grad_var, begun.weight_sum, most, c,
                            modes, update);
  store(param - update.change, block.param + i);

  // Where a moment is a NaN so is the update: one comparison in place of one for each moment.
  const bool special = std::is_same_v<Kept, BFloat16> && any_nan(update.adaptive);
  const auto keep = [&](Floats value, const Words& its_random, Kept* to) {
    if constexpr (std::is_same_v<Kept, float>) {
      store(value, to + i);
    } else {
      store_upper(add_random(value, its_random, special), to + i);
    }
  };
  keep(exp_avg, random.exp_avg, block.exp_avg);
  keep(begun.grad_mean, random.grad_mean, block.grad_mean);
  keep(begun.grad_var, random.grad_var, block.grad_var);
  if (!modes.saturated) {
    keep(begun.weight_sum, random.weight_sum, block.weight_sum);
  }
  if (modes.amsgrad) {
    nearest(most, block.max_denom + i);  // of rounded maxima the largest would stay, and grow
  }
}

// Begins the step of n elements, which fill vectors, batch by batch, and calls finish(i, begun) for each vector, whose
// first element is i.
template <typename Kept, typename Finish>
MAXVA_FN void walk_whole(const VectorBlock<Kept>& block, int64_t n, const Coefficients<Floats>& c, const Modes modes,
                         Finish finish) {
  for (int64_t i = 0; i < n;) {
    const int64_t left = (n - i) / kLanes, vectors = left < kAhead ? left : kAhead;
    Begun begun[kAhead];
    for (int64_t k = 0; k < vectors; ++k) {
      fetch_lanes(block, i + (k + kAhead) * kLanes, modes);
      begun[k] = begin_lanes(block, i + k * kLanes, c, modes);
    }
    for (int64_t k = 0; k < vectors; ++k, i += kLanes) {
      finish(i, begun[k]);
    }
  }
}

// Updates a block's n elements, which fill vectors. `place` is that of the first.
template <Algorithm kAlgorithm, EpsMode kEps, WeightDecay kDecay, bool kAmsgrad, bool kSaturated, typename Kept>
[[gnu::noinline]] static void update_whole(const VectorBlock<Kept> block, int64_t n,
                                           const Coefficients<float>& coefficients, RoundingKey key, uint32_t place) {
  constexpr Modes kModes{kEps, kDecay, kAmsgrad, kSaturated};
  const Coefficients<Floats> c = broadcast<Floats>(coefficients);
  Words places = Words::from(place + key.low);  // once, in place of an addition for each vector
  key.low = 0;
  walk_whole(block, n, c, kModes, [&](int64_t i, const Begun& begun) {
    finish_lanes<kAlgorithm>(block, i, begun, c, kModes, random_bits(key, places));
    places = places + uint32_t(kLanes);
  });
}

// Copies what a step changes of `count` elements.
template <typename Kept>
inline void copy(const VectorBlock<Kept>& from, const VectorBlock<Kept>& to, int64_t count, const Modes modes) {
  std::memcpy(to.param, from.param, count * sizeof(float));
  std::memcpy(to.exp_avg, from.exp_avg, count * sizeof(Kept));
  std::memcpy(to.grad_mean, from.grad_mean, count * sizeof(Kept));
  std::memcpy(to.grad_var, from.grad_var, count * sizeof(Kept));
  if (!modes.saturated) {
    std::memcpy(to.weight_sum, from.weight_sum, count * sizeof(Kept));
  }
  if (modes.amsgrad) {
    std::memcpy(to.max_denom, from.max_denom, count * sizeof(Kept));
  }
}

inline void copy(const SquareSums<float>& from, const SquareSums<float>& to, int64_t count) {
  std::memcpy(to.large, from.large, count * sizeof(float));
  std::memcpy(to.medium, from.medium, count * sizeof(float));
  std::memcpy(to.small, from.small, count * sizeof(float));
}

// Elements that do not fill a vector, copied to where one has room.
template <typename Kept>
struct PaddedVector {
  float param[kLanes] = {}, grad[kLanes] = {};
  Kept moments[5][kLanes] = {};
  const VectorBlock<Kept> block{param, grad, moments[0], moments[1], moments[2], moments[3], moments[4]};

  PaddedVector(const VectorBlock<Kept>& from, int64_t count, const Modes modes) {
    std::memcpy(grad, from.grad, count * sizeof(float));
    copy(from, block, count, modes);
  }
};

// A block without its first elements.
template <typename Kept>
inline VectorBlock<Kept> behind(const VectorBlock<Kept>& block, int64_t first, const Modes modes) {
  return {block.param + first,
          block.grad + first,
          block.exp_avg + first,
          block.grad_mean + first,
          block.grad_var + first,
          block.weight_sum + first,
          modes.amsgrad ? block.max_denom + first : nullptr};
}

// Updates a block's n elements.
template <Algorithm kAlgorithm, EpsMode kEps, WeightDecay kDecay, bool kAmsgrad, bool kSaturated, typename Kept>
inline void update_vectors(const VectorBlock<Kept>& block, int64_t n, const Coefficients<float>& c, RoundingKey key,
                           uint32_t place) {
  constexpr auto update = update_whole<kAlgorithm, kEps, kDecay, kAmsgrad, kSaturated, Kept>;
  constexpr Modes kModes{kEps, kDecay, kAmsgrad, kSaturated};
  const int64_t whole = n / kLanes * kLanes, rest = n - whole;
  update(block, whole, c, key, place);
  if (rest != 0) {
    const VectorBlock<Kept> last = behind(block, whole, kModes);
    const PaddedVector<Kept> padded(last, rest, kModes);
    update(padded.block, kLanes, c, key, place + static_cast<uint32_t>(whole));
    copy(padded.block, last, rest, kModes);
  }
}

// Adds the squares of a vector's elements to as many lanes.
MAXVA_FN void add_squares(Floats x, const SquareSums<float>& sums) {
  if (all(is_medium(x))) {
    return store(load(sums.medium) + x * x, sums.medium);
  }
  alignas(64) float numbers[kLanes];
  store(x, numbers);
  add_squares(numbers, kLanes, sums);
}

// Adds the squares of a block's n parameters, which fill vectors, and of their changes to as many lanes. It loads as
// `finish_lanes` does; what the two could share cost the step registers.
template <Algorithm kAlgorithm, EpsMode kEps, WeightDecay kDecay, bool kAmsgrad, bool kSaturated>
[[gnu::noinline]] static void square_whole(const VectorBlock<float> block, int64_t n,
                                           const Coefficients<float>& coefficients, const SquareSums<float> params,
                                           const SquareSums<float> changes) {
  constexpr Modes kModes{kEps, kDecay, kAmsgrad, kSaturated};
  const Coefficients<Floats> c = broadcast<Floats>(coefficients);
  walk_whole(block, n, c, kModes, [&](int64_t i, const Begun& begun) {
    const Floats param = load(block.param + i);
    Floats exp_avg = load(block.exp_avg + i);
    Floats most = kAmsgrad ? load(block.max_denom + i) : Floats(0);
    Update<Floats> update;
    finish_update<kAlgorithm>(param, begun.grad, exp_avg, begun.grad_mean, begun.grad_var, begun.weight_sum, most, c,
                              kModes, update);
    add_squares(param, params.from(i));
    add_squares(update.change, changes.from(i));
  });
}

// The lanes of a padded vector.
struct PaddedSums {
  float numbers[3][kLanes] = {};
  const SquareSums<float> sums{numbers[0], numbers[1], numbers[2]};

  PaddedSums(const SquareSums<float>& from, int64_t count) { copy(from, sums, count); }
};

// Adds the squares of a block's n parameters, and of their changes, to as many lanes.
template <Algorithm kAlgorithm, EpsMode kEps, WeightDecay kDecay, bool kAmsgrad, bool kSaturated>
inline void square_vectors(const VectorBlock<float>& block, int64_t n, const Coefficients<float>& c,
                           const SquareSums<float>& params, const SquareSums<float>& changes) {
  constexpr auto square = square_whole<kAlgorithm, kEps, kDecay, kAmsgrad, kSaturated>;
  constexpr Modes kModes{kEps, kDecay, kAmsgrad, kSaturated};
  const int64_t whole = n / kLanes * kLanes, rest = n - whole;
  square(block, whole, c, params, changes);
  if (rest != 0) {
    const SquareSums<float> last_params = params.from(whole), last_changes = changes.from(whole);
    const PaddedVector<float> padded(behind(block, whole, kModes), rest, kModes);
    const PaddedSums padded_params(last_params, rest), padded_changes(last_changes, rest);
    square(padded.block, kLanes, c, padded_params.sums, padded_changes.sums);
    copy(padded_params.sums, last_params, rest);
    copy(padded_changes.sums, last_changes, rest);
  }
}

}  // namespace
}  // namespace maxva::cpu
