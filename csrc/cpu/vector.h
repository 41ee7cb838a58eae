// Numbers side by side, for the formula of maxva.h in place of one: two registers of them.
//
// Note [Vectors in the source]
// What a core sees ahead of the instruction that it waits for is less than one vector's step, from its loads to its
// last division: in a loop over elements vectorised by the compiler divisions wait for each other, and the step runs at
// half to two thirds of the speed of its arithmetic. And gcc's loop for 16-bit state on AVX2 has a quarter more
// instructions than it needs (masks before a pack that ignores what they remove, each selection once as a float and
// once as an integer). So the step in float32 is written out (cpu/vector_loop.h), in two halves: many vectors are begun
// before they are finished. Arithmetic and comparisons are the vector extension's of gcc and clang, which lets them use
// what the instruction set has; intrinsics are for what it cannot say, and stand in register_avx2.h and
// register_avx512.h. Two registers, because two independent chains of divisions go through the core faster than one
// after the other. Lanes do not mix, and so the bits are those of the scalar formula.
#pragma once

#include <cstdint>
#include <limits>

#include "float16.h"
#include "maxva.h"
#include "norm.h"
#include MAXVA_REGISTER

namespace maxva::cpu {
namespace {

constexpr int64_t kHalf = kRegisterBytes / sizeof(float);  // the numbers of one register
constexpr int64_t kLanes = 2 * kHalf;

struct Mask {
  typedef int32_t Register __attribute__((vector_size(kRegisterBytes)));
  Register low, high;
};

struct Words {
  using Register = WordRegister;
  Register low, high;
  Words() = default;
  Words(Register low, Register high) : low(low), high(high) {}
  explicit Words(uint32_t x) : low(x - Register{}), high(x - Register{}) {}
  // x, x + 1, ...
  static Words from(uint32_t x) {
    Words words;
    for (int64_t lane = 0; lane < kHalf; ++lane) {
      words.low[lane] = x + static_cast<uint32_t>(lane);
      words.high[lane] = words.low[lane] + static_cast<uint32_t>(kHalf);
    }
    return words;
  }
};

struct Floats {
  using Register = FloatRegister;
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

MAXVA_FN Mask operator&(Mask x, Mask y) {
  return {x.low & y.low, x.high & y.high};
}
MAXVA_FN Mask operator|(Mask x, Mask y) {
  return {x.low | y.low, x.high | y.high};
}
MAXVA_FN bool all(Mask x) {
  return all_set(WordRegister(x.low & x.high));
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
  return {larger(x.low, y.low), larger(x.high, y.high)};
}
MAXVA_FN Floats smaller(Floats x, Floats y) {
  return {smaller(x.low, y.low), smaller(x.high, y.high)};
}
MAXVA_FN Floats magnitude(Floats x) {
  const Words bits = to_bits(x) & 0x7fffffffu;
  return {Floats::Register(bits.low), Floats::Register(bits.high)};
}
MAXVA_FN Floats square_root(Floats x) {
  return {square_root(x.low), square_root(x.high)};
}
MAXVA_FN Floats flush_subnormal(Floats x) {
  return {flush_subnormal(x.low), flush_subnormal(x.high)};
}

MAXVA_FN bool any_nan(Floats x) {
  return any_nan(x.low, x.high);
}

MAXVA_FN Floats load(const float* from) {
  return {load_register(from), load_register(from + kHalf)};
}
MAXVA_FN Floats load(const BFloat16* from) {
  return {load_register(from), load_register(from + kHalf)};
}
MAXVA_FN void store(Floats x, float* to) {
  store_register(x.low, to);
  store_register(x.high, to + kHalf);
}
// The upper halves of the words.
MAXVA_FN void store_upper(Words x, BFloat16* to) {
  x = x >> 16;
  store_packed(x.low, x.high, to);
}

}  // namespace
}  // namespace maxva::cpu

// The formulas ask for the smallest normal number, and for what a norm calls large and small.
template <>
struct std::numeric_limits<maxva::cpu::Floats> {
  static maxva::cpu::Floats min() { return maxva::cpu::Floats(std::numeric_limits<float>::min()); }
};
template <>
struct maxva::NormScale<maxva::cpu::Floats> : maxva::NormScale<float> {};
