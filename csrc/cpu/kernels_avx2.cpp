// The kernels for x86-64 with AVX2. See Note [One source, several instruction sets].
#if defined(__x86_64__)

// Every header of others comes before the switch: their inline functions must stay baseline code.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2,prefer-vector-width=256")
#endif

#define MAXVA_REGISTER "cpu/register_avx2.h"
#include "cpu/kernels.h"
#include "cpu/kernels.inc"

namespace maxva::cpu {
extern const Kernels kKernelsAvx2{
    "AVX2", step, update_squares<float>, update_squares<double>, sum_of_squares<float>, sum_of_squares<double>};
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
