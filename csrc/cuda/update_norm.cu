// The kernels of parameters' and updates' norms.
#include "cuda/kernels.h"
#include "cuda/update_norm.cuh"

namespace maxva::cuda {
namespace {

template <typename T>
Kernel chunks_kernel(Algorithm algorithm) {
  return {algorithm == Algorithm::kMAdam ? reinterpret_cast<const void*>(&update_chunks_kernel<Algorithm::kMAdam, T>)
                                         : reinterpret_cast<const void*>(&update_chunks_kernel<Algorithm::kLaMAdam, T>),
          kUpdateThreads};
}

}  // namespace

Kernel update_chunks_kernel_for(bool twice, Algorithm algorithm) {
  return twice ? chunks_kernel<double>(algorithm) : chunks_kernel<float>(algorithm);
}

Kernel update_total_kernel_for(bool twice) {
  return {twice ? reinterpret_cast<const void*>(&update_total_kernel<double>)
                : reinterpret_cast<const void*>(&update_total_kernel<float>),
          kUpdateTotalThreads};
}

}  // namespace maxva::cuda
