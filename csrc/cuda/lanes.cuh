// Lanes of sums of squares, added up by the rule of norm.h.
#pragma once

#include <cstdint>

#include "float16.h"
#include "norm.h"

namespace maxva::cuda {

// Those of a thread, in its registers.
template <typename T, int kCount>
struct OwnLanes {
  T large[kCount] = {}, medium[kCount] = {}, small[kCount] = {};

  // Adds the squares of kEach elements to each lane, value(i, lane) with i = 0 ... kEach - 1. Where all are of usual
  // size or 0 (is_medium), two of the three sums would get zeros, and are left alone. An H200 has time for 14
  // instructions an element of 16 bits, so whether all are is asked once: of the smallest, by twice its bits less 1,
  // which have no sign and make a 0 the largest of all; and of the sums, which a large element or a NaN would show in.
  // Sums that have grown that large by number only go the longer way.
  template <int kEach, typename Value>
  __device__ __forceinline__ void add(const Value& value) {
    if constexpr (sizeof(T) == sizeof(float)) {
      using S = NormScale<float>;
      uint32_t smallest = ~0u;
      float sums[kCount], total = 0;
#pragma unroll
      for (int lane = 0; lane < kCount; ++lane) {
        sums[lane] = medium[lane];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const float x = value(i, lane);
          sums[lane] += x * x;
          smallest = min(smallest, 2 * to_bits(x) - 1);
        }
        total += sums[lane];
      }
      if (smallest >= 2 * to_bits(S::kSmall) - 1 && total < S::kLarge * S::kLarge) {
#pragma unroll
        for (int lane = 0; lane < kCount; ++lane) {
          medium[lane] = sums[lane];
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int lane = 0; lane < kCount; ++lane) {
        add_square(value(i, lane), large[lane], medium[lane], small[lane]);
      }
    }
  }
};

// Those of a block, in shared memory.
template <typename T>
struct Lanes {
  T large[kNormLanes], medium[kNormLanes], small[kNormLanes];

  __device__ __forceinline__ void set(int lane, T a, T b, T c) {
    large[lane] = a;
    medium[lane] = b;
    small[lane] = c;
  }

  // Adds the lanes pairwise. All threads of the block take part and may then read the sum.
  __device__ __forceinline__ void add_up(int threads) {
    for (int stride = kNormLanes / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int lane = threadIdx.x; lane < stride; lane += threads) {
        set(lane, large[lane] + large[lane + stride], medium[lane] + medium[lane + stride],
            small[lane] + small[lane + stride]);
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ SumOfSquares<T> sum() const { return {large[0], medium[0], small[0]}; }
};

}  // namespace maxva::cuda
