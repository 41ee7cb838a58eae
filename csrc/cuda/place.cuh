// Where the elements of a thread lie, and their loads and stores.
//
// Note [Alignment]
// A thread takes kWidth consecutive elements, 16 bytes of the narrowest operand. A tensor may begin anywhere in such a
// packet (a view of a flat buffer does): its chunks are cut where packets begin, `shift` elements early, and only the
// packets over its two ends go element by element. That needs all operands to begin at the same place of a packet.
// Where they don't, the threads of that tensor take elements that are a block apart: every access is one element
// wide, and those of a warp still lie side by side.
#pragma once

#include "cuda/packet.cuh"
#include "cuda/several.cuh"

namespace maxva::cuda {

// The elements of one thread in one turn: element k lies `first + k * spacing` behind where the chunk begins.
struct Place {
  int first;
  int begin, end;  // the chunk's elements that are there: before and beyond lie none, or other chunks'
  int spacing;
  bool whole;  // all are there and lie in aligned packets

  // Calls access(true or false), as a type that `load` and `store` take for kWhole: one branch for all operands.
  template <typename Access>
  __device__ __forceinline__ void if_whole(const Access& access) const {
    with_constant(whole, access);
  }

  // Where element k is, or -1 if it is not there. The empty statement hides how it was computed: else the compiler
  // keeps the addresses of these rare accesses from the loads to the stores, and spills other registers for them.
  __device__ __forceinline__ int find(int k) const {
    int i = first + k * spacing;
    asm volatile("" : "+r"(i));
    return i >= begin && i < end ? i : -1;
  }

  // Elements from ... from + kCount - 1 of the thread.
  template <bool kWhole, int kCount, typename Stored>
  __device__ __forceinline__ void load(const Stored* memory, int from, Stored (&to)[kCount]) const {
    if constexpr (kWhole) {
      load_packets(memory + first + from, to);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const int i = find(from + k);
        if (i >= 0) {
          to[k] = *in_global_memory(memory + i);
        }
      }
    }
  }

  template <bool kWhole, int kCount, typename Stored>
  __device__ __forceinline__ void store(const Stored (&values)[kCount], int from, Stored* memory) const {
    if constexpr (kWhole) {
      store_packets(values, memory + first + from);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const int i = find(from + k);
        if (i >= 0) {
          *in_global_memory(memory + i) = values[k];
        }
      }
    }
  }
};

}  // namespace maxva::cuda
