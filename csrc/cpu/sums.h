// The sum of chunks' sums of squares.
#pragma once

#include <cstddef>

#include "cpu/square_lanes.h"

namespace maxva::cpu {

// The sums of `count` chunks, reduced by the rule that reduced each chunk, see Note [Deterministic norm].
template <typename T>
SumOfSquares<T> add_up(const SumOfSquares<T>* sums, size_t count) {
  SquareLanes<T> lanes;
  for (size_t i = 0; i < count; ++i) {
    const size_t lane = i % kNormLanes;
    lanes.large[lane] += sums[i].large;
    lanes.medium[lane] += sums[i].medium;
    lanes.small[lane] += sums[i].small;
  }
  return lanes.sum();
}

}  // namespace maxva::cpu
