// The norms of parameters and of their updates, for trust ratios: a step that writes nothing, in two stages. Sums are
// added by the rule of norm.h over chunks of kStepChunk.
#pragma once

#include "cuda/lanes.cuh"
#include "cuda/step.cuh"

namespace maxva::cuda {

// One element of a tensor of that dtype, which is kDouble exactly where T is double.
template <typename T>
__device__ __forceinline__ T read(const void* memory, int64_t i, DType dtype) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return *in_global_memory(static_cast<const T*>(memory) + i);
  } else {
    switch (dtype) {
      case DType::kHalf:
        return widen<T>(*in_global_memory(static_cast<const Half*>(memory) + i));
      case DType::kBFloat16:
        return widen<T>(*in_global_memory(static_cast<const BFloat16*>(memory) + i));
      default:
        return *in_global_memory(static_cast<const float*>(memory) + i);
    }
  }
}

// One element of a parameter, or of its master.
template <typename T>
__device__ __forceinline__ T read_param(const StepRow& row, int64_t i, DType dtype) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (row.master != nullptr) {
      return join_master(*in_global_memory(static_cast<const BFloat16*>(row.param) + i),
                         *in_global_memory(row.master + i));
    }
  }
  return read<T>(row.param, i, dtype);
}

// Compiled for each arithmetic and algorithm, not for each dtype as the step is: this pass is for few users.
template <Algorithm kAlgorithm, typename T>
__global__ void __launch_bounds__(kUpdateThreads) update_chunks_kernel(const __grid_constant__ StepLaunch<T> launch) {
  constexpr int kOwn = int(kNormLanes) / kUpdateThreads;  // lanes of a thread, kUpdateThreads apart
  if (launch.found_inf != nullptr && *launch.found_inf != T(0)) {
    return;
  }
  __shared__ Coefficients<T> shared;
  __shared__ Lanes<T> lanes;
  for (int64_t chunk = blockIdx.x; chunk < launch.chunks; chunk += gridDim.x) {
    const int tensor = launch.chunk_rows[chunk];
    const void* grads = launch.grads[tensor];
    if (grads == nullptr) {
      continue;
    }
    // 1. What the chunk's elements share.
    const StepRow row = launch.rows[tensor];
    const StepGroup<T>& group = launch.groups[row.group];
    __syncthreads();  // the last chunk's coefficients are no longer read
    if (threadIdx.x == 0) {
      StepGroup<T> at_rate_1 = group;
      at_rate_1.lr = nullptr;
      at_rate_1.hyper.lr = T(1);
      const int64_t step = *in_global_memory(row.step) + 1;
      shared = read_coefficients(launch, at_rate_1, tensor, bias_correction<T>(group.hyper.alpha_bits, step));
    }
    __syncthreads();
    const Modes modes{group.eps_mode, group.hyper.decay_mode, row.max_denom != nullptr, false};
    const int64_t begin = (chunk - row.first_chunk) * kStepChunk;
    const int count = int(row.numel - begin < kStepChunk ? row.numel - begin : kStepChunk);

    // 2. Each thread's lanes. No packets: neighbours of a warp read neighbours in memory, however a tensor begins.
    SumOfSquares<T> params[kOwn] = {}, updates[kOwn] = {};
    for (int base = threadIdx.x; base < count; base += int(kNormLanes)) {
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        const int offset = base + k * kUpdateThreads;
        if (offset < count) {
          const int64_t i = begin + offset;
          const auto value = [&](const void* memory) { return read<T>(memory, i, launch.state_dtype); };
          const T param = read_param<T>(row, i, launch.param_dtype), grad = read<T>(grads, i, launch.grad_dtype);
          T exp_avg = value(row.exp_avg), grad_mean = value(row.grad_mean), grad_var = value(row.grad_var);
          T weight_sum = value(row.weight_sum), max_denom = modes.amsgrad ? value(row.max_denom) : T(0);
          const T change =
              update<kAlgorithm>(param, grad, exp_avg, grad_mean, grad_var, weight_sum, max_denom, shared, modes)
                  .change;
          add_square(param, params[k].large, params[k].medium, params[k].small);
          add_square(change, updates[k].large, updates[k].medium, updates[k].small);
        }
      }
    }

    // 3. The lanes together, first the parameter's, then the update's.
    const auto total_of = [&](const SumOfSquares<T>(&own)[kOwn]) {
      __syncthreads();  // the last sum has been read
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        lanes.set(threadIdx.x + k * kUpdateThreads, own[k].large, own[k].medium, own[k].small);
      }
      lanes.add_up(kUpdateThreads);
      return threadIdx.x == 0 ? lanes.sum() : SumOfSquares<T>{};
    };
    const SumOfSquares<T> of_param = total_of(params), of_update = total_of(updates);
    if (threadIdx.x == 0) {
      launch.squares[chunk] = {of_param, of_update};
    }
  }
}

// The blocks share out the tensors, and add up the chunks of each.
template <typename T>
__global__ void __launch_bounds__(kUpdateTotalThreads, 1)
    update_total_kernel(const __grid_constant__ StepLaunch<T> launch) {
  if (launch.found_inf != nullptr && *launch.found_inf != T(0)) {
    return;
  }
  __shared__ Lanes<T> lanes;
  for (int tensor = blockIdx.x; tensor < launch.tensors; tensor += gridDim.x) {
    if (launch.grads[tensor] == nullptr) {
      continue;
    }
    const int64_t first = launch.rows[tensor].first_chunk;
    const int64_t chunks = chunks_of(launch.rows[tensor].numel);
    for (int of = 0; of < 2; ++of) {
      T large = 0, medium = 0, small = 0;
      for (int64_t i = threadIdx.x; i < chunks; i += kNormLanes) {
        const UpdateSquares<T>& squares = launch.squares[first + i];
        const SumOfSquares<T> sum = of == 0 ? squares.param : squares.update;
        large += sum.large;
        medium += sum.medium;
        small += sum.small;
      }
      __syncthreads();  // the last sum has been read
      lanes.set(threadIdx.x, large, medium, small);
      lanes.add_up(kUpdateTotalThreads);
      if (threadIdx.x == 0) {
        launch.norms[2 * tensor + of] = root(lanes.sum());
      }
    }
  }
}

}  // namespace maxva::cuda
