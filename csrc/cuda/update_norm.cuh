// The norms of parameters and of their updates, for trust ratios: a step that writes nothing, in two stages. Sums are
// added by the rule of norm.h over chunks of kStepChunk.
#pragma once

#include <type_traits>

#include "cuda/coefficients.cuh"
#include "cuda/lanes.cuh"
#include "cuda/packet.cuh"
#include "cuda/stored.cuh"

namespace maxva::cuda {

constexpr int kUpdateThreads = 256;
constexpr int kUpdateTotalThreads = kNormLanes;

// An element as it lies in memory, one of 16 bits in a word's lower half. Dtypes are known at run time only, and what
// is widened beside its load is waited for before the next operand is asked for: so all are loaded as words, and then
// made numbers.
template <typename T>
using Word = std::conditional_t<sizeof(T) == sizeof(double), double, uint32_t>;

__device__ __forceinline__ double load_word(const double* element) {
  return *in_global_memory(element);
}
__device__ __forceinline__ uint32_t load_word(const uint32_t* element) {
  return *in_global_memory(element);
}
// In the language this is a number of 16 bits first, and making a word of it waits as well.
__device__ __forceinline__ uint32_t load_word(const uint16_t* element) {
  uint32_t word;
  asm("ld.global.u16 %0, [%1];" : "=r"(word) : "l"(__cvta_generic_to_global(element)));
  return word;
}

// Elements at(0) ... at(kCount - 1) of a tensor of that dtype, which is kDouble exactly where T is double. Where at()
// is negative there is none, and a number near 1 in its place: 1 but of float16, and of a master.
template <typename T, int kCount, typename At>
__device__ __forceinline__ Several<Word<T>, kCount> fetch(const void* memory, const At& at, DType dtype) {
  const auto of = [&](const auto* tensor, const Word<T> filling) {
    return each<kCount>([&](int k) { return at(k) < 0 ? filling : load_word(tensor + at(k)); });
  };
  if constexpr (sizeof(T) == sizeof(double)) {
    return of(static_cast<const double*>(memory), 1);
  } else if (dtype == DType::kFloat) {
    return of(static_cast<const uint32_t*>(memory), to_bits(1.0f));
  } else {
    return of(static_cast<const uint16_t*>(memory), one<BFloat16>().bits);
  }
}

// And as numbers.
template <typename T, int kCount>
__device__ __forceinline__ Several<T, kCount> numbers(const Several<Word<T>, kCount>& words, DType dtype) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return words;
  } else {
    switch (dtype) {
      case DType::kHalf:
        return each<kCount>([&](int k) { return to_float(Half{static_cast<uint16_t>(words[k])}); });
      case DType::kBFloat16:
        return each<kCount>([&](int k) { return to_float(BFloat16{static_cast<uint16_t>(words[k])}); });
      default:
        return each<kCount>([&](int k) { return from_bits(words[k]); });
    }
  }
}

// Compiled for each arithmetic and algorithm, not for each dtype as the step is: this pass is for few users.
template <Algorithm kAlgorithm, typename T>
__global__ void __launch_bounds__(kUpdateThreads) update_chunks_kernel(const __grid_constant__ StepLaunch<T> launch) {
  constexpr int kOwn = int(kNormLanes) / kUpdateThreads;             // lanes of a thread, kUpdateThreads apart
  constexpr int kTogether = sizeof(T) == sizeof(double) ? 1 : kOwn;  // of them; in float64 registers are few
  if (launch.found_inf != nullptr && *launch.found_inf != T(0)) {
    return;
  }
  __shared__ Coefficients<T> shared;
  __shared__ BiasCorrection<T> correction;  // of thread 0
  if (threadIdx.x == 0) {
    correction.step = 0;
  }
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
      shared = read_coefficients(launch, at_rate_1, tensor, correction.of(group.hyper.alpha_bits, step));
    }
    __syncthreads();
    const Modes modes{group.eps_mode, group.hyper.decay_mode, row.max_denom != nullptr, false};
    const bool has_master = row.master != nullptr;
    const int64_t begin = (chunk - row.first_chunk) * kStepChunk;
    const int count = int(row.numel - begin < kStepChunk ? row.numel - begin : kStepChunk);

    // 2. Each thread's lanes. No packets: neighbours of a warp read neighbours in memory, however a tensor begins.
    OwnLanes<T, kTogether> params[kOwn / kTogether], updates[kOwn / kTogether];
    const auto coefficients = broadcast<Several<T, kTogether>>(shared);
    for (int base = threadIdx.x; base < count; base += int(kNormLanes)) {
#pragma unroll
      for (int own = 0; own < kOwn; own += kTogether) {
        const auto at = [&](int k) {
          const int place = base + (own + k) * kUpdateThreads;
          return place < count ? begin + place : -1;
        };
        const auto words = [&](const void* memory) { return fetch<T, kTogether>(memory, at, launch.state_dtype); };
        const auto param_words = fetch<T, kTogether>(row.param, at, launch.param_dtype);
        const auto grad_words = fetch<T, kTogether>(grads, at, launch.grad_dtype);
        const auto exp_avg_words = words(row.exp_avg), grad_mean_words = words(row.grad_mean);
        const auto grad_var_words = words(row.grad_var), weight_sum_words = words(row.weight_sum);
        Several<Word<T>, kTogether> max_denom_words(0), rests(0);
        if (modes.amsgrad) {
          max_denom_words = words(row.max_denom);
        }
        if (has_master) {
          rests = fetch<T, kTogether>(row.master, at, DType::kBFloat16);
        }

        const auto value = [&](const auto& its_words) { return numbers<T, kTogether>(its_words, launch.state_dtype); };
        auto param = numbers<T, kTogether>(param_words, launch.param_dtype);
        if constexpr (sizeof(T) == sizeof(float)) {
          if (has_master) {
            param = each<kTogether>([&](int k) {
              return join_master({static_cast<uint16_t>(param_words[k])}, static_cast<int16_t>(rests[k]));
            });
          }
        }
        const auto grad = numbers<T, kTogether>(grad_words, launch.grad_dtype);
        auto exp_avg = value(exp_avg_words), grad_mean = value(grad_mean_words), grad_var = value(grad_var_words);
        auto weight_sum = value(weight_sum_words), max_denom = value(max_denom_words);
        const auto change = [&](const auto all_at_one) {
          const Modes of_these{modes.eps, modes.decay, modes.amsgrad, all_at_one};
          return update<kAlgorithm>(param, grad, exp_avg, grad_mean, grad_var, weight_sum, max_denom, coefficients,
                                    of_these)
              .change;
        };
        const bool all_at_one = kTogether > 1 && __all_sync(__activemask(), all_ones(weight_sum.lanes));
        const auto changes = with_constant(all_at_one, change);
        // An element that is not there counts as 0, which adds nothing.
        params[own / kTogether].template add<1>([&](int, int k) { return at(k) < 0 ? T(0) : param[k]; });
        updates[own / kTogether].template add<1>([&](int, int k) { return at(k) < 0 ? T(0) : changes[k]; });
      }
    }

    // 3. The lanes together, first the parameter's, then the update's.
    const auto total_of = [&](const OwnLanes<T, kTogether>* own) {
      __syncthreads();  // the last sum has been read
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        const OwnLanes<T, kTogether>& its = own[k / kTogether];
        const int lane = k % kTogether;
        lanes.set(threadIdx.x + k * kUpdateThreads, its.large[lane], its.medium[lane], its.small[lane]);
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
