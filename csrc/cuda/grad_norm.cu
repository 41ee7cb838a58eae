#include "cuda/grad_norm.cuh"
#include "cuda/kernels.h"

namespace maxva::cuda {
namespace {

template <typename T, typename Grad>
Kernel chunks_of() {
  return {reinterpret_cast<const void*>(&norm_chunks_kernel<T, Grad>), kNormThreads<Grad>};
}

template <typename T>
Kernel total() {
  return {reinterpret_cast<const void*>(&norm_total_kernel<T>), kNormTotalThreads};
}

}  // namespace

Kernel norm_chunks_kernel_for(DType grad, bool twice) {
  switch (grad) {
    case DType::kFloat:
      return twice ? chunks_of<double, float>() : chunks_of<float, float>();
    case DType::kHalf:
      return twice ? chunks_of<double, Half>() : chunks_of<float, Half>();
    case DType::kBFloat16:
      return twice ? chunks_of<double, BFloat16>() : chunks_of<float, BFloat16>();
    case DType::kDouble:
      return twice ? chunks_of<double, double>() : Kernel{nullptr, 0};
  }
  return {nullptr, 0};
}

Kernel norm_total_kernel_for(bool twice) {
  return twice ? total<double>() : total<float>();
}

}  // namespace maxva::cuda
