// Sixteen numbers side by side, for the formula of maxva.h in place of one: two AVX registers.
//
// Note [Vectors in the source]
// With float32 state the compiler's loop is as fast as memory. With 16-bit state there are fewer bytes to wait for, and
// gcc's loop has a quarter more instructions than it needs (masks before a pack that ignores what they remove,
// each selection once as a float and once as an integer), and a core sees too few of them ahead to fill the time of a
// division. So that loop is written out (cpu/rounded_loop.h). Arithmetic and comparisons are the vector extension's of
// gcc and clang, which lets them use what the instruction set has; intrinsics are for what it cannot say. Two
// registers, because two independent chains of divisions go through the core faster than one after the other. With
// AVX-512 gcc's loop has a register for nearly all, and half the instructions: there it is left to the compiler.
// Lanes do not mix, and so the bits are those of the scalar formula.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <limits>

#include "float16.h"
#include "maxva.h"

namespace maxva::cpu {
namespace {

constexpr int64_t kLanes = 16;

struct Mask {
  typedef int32_t Register __attribute__((vector_size(32)));
  Register low, high;
};

struct Words {
  typedef uint32_t Register __attribute__((vector_size(32)));
  Register low, high;
  Words() = default;
  Words(Register low, Register high) : low(low), high(high) {}
  explicit Words(uint32_t x) : low(x - Register{}), high(x - Register{}) {}
  // x, x + 1, ...
  static Words from(uint32_t x) {
    return {x + Register{0, 1, 2, 3, 4, 5, 6, 7}, x + Register{8, 9, 10, 11, 12, 13, 14, 15}};
  }
};

struct Floats {
  typedef float Register __attribute__((vector_size(32)));
  Register low, high;
  Floats() = default;
  Floats(Register low, Register high) : low(low), high(high) {}
  explicit Floats(float x) : low(x - Register{}), high(x - Register{}) {}
};

MAXVA_FN Words operator+(Words x, Words y) {
  return {x.low + y.low, x.high + y.high};
}
MAXVA_FN Words operator+(Words x, uint32_t y) {
  return {x.low + y, x.high + y};
}
MAXVA_FN Words operator*(Words x, uint32_t y) {
  return {x.low * y, x.high * y};
}
MAXVA_FN Words operator^(Words x, Words y) {
  return {x.low ^ y.low, x.high ^ y.high};
}
MAXVA_FN Words operator^(Words x, uint32_t y) {
  return {x.low ^ y, x.high ^ y};
}
MAXVA_FN Words operator&(Words x, uint32_t y) {
  return {x.low & y, x.high & y};
}
MAXVA_FN Words operator>>(Words x, int bits) {
  return {x.low >> bits, x.high >> bits};
}

MAXVA_FN Floats operator+(Floats x, Floats y) {
  return {x.low + y.low, x.high + y.high};
}
MAXVA_FN Floats operator-(Floats x, Floats y) {
  return {x.low - y.low, x.high - y.high};
}
MAXVA_FN Floats operator*(Floats x, Floats y) {
  return {x.low * y.low, x.high * y.high};
}
MAXVA_FN Floats operator/(Floats x, Floats y) {
  return {x.low / y.low, x.high / y.high};
}
MAXVA_FN Mask operator<(Floats x, Floats y) {
  return {x.low < y.low, x.high < y.high};
}
MAXVA_FN Mask operator<=(Floats x, Floats y) {
  return {x.low <= y.low, x.high <= y.high};
}
MAXVA_FN Mask operator==(Floats x, Floats y) {
  return {x.low == y.low, x.high == y.high};
}

MAXVA_FN Words to_bits(Floats x) {
  return {Words::Register(x.low), Words::Register(x.high)};
}

// What maxva.h has for numbers.
MAXVA_FN Floats select(Mask condition, Floats yes, Floats no) {
  return {condition.low ? yes.low : no.low, condition.high ? yes.high : no.high};
}
MAXVA_FN Words select(Mask condition, Words yes, Words no) {
  return {condition.low ? yes.low : no.low, condition.high ? yes.high : no.high};
}
// The instructions, too, give the second operand where either is a NaN.
MAXVA_FN Floats larger(Floats x, Floats y) {
  return {_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)};
}
MAXVA_FN Floats smaller(Floats x, Floats y) {
  return {_mm256_min_ps(x.low, y.low), _mm256_min_ps(x.high, y.high)};
}
MAXVA_FN Floats magnitude(Floats x) {
  const Words bits = to_bits(x) & 0x7fffffffu;
  return {Floats::Register(bits.low), Floats::Register(bits.high)};
}
MAXVA_FN Floats square_root(Floats x) {
  return {_mm256_sqrt_ps(x.low), _mm256_sqrt_ps(x.high)};
}

// maxva.h's with an instruction less: the number's word times the sign of its exponent, which is 0 or 1.
MAXVA_FN Floats::Register flush_eight(Floats::Register x) {
  const __m256i exponent = _mm256_and_si256(__m256i(x), _mm256_set1_epi32(0x7f800000));
  return Floats::Register(_mm256_sign_epi32(__m256i(x), exponent));
}
MAXVA_FN Floats flush_subnormal(Floats x) {
  return {flush_eight(x.low), flush_eight(x.high)};
}

MAXVA_FN bool any_nan(Floats x) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x.low, x.high, _CMP_UNORD_Q)) != 0;
}

MAXVA_FN Floats load(const float* from) {
  return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
MAXVA_FN void store(Floats x, float* to) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}

MAXVA_FN Floats::Register widen_eight(const BFloat16* from) {
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  // Two bytes of zeros (-1) and two of a number, four times from each half: one instruction for widening and shift.
  const __m256i bytes = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                         -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return Floats::Register(_mm256_shuffle_epi8(twice, bytes));
}
MAXVA_FN Floats load(const BFloat16* from) {
  return {widen_eight(from), widen_eight(from + 8)};
}
// The upper halves of the words.
MAXVA_FN void store_upper(Words x, BFloat16* to) {
  x = x >> 16;
  const __m256i packed = _mm256_packus_epi32(__m256i(x.low), __m256i(x.high));  // within each half of the register
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
}

MAXVA_FN Coefficients<Floats> broadcast(const Coefficients<float>& c) {
  Coefficients<Floats> to;
  to.grad_factor = Floats(c.grad_factor);
  to.alpha = Floats(c.alpha);
  to.one_minus_alpha = Floats(c.one_minus_alpha);
  to.one_minus_beta_upper = Floats(c.one_minus_beta_upper);
  to.one_minus_beta_lower = Floats(c.one_minus_beta_lower);
  to.first_weight = Floats(c.first_weight);
  to.saturation = Floats(c.saturation);
  to.eps = Floats(c.eps);
  to.step_size = Floats(c.step_size);
  to.decay = Floats(c.decay);
  return to;
}

}  // namespace
}  // namespace maxva::cpu

// The formula asks for the smallest normal number.
template <>
struct std::numeric_limits<maxva::cpu::Floats> {
  static maxva::cpu::Floats min() { return maxva::cpu::Floats(std::numeric_limits<float>::min()); }
};
