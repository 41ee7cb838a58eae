// Between elements as they are stored and several numbers of the arithmetic's type.
//
// Note [Pairs]
// Two bfloat16 are read from their word and written to it together: an instruction to widen each and one to pack both,
// where single ones are first cut out, and then shifted, packed and kept in a register each.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/several.cuh"
#include "float16.h"
#include "master.h"
#include "rounding.h"

namespace maxva::cuda {

// kCount elements side by side, as the arithmetic's type.
template <typename T, int kCount, typename Stored>
__device__ __forceinline__ Several<T, kCount> open(const Stored* stored) {
  Several<T, kCount> values;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if constexpr (std::is_same_v<Stored, BFloat16>) {
      uint32_t pair;
      std::memcpy(&pair, stored + k / 2 * 2, sizeof(pair));
      values[k] = from_bits(k % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    } else {
      values[k] = widen<T>(stored[k]);
    }
  }
  return values;
}

// And back: in the arithmetic's type, or rounded stochastically. `random(k)` gives a lane's number.
template <typename T, int kCount, typename Random>
__device__ __forceinline__ void keep(const Several<T, kCount>& values, bool, const Random&, T* stored) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    stored[k] = values[k];
  }
}
template <int kCount, typename Random>
__device__ __forceinline__ void keep(const Several<float, kCount>& values, bool may_be_nan, const Random& random,
                                     BFloat16* stored) {
#pragma unroll
  for (int k = 0; k < kCount; k += 2) {
    const auto rounded = [&](int lane) { return add_random(values[lane], random(lane), may_be_nan); };
    const uint32_t pair = __byte_perm(rounded(k), rounded(k + 1), 0x7632);  // their upper halves
    std::memcpy(stored + k, &pair, sizeof(pair));
  }
}

template <int kCount, typename Stored>
__device__ __forceinline__ void fill_ones(Stored (&values)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    values[k] = one<Stored>();
  }
}

template <int kCount, typename Stored>
__device__ __forceinline__ bool all_ones(const Stored (&values)[kCount]) {
  if constexpr (std::is_same_v<Stored, BFloat16>) {
    uint32_t pairs[kCount / 2], differences = 0;
    std::memcpy(pairs, values, sizeof(pairs));
#pragma unroll
    for (const uint32_t pair : pairs) {
      differences |= pair ^ 0x3f803f80u;  // two ones
    }
    return differences == 0;
  }
  bool every = true;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    every = every && is_one(values[k]);
  }
  return every;
}

// Values of parameters, which only in bfloat16 may have masters.
template <typename T, int kCount, typename Param>
__device__ __forceinline__ Several<T, kCount> open_params(const Param* params, bool has_master, const int16_t* rests) {
  if constexpr (std::is_same_v<Param, BFloat16>) {
    if (has_master) {
      return each<kCount>([&](int k) { return join_master(params[k], rests[k]); });
    }
  }
  return open<T, kCount>(params);
}
// And back. `random(k)` gives a lane's RandomBits.
template <typename T, int kCount, typename Param, typename Random>
__device__ __forceinline__ void close_params(const Several<T, kCount>& values, bool has_master, bool rounds,
                                             bool may_be_nan, const Random& random, Param* params, int16_t* rests) {
  const auto for_each = [&](const auto& close) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      close(k);
    }
  };
  if constexpr (std::is_same_v<Param, BFloat16>) {
    if (has_master) {
      return for_each([&](int k) { split_master(values[k], params[k], rests[k], may_be_nan); });
    }
    if (rounds) {
      return keep(values, may_be_nan, [&](int k) { return random(k).param; }, params);
    }
  }
  for_each([&](int k) { convert(values[k], params[k]); });
}

}  // namespace maxva::cuda
