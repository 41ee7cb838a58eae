// The floating-point environment that the kernels compute in.
//
// Note [Modes of the processor]
// A thread may have been told to take subnormals for zeros, by torch.set_flush_denormal or by any library that was
// linked with -ffast-math, or to round in another direction. Then halves, which are widened by way of subnormals, would
// be lost, and results would depend on which thread computed them: only the one that was told has the mode.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace maxva::cpu {

// While it lives its thread rounds to nearest and takes subnormals for what they are.
class IeeeMode {
 public:
#if defined(__x86_64__)
  static constexpr unsigned kOthers = 0x8000u | 0x6000u | 0x0040u;  // flush to zero, rounding, denormals are zeros
  IeeeMode() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~kOthers); }
  ~IeeeMode() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
  static constexpr uint64_t kOthers = uint64_t(7) << 22;  // flush to zero, rounding
  IeeeMode() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ & ~kOthers));
  }
  ~IeeeMode() { asm volatile("msr fpcr, %0" ::"r"(before_)); }
#else
  IeeeMode() : before_(0) {}
#endif
  IeeeMode(const IeeeMode&) = delete;
  IeeeMode& operator=(const IeeeMode&) = delete;

 private:
#if defined(__aarch64__)
  uint64_t before_;
#else
  unsigned before_;
#endif
};

}  // namespace maxva::cpu
