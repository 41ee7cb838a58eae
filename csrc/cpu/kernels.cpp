#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>

namespace maxva::cpu {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    const char* named = std::getenv("MAXVA_CPU_CAPABILITY");
    auto allowed = [&](const Kernels& table) { return named == nullptr || std::strcmp(named, table.capability) == 0; };
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
