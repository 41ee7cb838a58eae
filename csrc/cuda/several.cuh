// Several numbers of one thread, for the formula of maxva.h in place of one.
//
// Note [Divisions side by side]
// A correctly rounded division or square root is a short chain of multiplications for nearly all operands and a long
// one for the rest, and the compiler puts a branch after the short one: before it is decided, nothing of the next
// element begins. A step has up to three divisions and two roots, so that a thread's elements would go through them one
// after the other, each waiting for its own chain. Here the short chains of all lanes run side by side (cuda/refine.h),
// and one branch asks whether any lane needs the long one; then all are computed anew by the operators of the language.
// The bits are the same either way. Zeros, which are rare operands too, come in masses (a word that no text of the
// batch has, a unit that is off), and the compiler's longest way is theirs: they are asked for first.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda/refine.h"
#include "maxva.h"

namespace maxva::cuda {

template <typename T, int kCount>
struct Several {
  T lanes[kCount];

  Several() = default;
  __device__ __forceinline__ explicit Several(T x) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      lanes[k] = x;
    }
  }
  __device__ __forceinline__ T& operator[](int k) { return lanes[k]; }
  __device__ __forceinline__ const T& operator[](int k) const { return lanes[k]; }
};

// f(condition), with the condition as a type: code of its own for either.
template <typename F>
__device__ __forceinline__ auto with_constant(bool condition, const F& f) {
  if (condition) {
    return f(std::true_type{});
  } else {
    return f(std::false_type{});
  }
}

// f(0) ... f(kCount - 1)
template <int kCount, typename F>
__device__ __forceinline__ auto each(const F& f) {
  Several<std::decay_t<decltype(f(0))>, kCount> z;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    z[k] = f(k);
  }
  return z;
}

template <typename T, int kCount>
__device__ __forceinline__ Several<T, kCount> operator+(const Several<T, kCount>& x, const Several<T, kCount>& y) {
  return each<kCount>([&](int k) { return x[k] + y[k]; });
}
template <typename T, int kCount>
__device__ __forceinline__ Several<T, kCount> operator-(const Several<T, kCount>& x, const Several<T, kCount>& y) {
  return each<kCount>([&](int k) { return x[k] - y[k]; });
}
template <typename T, int kCount>
__device__ __forceinline__ Several<T, kCount> operator*(const Several<T, kCount>& x, const Several<T, kCount>& y) {
  return each<kCount>([&](int k) { return x[k] * y[k]; });
}
template <typename T, int kCount>
__device__ __forceinline__ Several<bool, kCount> operator<(const Several<T, kCount>& x, const Several<T, kCount>& y) {
  return each<kCount>([&](int k) { return x[k] < y[k]; });
}
template <typename T, int kCount>
__device__ __forceinline__ Several<bool, kCount> operator<=(const Several<T, kCount>& x, const Several<T, kCount>& y) {
  return each<kCount>([&](int k) { return x[k] <= y[k]; });
}
template <typename T, int kCount>
__device__ __forceinline__ Several<bool, kCount> operator==(const Several<T, kCount>& x, const Several<T, kCount>& y) {
  return each<kCount>([&](int k) { return x[k] == y[k]; });
}

// Whether a lane may be a NaN. Where infinite lanes differ in sign that is also said: it is asked of their sum.
template <typename T, int kCount>
__device__ __forceinline__ bool may_have_nan(const Several<T, kCount>& x) {
  T sum = x[0];
#pragma unroll
  for (int k = 1; k < kCount; ++k) {
    sum = sum + x[k];
  }
  return sum != sum;
}

// What maxva.h has for numbers.
template <typename T, int kCount>
__device__ __forceinline__ Several<T, kCount> select(const Several<bool, kCount>& condition,
                                                     const Several<T, kCount>& yes, const Several<T, kCount>& no) {
  return each<kCount>([&](int k) { return condition[k] ? yes[k] : no[k]; });
}
// One instruction each, unlike a comparison and a selection.
template <typename T, int kCount>
__device__ __forceinline__ Several<T, kCount> larger(const Several<T, kCount>& x, const Several<T, kCount>& y) {
  return each<kCount>([&](int k) { return fmax(x[k], y[k]); });
}
template <typename T, int kCount>
__device__ __forceinline__ Several<T, kCount> smaller(const Several<T, kCount>& x, const Several<T, kCount>& y) {
  return each<kCount>([&](int k) { return fmin(x[k], y[k]); });
}
template <typename T, int kCount>
__device__ __forceinline__ Several<T, kCount> magnitude(const Several<T, kCount>& x) {
  return each<kCount>([&](int k) { return maxva::magnitude(x[k]); });
}

// The addition flushes, and of both zeros makes the positive one.
template <int kCount>
__device__ __forceinline__ Several<float, kCount> flush_subnormal(const Several<float, kCount>& x) {
  return each<kCount>([&](int k) {
    float flushed;
    asm("add.ftz.f32 %0, %1, 0f00000000;" : "=f"(flushed) : "f"(x[k]));
    return flushed;
  });
}
// As integers negative numbers are less than 0, and a NaN, as the addition gives it, is not.
template <int kCount>
__device__ __forceinline__ Several<float, kCount> flush_variance(const Several<float, kCount>& x) {
  const auto flushed = flush_subnormal(x);
  return each<kCount>([&](int k) {
    int bits;
    asm("max.s32 %0, %1, 0;" : "=r"(bits) : "r"(__float_as_int(flushed[k])));
    return __int_as_float(bits);
  });
}

__device__ __forceinline__ float approximate_inverse(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}
__device__ __forceinline__ float approximate_inverse_root(float x) {
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

template <typename T, int kCount>
__device__ __forceinline__ Several<T, kCount> operator/(const Several<T, kCount>& x, const Several<T, kCount>& y) {
  if constexpr (std::is_same_v<T, float>) {
    const auto quotients = each<kCount>([&](int k) { return refine_quotient(x[k], y[k], approximate_inverse(y[k])); });
    uint32_t outside = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      outside |= is_outside(x[k]) | is_outside(quotients[k]);
    }
    if (outside == 0) {
      return quotients;
    }
    return each<kCount>([&](int k) { return x[k] == 0 ? zero_quotient(x[k], y[k]) : x[k] / y[k]; });
  } else {
    return each<kCount>([&](int k) { return x[k] / y[k]; });
  }
}

template <typename T, int kCount>
__device__ __forceinline__ Several<T, kCount> square_root(const Several<T, kCount>& x) {
  if constexpr (std::is_same_v<T, float>) {
    // Of a negative number all are NaN.
    const auto roots = each<kCount>([&](int k) { return refine_root(x[k], approximate_inverse_root(x[k])); });
    uint32_t outside = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      outside |= is_outside(x[k]);
    }
    if (outside == 0) {
      return roots;
    }
    return each<kCount>([&](int k) { return x[k] == 0 ? x[k] : maxva::square_root(x[k]); });
  } else {
    return each<kCount>([&](int k) { return maxva::square_root(x[k]); });
  }
}

}  // namespace maxva::cuda

// The formula asks for the smallest normal number.
template <typename T, int kCount>
struct std::numeric_limits<maxva::cuda::Several<T, kCount>> {
  static __device__ __forceinline__ maxva::cuda::Several<T, kCount> min() {
    return maxva::cuda::Several<T, kCount>(std::numeric_limits<T>::min());
  }
};
