// Stochastic rounding of state and parameters to 16 bits.
//
// Note [Stochastic rounding]
// A moving average moves by less than half a unit in a bfloat16's last place in nearly every step: rounded to nearest
// it would stand still. Rounded up with the probability of what is cut off, it is right on average. The random numbers
// are a function of the tensor's key, the step and the element's place in memory: so they depend neither on who
// computes an element, nor on when a run was resumed. 16 bits are cut off and as many are drawn, for less would lose
// updates again: near 1, w moves by a thousandth of its last place.
#pragma once

#include "float16.h"
#include "maxva.h"

namespace maxva {

// What the elements of a tensor share in a step.
struct RoundingKey {
  uint32_t low, high;
};

// Random numbers of 16 bits; what is above them is 0. A word is a uint32_t or, in the CPU kernel, a vector of them.
template <typename Word>
struct RandomBits {
  Word exp_avg, grad_mean, grad_var, weight_sum, param;
};

// A bijection that leaves no bit where it was (the finalizer of SplitMix64; Steele et al., 2014).
MAXVA_FN uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// `step` is the count of steps with this one.
MAXVA_FN RoundingKey rounding_key(uint64_t tensor_key, int64_t step) {
  const uint64_t key = mix(tensor_key + static_cast<uint64_t>(step));
  const uint32_t high = static_cast<uint32_t>(key >> 32);
  return {static_cast<uint32_t>(key), high ^ (high >> 15)};  // as it is after a shift of random_bits
}

// A hash of 32 bits (two rounds of multiplication and shift; the constants are lowbias32's, by Wellons, 2018), which
// serves two of the five, and times odd numbers the others: each is uniform, and no two are correlated. Elements whose
// places are 2^32 apart have the same numbers, which makes neither of them wrong on average.
template <typename Word>
MAXVA_FN RandomBits<Word> random_bits(RoundingKey key, Word element) {
  Word x = element + key.low;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15) ^ key.high) * 0x846ca68bu;
  const Word upper = x >> 16;  // which the last exclusive or leaves as it is
  x = x ^ upper;
  const Word y = x * 0x9e3779b1u;
  return {x & 0xffffu, upper, y & 0xffffu, y >> 16, (x * 0x85ebca77u) >> 16};
}

// The bits of x, of which the upper 16 are its rounded form. Infinity stays. So does a NaN, which is only cut: a carry
// could make it 0. That it is quiet, as all that come from arithmetic, its upper half tells.
template <typename T, typename Word>
MAXVA_FN Word add_random(T x, Word random, bool may_be_nan = true) {
  return to_bits(x) + (may_be_nan ? select(x == x, random, Word(0)) : random);
}

MAXVA_FN BFloat16 round_stochastically(float x, uint32_t random) {
  return {static_cast<uint16_t>(add_random(x, random) >> 16)};
}

}  // namespace maxva
