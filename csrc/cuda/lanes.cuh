// Lanes of sums of squares in shared memory, added up by the rule of norm.h.
#pragma once

#include "norm.h"

namespace maxva::cuda {

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
