// The gradient's global norm by the rule of norm.h, in two stages: blocks sum the squares of chunks, one block adds up
// the chunks. No atomics: which block takes which chunk changes nothing.
#pragma once

#include "cuda/lanes.cuh"
#include "cuda/launch.h"
#include "cuda/packet.cuh"
#include "float16.h"

namespace maxva::cuda {

// A thread adds up as many lanes as a packet has elements.
template <typename Grad>
constexpr int kNormThreads = int(kNormLanes) / kPerPacket<Grad>;
constexpr int kNormTotalThreads = 1024;
// Packets that a thread has under way at once.
constexpr int kNormAhead = 4;
static_assert(kNormChunk / kNormLanes % kNormAhead == 0);

template <typename T, typename Grad>
__global__ void __launch_bounds__(kNormThreads<Grad>) norm_chunks_kernel(const __grid_constant__ NormLaunch<T> launch) {
  constexpr int kThreads = kNormThreads<Grad>, kWidth = kPerPacket<Grad>;
  __shared__ Lanes<T> lanes;
  for (int64_t chunk = blockIdx.x; chunk < launch.chunks; chunk += gridDim.x) {
    const int tensor = launch.chunk_rows[chunk];
    const NormRow row = launch.rows[tensor];
    const int64_t index = chunk - row.first_chunk, begin = index * kNormChunk;
    const Grad* grad = static_cast<const Grad*>(launch.grads[tensor]) + begin;
    const int count = int(row.numel - begin < kNormChunk ? row.numel - begin : kNormChunk);

    // 1. Each thread's lanes: neighbours in aligned packets, or else kThreads apart, so that those of a warp are
    // neighbours. An element that is not there counts as 0, which adds nothing.
    const bool packets = is_packet_aligned(grad);
    const int first = packets ? threadIdx.x * kWidth : threadIdx.x, spacing = packets ? 1 : kThreads;
    OwnLanes<T, kWidth> own;
    for (int base = 0; base < count; base += kNormLanes * kNormAhead) {
      Grad values[kNormAhead][kWidth] = {};
#pragma unroll
      for (int i = 0; i < kNormAhead; ++i) {
        const int at = base + i * int(kNormLanes) + first;
        if (packets && at + kWidth <= count) {
          load_packets(grad + at, values[i]);
        } else {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            if (at + k * spacing < count) {
              values[i][k] = *in_global_memory(grad + at + k * spacing);
            }
          }
        }
      }
      own.template add<kNormAhead>([&](int i, int lane) { return widen<T>(values[i][lane]); });
    }

    // 2. The lanes together.
    __syncthreads();  // the last chunk's sum has been read
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      lanes.set(first + k * spacing, own.large[k], own.medium[k], own.small[k]);
    }
    lanes.add_up(kThreads);
    if (threadIdx.x == 0) {
      launch.sums[row.first_sum + index] = lanes.sum();
    }
  }
}

// One block: the root of all chunks' sums together.
template <typename T>
__global__ void __launch_bounds__(kNormTotalThreads)
    norm_total_kernel(const SumOfSquares<T>* sums, int64_t chunks, T* norm) {
  static_assert(kNormTotalThreads == kNormLanes);
  __shared__ Lanes<T> lanes;
  T large = 0, medium = 0, small = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kNormLanes) {
    large += sums[i].large;
    medium += sums[i].medium;
    small += sums[i].small;
  }
  lanes.set(threadIdx.x, large, medium, small);
  lanes.add_up(kNormTotalThreads);
  if (threadIdx.x == 0) {
    *norm = root(lanes.sum());
  }
}

}  // namespace maxva::cuda
