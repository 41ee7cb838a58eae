// csrc/cuda/refine.h in all cases that could go wrong: prints what went wrong, and how many cases there were.
//
// A quotient of 24-bit numbers x / y, as integers of that many bits, lies between two floats, and nearest to their
// middle by a distance of |c| / 2y units, c = 2^s x - (2k + 1) y with s = 24 where x >= y and 25 where not. Before it
// is rounded the refined quotient is wrong by at most 1.5 * 2^-24 units (the reciprocal by 2^-24, the quotient that it
// corrects by 1.5 units), so that only |c| < 3 can round to the wrong side: for each y there are a few such x. Roots
// are few enough to try them all.
#include "cuda/refine.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>

using maxva::from_bits;
using maxva::to_bits;
using maxva::cuda::is_outside;
using maxva::cuda::refine_quotient;
using maxva::cuda::refine_root;
using maxva::cuda::zero_quotient;

namespace {

constexpr int64_t kLeast = int64_t(1) << 23, kMost = int64_t(1) << 24;  // the integers of 24 bits: from, to before
constexpr double kRootError = 0x1.1261p-23;                             // 2^-22.9, the hardware's

float neighbour(float x, int units) {
  return from_bits(to_bits(x) + static_cast<uint32_t>(units));
}

void try_quotient(int64_t x, int64_t y, int64_t& cases) {
  const float divisor = float(y);
  for (int units = -2; units <= 2; ++units) {
    const float inverse = neighbour(1.0f / divisor, units);
    const double unit = neighbour(inverse, 1) - double(inverse);
    if (std::fabs(inverse - 1.0 / divisor) > unit) {
      continue;
    }
    ++cases;
    if (refine_quotient(float(x), divisor, inverse) != float(x) / divisor) {
      std::printf("quotient %lld %lld, reciprocal %+d\n", (long long)x, (long long)y, units);
    }
  }
}

int64_t quotients() {
  int64_t cases = 0;
  for (int64_t y = kLeast; y < kMost; ++y) {
    for (int c = -4; c <= 4; ++c) {
      const int twos = __builtin_ctzll(static_cast<uint64_t>(y));
      if (c == 0 || c % (int64_t(1) << twos) != 0) {  // 2^twos divides c
        continue;
      }
      const int64_t odd = y >> twos;
      for (int s = 24; s <= 25; ++s) {
        int64_t x = (c % odd + odd) % odd;  // 2^s x = c modulo the odd part of y
        for (int i = 0; i < s; ++i) {
          x = x % 2 == 0 ? x / 2 : (x + odd) / 2;
        }
        for (x += (kLeast - x + odd - 1) / odd * odd; x < kMost; x += odd) {
          const int64_t rest = (x << s) - c;
          if (rest % y == 0 && rest / y % 2 != 0 && (s == 24) == (x >= y)) {
            try_quotient(x, y, cases);
          }
        }
      }
    }
  }
  return cases;
}

int64_t roots() {
  int64_t cases = 0;
  for (int64_t i = kLeast; i < 2 * kMost; i += i < kMost ? 1 : 2) {  // two powers of two: a root's mantissa has no more
    const float x = float(i);
    const double exact = 1 / std::sqrt(double(i));
    for (int units = -4; units <= 4; ++units) {
      const float inverse = neighbour(float(exact), units);
      if (std::fabs(inverse / exact - 1) > kRootError) {
        continue;
      }
      ++cases;
      if (refine_root(x, inverse) != std::sqrt(x)) {
        std::printf("root %lld, reciprocal %+d\n", (long long)i, units);
      }
    }
  }
  return cases;
}

// What the hardware gives: subnormals are zeros to it.
float flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

bool are_same(float x, float y) {
  return to_bits(x) == to_bits(y) || (std::isnan(x) && std::isnan(y));
}

// Numbers of all exponents, zeros, infinities and NaN: what is taken for good must be.
int64_t specials() {
  std::mt19937 random(1);
  int64_t taken = 0;
  for (int i = 0; i < 4000000; ++i) {
    const auto number = [&] {
      const uint32_t bits = random();
      return from_bits(random() % 16 != 0 ? bits : bits & 0xff800000u);
    };
    const float x = number(), y = number();
    const float quotient = refine_quotient(x, y, flushed(1 / flushed(y)));
    if ((is_outside(x) | is_outside(quotient)) == 0) {
      ++taken;
      if (to_bits(quotient) != to_bits(x / y)) {
        std::printf("quotient %a %a\n", double(x), double(y));
      }
    }
    const float zero = std::copysign(0.0f, x);
    if (!are_same(zero_quotient(zero, y), zero / y)) {
      std::printf("quotient %a %a\n", double(zero), double(y));
    }
    if (is_outside(y) == 0 && y > 0 &&
        to_bits(refine_root(y, float(1 / std::sqrt(double(y))))) != to_bits(std::sqrt(y))) {
      std::printf("root %a\n", double(y));
    }
  }
  return taken;
}

}  // namespace

int main() {
  const int64_t quotient_cases = quotients(), root_cases = roots(), special_cases = specials();
  std::printf("cases %lld %lld %lld\n", (long long)quotient_cases, (long long)root_cases, (long long)special_cases);
}
