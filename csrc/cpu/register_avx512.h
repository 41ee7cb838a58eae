// What vectors need of AVX-512, for one register, see Note [Vectors in the source].
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "float16.h"
#include "maxva.h"

namespace maxva::cpu {
namespace {

constexpr int64_t kRegisterBytes = 64;

typedef float FloatRegister __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t WordRegister __attribute__((vector_size(kRegisterBytes)));

MAXVA_FN FloatRegister larger(FloatRegister x, FloatRegister y) {
  return _mm512_max_ps(x, y);
}
MAXVA_FN FloatRegister smaller(FloatRegister x, FloatRegister y) {
  return _mm512_min_ps(x, y);
}
MAXVA_FN FloatRegister square_root(FloatRegister x) {
  return _mm512_sqrt_ps(x);
}

// maxva.h's, by the exponent: where it has no bit set the number becomes 0.
MAXVA_FN FloatRegister flush_subnormal(FloatRegister x) {
  return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(__m512i(x), _mm512_set1_epi32(0x7f800000)), x);
}

MAXVA_FN bool any_nan(FloatRegister x, FloatRegister y) {
  return _mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q) != 0;
}

// Of words that are 0 or have all bits set.
MAXVA_FN bool all_set(WordRegister x) {
  return _mm512_movepi32_mask(__m512i(x)) == 0xffff;
}

MAXVA_FN FloatRegister load_register(const float* from) {
  return _mm512_loadu_ps(from);
}
MAXVA_FN FloatRegister load_register(const BFloat16* from) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return FloatRegister(_mm512_slli_epi32(words, 16));
}
MAXVA_FN void store_register(FloatRegister x, float* to) {
  _mm512_storeu_ps(to, x);
}
// Words below 2^16.
MAXVA_FN void store_packed(WordRegister x, WordRegister y, BFloat16* to) {
  const __m512i packed = _mm512_packus_epi32(__m512i(x), __m512i(y));  // within each quarter of the register
  _mm512_storeu_si512(to, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed));
}

}  // namespace
}  // namespace maxva::cpu
