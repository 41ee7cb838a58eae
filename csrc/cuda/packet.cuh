// Sixteen bytes at a time between memory and registers.
#pragma once

#include <cstdint>
#include <cstring>

namespace maxva::cuda {

constexpr int kPacketBytes = 16;

// How many elements of a type one packet holds.
template <typename Stored>
constexpr int kPerPacket = kPacketBytes / int(sizeof(Stored));

template <typename Stored>
__device__ __forceinline__ bool is_packet_aligned(const Stored* address) {
  return reinterpret_cast<uintptr_t>(address) % kPacketBytes == 0;
}

// A pointer that was itself read from memory may point anywhere for all the compiler knows. These accesses are to
// global memory, for which there are instructions that need not ask.
template <typename Stored>
__device__ __forceinline__ Stored* in_global_memory(Stored* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// kCount consecutive elements, a whole number of packets, from an aligned address.
template <int kCount, typename Stored>
__device__ __forceinline__ void load_packets(const Stored* from, Stored (&to)[kCount]) {
  static_assert(kCount % kPerPacket<Stored> == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += kPerPacket<Stored>) {
    const uint4 packet = *in_global_memory(reinterpret_cast<const uint4*>(from + i));
    std::memcpy(to + i, &packet, kPacketBytes);
  }
}

template <int kCount, typename Stored>
__device__ __forceinline__ void store_packets(const Stored (&from)[kCount], Stored* to) {
  static_assert(kCount % kPerPacket<Stored> == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += kPerPacket<Stored>) {
    uint4 packet;
    std::memcpy(&packet, from + i, kPacketBytes);
    asm("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to + i), "r"(packet.x), "r"(packet.y), "r"(packet.z),
        "r"(packet.w)
        : "memory");
  }
}

}  // namespace maxva::cuda
