// The sum of squares behind the gradient's global norm, in one fixed order and without overflow or underflow.
//
// Note [Deterministic norm]
// Each tensor is cut into chunks of kNormChunk elements. Element i of a chunk belongs to lane i % kNormLanes; a lane
// adds its elements in order, the lanes are added pairwise (lane j += lane j + stride, stride = kNormLanes/2 ... 1),
// and the chunks' sums, in the order of the tensors, are reduced once more by the same rule. Which thread computes a
// lane does not matter, so the result depends neither on threads, nor on vector width, nor on the backend.
//
// Squares of finite values may overflow or vanish, so each lane keeps three sums (J. L. Blue, ACM TOMS 4, 1978):
// large and small values are scaled by a power of two before they are squared. A norm that is itself beyond the largest
// number is that number: so it is finite exactly where all gradients are, and a step can be skipped by it.
#pragma once

#include <cstring>
#include <type_traits>

#include "maxva.h"

namespace maxva {

constexpr int64_t kNormLanes = 1024;
constexpr int64_t kNormChunk = 16 * kNormLanes;

template <typename T>
struct NormScale;
template <>
struct NormScale<float> {
  static constexpr float kLarge = 0x1p44f, kSmall = 0x1p-44f;  // squares of what lies between are summed as they are
  static constexpr float kDown = 0x1p-84f, kUp = 0x1p84f;      // applied before squaring
};
template <>
struct NormScale<double> {
  static constexpr double kLarge = 0x1p400, kSmall = 0x1p-400;
  static constexpr double kDown = 0x1p-560, kUp = 0x1p560;
};

template <typename T>
struct SumOfSquares {
  T large, medium, small;
};

// Those of a tensor's part and of what a step at learning rate 1 would subtract from it.
template <typename T>
struct UpdateSquares {
  SumOfSquares<T> param, update;
};

// a, or 0 where it is not wanted. Of `wanted ? a : 0` gcc's vectors compute what is made of a before they choose, and
// so squares of tiny numbers where nobody wants them, which as subnormals take twenty times as long.
template <typename T>
MAXVA_FN T wanted_or_zero(bool wanted, T a) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits bits;
  std::memcpy(&bits, &a, sizeof(T));
  bits &= Bits(0) - Bits(wanted);
  std::memcpy(&a, &bits, sizeof(T));
  return a;
}

// Adds g^2 to one of the three sums; a NaN goes to medium, an infinity to large.
template <typename T>
MAXVA_FN void add_square(T g, T& large, T& medium, T& small) {
  using S = NormScale<T>;
  const T a = g < T(0) ? -g : g;
  const bool is_large = a >= S::kLarge, is_small = a < S::kSmall;
  const T down = wanted_or_zero(is_large, a) * S::kDown;
  const T up = wanted_or_zero(is_small, a) * S::kUp;
  const T middle = wanted_or_zero(!(is_large || is_small), a);
  large += down * down;
  medium += middle * middle;
  small += up * up;
}

// Whether add_square changes the medium sum alone, by g^2 as it is. Of a vector, which of its elements.
template <typename T>
MAXVA_FN auto is_medium(T g) {
  using S = NormScale<T>;
  const T a = magnitude(g);
  return (a < T(S::kLarge)) & ((T(S::kSmall) <= a) | (a == T(0)));
}

template <typename T>
MAXVA_FN T root(const SumOfSquares<T>& sum) {
  using S = NormScale<T>;
  if (sum.large > T(0)) {
    constexpr T kMax = std::numeric_limits<T>::max();
    const T norm = std::sqrt(sum.large + (sum.medium * S::kDown) * S::kDown) / S::kDown;
    return norm > kMax && sum.large <= kMax ? kMax : norm;
  }
  if (sum.medium == T(0)) {
    return std::sqrt(sum.small) / S::kUp;
  }
  return std::sqrt(sum.medium + (sum.small / S::kUp) / S::kUp);  // also where medium is NaN
}

}  // namespace maxva
