#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>

#include "check.h"

namespace maxva::cpu {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* named = std::getenv("MAXVA_CPU_CAPABILITY");
    named = named != nullptr && *named == '\0' ? nullptr : named;
    const auto is_named = [&](const char* capability) { return std::strcmp(named, capability) == 0; };
    MAXVA_CHECK(named == nullptr || is_named("AVX512") || is_named("AVX2") || is_named("DEFAULT"),
                "the environment variable MAXVA_CPU_CAPABILITY is ", named,
                "; set it to AVX512, AVX2 or DEFAULT, or unset it");
#if defined(__x86_64__)
    const auto allowed = [&](const Kernels& table) { return named == nullptr || is_named(table.capability); };
    // Falls through to the next lesser set, so that naming one allows it and those below.
    bool reached = false;
    __builtin_cpu_init();
    reached = reached || allowed(kKernelsAvx512);
    if (reached && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return kKernelsAvx512;
    }
    reached = reached || allowed(kKernelsAvx2);
    if (reached && __builtin_cpu_supports("avx2")) {
      return kKernelsAvx2;
    }
#endif
    return kKernelsDefault;
  }();
  return chosen;
}

}  // namespace maxva::cpu
