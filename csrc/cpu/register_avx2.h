// What vectors need of AVX2, for one register, see Note [Vectors in the source].
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "float16.h"
#include "maxva.h"

namespace maxva::cpu {
namespace {

constexpr int64_t kRegisterBytes = 32;

typedef float FloatRegister __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t WordRegister __attribute__((vector_size(kRegisterBytes)));

MAXVA_FN FloatRegister larger(FloatRegister x, FloatRegister y) {
  return _mm256_max_ps(x, y);
}
MAXVA_FN FloatRegister smaller(FloatRegister x, FloatRegister y) {
  return _mm256_min_ps(x, y);
}
MAXVA_FN FloatRegister square_root(FloatRegister x) {
  return _mm256_sqrt_ps(x);
}

// maxva.h's with an instruction less: the number's word times the sign of its exponent, which is 0 or 1.
MAXVA_FN FloatRegister flush_subnormal(FloatRegister x) {
  const __m256i exponent = _mm256_and_si256(__m256i(x), _mm256_set1_epi32(0x7f800000));
  return FloatRegister(_mm256_sign_epi32(__m256i(x), exponent));
}

MAXVA_FN bool any_nan(FloatRegister x, FloatRegister y) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_UNORD_Q)) != 0;
}

// Of words that are 0 or have all bits set.
MAXVA_FN bool all_set(WordRegister x) {
  return _mm256_movemask_ps(__m256(x)) == 0xff;
}

MAXVA_FN FloatRegister load_register(const float* from) {
  return _mm256_loadu_ps(from);
}
MAXVA_FN FloatRegister load_register(const BFloat16* from) {
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  // Two bytes of zeros (-1) and two of a number, four times from each half: one instruction for widening and shift.
  const __m256i bytes = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                         -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return FloatRegister(_mm256_shuffle_epi8(twice, bytes));
}
MAXVA_FN void store_register(FloatRegister x, float* to) {
  _mm256_storeu_ps(to, x);
}
// Words below 2^16.
MAXVA_FN void store_packed(WordRegister x, WordRegister y, BFloat16* to) {
  const __m256i packed = _mm256_packus_epi32(__m256i(x), __m256i(y));  // within each half of the register
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
}

}  // namespace
}  // namespace maxva::cpu
