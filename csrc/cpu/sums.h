// The sum of chunks' sums of squares.
#pragma once

#include <cstddef>
#include <vector>

#include "norm.h"

namespace maxva::cpu {

// The sums of `count` chunks, reduced by the rule that reduced each chunk, see Note [Deterministic norm].
template <typename T>
SumOfSquares<T> add_up(const SumOfSquares<T>* sums, size_t count) {
  std::vector<SumOfSquares<T>> lanes(kNormLanes, SumOfSquares<T>{0, 0, 0});
  const auto add = [](SumOfSquares<T>& to, const SumOfSquares<T>& from) {
    to.large += from.large;
    to.medium += from.medium;
    to.small += from.small;
  };
  for (size_t i = 0; i < count; ++i) {
    add(lanes[i % kNormLanes], sums[i]);
  }
  for (int64_t stride = kNormLanes / 2; stride > 0; stride /= 2) {
    for (int64_t lane = 0; lane < stride; ++lane) {
      add(lanes[lane], lanes[lane + stride]);
    }
  }
  return lanes[0];
}

}  // namespace maxva::cpu
