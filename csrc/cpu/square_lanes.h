// A chunk's sums of squares while they are added up, see Note [Deterministic norm].
#pragma once

#include <cstdint>

#include "cpu/independent.h"
#include "norm.h"

namespace maxva::cpu {
namespace {

// Those of some of a chunk's lanes, side by side.
template <typename T>
struct SquareSums {
  T *large, *medium, *small;

  SquareSums from(int64_t lane) const { return {large + lane, medium + lane, small + lane}; }
};

// A chunk's lanes.
template <typename T>
struct SquareLanes {
  alignas(64) T large[kNormLanes] = {}, medium[kNormLanes] = {}, small[kNormLanes] = {};

  SquareSums<T> from(int64_t lane) { return SquareSums<T>{large, medium, small}.from(lane); }

  // Adds the lanes pairwise, see Note [Deterministic norm].
  SumOfSquares<T> sum() {
    for (int64_t stride = kNormLanes / 2; stride > 0; stride /= 2) {
      for (int64_t lane = 0; lane < stride; ++lane) {
        large[lane] += large[lane + stride];
        medium[lane] += medium[lane + stride];
        small[lane] += small[lane + stride];
      }
    }
    return {large[0], medium[0], small[0]};
  }
};

// Adds the squares of n elements to as many lanes. Where all are of usual size, two of the three sums would get zeros,
// and are left alone.
template <typename T>
inline void add_squares(const T* x, int64_t n, const SquareSums<T>& sums) {
  T *const large = sums.large, *const medium = sums.medium, *const small = sums.small;
  int others = 0;
  for (int64_t i = 0; i < n; ++i) {
    others += is_medium(x[i]) ? 0 : 1;
  }
  if (others == 0) {
    MAXVA_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      medium[i] += x[i] * x[i];
    }
    return;
  }
  MAXVA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    add_square(x[i], large[i], medium[i], small[i]);
  }
}

}  // namespace
}  // namespace maxva::cpu
