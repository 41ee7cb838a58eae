// The kernels for x86-64 with AVX512. See Note [One source, several instruction sets].
#if defined(__x86_64__)

#if !defined(__clang__)  // gcc 12 warns of what its own <immintrin.h> leaves undefined on purpose
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// Every header of others comes before the switch: their inline functions must stay baseline code.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,prefer-vector-width=512")
#endif

#define MAXVA_REGISTER "cpu/register_avx512.h"
#include "cpu/kernels.h"
#include "cpu/kernels.inc"

namespace maxva::cpu {
extern const Kernels kKernelsAvx512{
    "AVX512", step, update_squares<float>, update_squares<double>, sum_of_squares<float>, sum_of_squares<double>};
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
