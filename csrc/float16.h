// Conversions between float and the 16-bit formats: the device's own instructions, and on the host bit operations that
// every instruction set vectorises alike. Round to nearest even; overflow gives infinity; NaN stays NaN.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>
#include <cstring>

#include "maxva.h"

namespace maxva {

// Storage only: arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

MAXVA_FN uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

MAXVA_FN float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// On a device too: of a number in a word's upper half the compiler makes one instruction, where the intrinsic takes
// two.
MAXVA_FN float to_float(BFloat16 x) {
  return from_bits(uint32_t(x.bits) << 16);
}

#if defined(__CUDA_ARCH__)

MAXVA_FN float to_float(Half x) {
  return __half2float(__ushort_as_half(x.bits));
}
MAXVA_FN void convert(float x, BFloat16& out) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
MAXVA_FN void convert(float x, Half& out) {
  out.bits = __half_as_ushort(__float2half_rn(x));
}

#else

MAXVA_FN float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // The exponent moves from a bias of 15 to 127 by a multiplication, which also normalises subnormals.
  const uint32_t finite = to_bits(from_bits(magnitude << 13) * 0x1p112f);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  return from_bits(sign | (magnitude >= 0x7c00u ? special : finite));
}

MAXVA_FN void convert(float x, BFloat16& out) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

MAXVA_FN void convert(float x, Half& out) {
  const uint32_t bits = to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal: round at bit 13 and change the exponent's bias; a carry may run into infinity, which is right.
  const uint32_t normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  // Subnormal: 0.5f has the spacing of half's subnormals, so adding it rounds to them.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = uint16_t(sign | half);
}

#endif

MAXVA_FN float to_float(float x) {
  return x;
}
MAXVA_FN float to_float(double x) {
  return static_cast<float>(x);
}
MAXVA_FN void convert(float x, float& out) {
  out = x;
}
MAXVA_FN void convert(double x, double& out) {
  out = x;
}

// The number 1 as it is stored.
template <typename Stored>
MAXVA_FN Stored one() {
  if constexpr (sizeof(Stored) == 2) {
    return {0x3f80u};
  } else {
    return Stored(1);
  }
}

MAXVA_FN bool is_one(BFloat16 x) {
  return x.bits == 0x3f80u;
}
template <typename T>
MAXVA_FN bool is_one(T x) {
  return x == T(1);
}

// Between a stored type and the arithmetic's type T.
template <typename T, typename Stored>
MAXVA_FN T widen(Stored x) {
  if constexpr (sizeof(T) == sizeof(double) && sizeof(Stored) == sizeof(double)) {
    return x;
  } else {
    return static_cast<T>(to_float(x));
  }
}

}  // namespace maxva
