// Quotients and roots in float32 from the hardware's approximations, correctly rounded.
//
// Note [Short chains]
// These are the chains of multiplications that the compiler itself puts before its branch to the rare cases, and
// tests/test_refine.py tries them in all cases that could go wrong: a quotient is right for every approximation of the
// reciprocal that is off by one unit in the last place or less, which is what the hardware promises, except for a power
// of two over a number whose bits are all ones; a root for every one of 1 / sqrt(x) within 2^-22.9, except for two x.
// In these the result is that of the compiler's own chain, and right if the approximation is a little better.
#pragma once

#include <cmath>
#include <cstdint>

#include "float16.h"
#include "maxva.h"

namespace maxva::cuda {

// x / y, if neither x nor the result is outside. `inverse` is about 1 / y, a subnormal one 0.
MAXVA_FN float refine_quotient(float x, float y, float inverse) {
  inverse = std::fma(inverse, std::fma(-y, inverse, 1.0f), inverse);
  const float quotient = x * inverse;
  return std::fma(std::fma(-y, quotient, x), inverse, quotient);
}

// The square root of x, if x is not outside. `inverse` is about 1 / sqrt(x).
MAXVA_FN float refine_root(float x, float inverse) {
  const float root = x * inverse;
  return std::fma(std::fma(-root, root, x), 0.5f * inverse, root);
}

// x / y for an x that is 0.
MAXVA_FN float zero_quotient(float x, float y) {
  return magnitude(y) > 0 ? from_bits((to_bits(x) ^ to_bits(y)) & 0x80000000u) : from_bits(0x7fffffffu);
}

// Not 0 where |x| is less than 2^-100, or 2^28 or more, or x a NaN. Between them the remainders, which must be exact,
// are no subnormals, and the squares of gradients lie that a network learns from. That there are 128 exponents makes it
// a single bit.
MAXVA_FN uint32_t is_outside(float x) {
  constexpr uint32_t kLeastExponent = 127 - 100;
  return (to_bits(x) - (kLeastExponent << 23)) & 0x40000000u;
}

}  // namespace maxva::cuda
