// One step over the tensors of a table: the walk, the loads and the stores around the formula of maxva.h.
//
// Note [Modes at run time]
// Groups of one launch may differ in every mode, so within it modes are values that all threads of a block agree on:
// a few uniform branches in a kernel that waits for memory. Only what a whole launch shares is a template parameter.
#pragma once

#include <type_traits>

#include "cuda/coefficients.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/packet.cuh"
#include "cuda/place.cuh"
#include "cuda/several.cuh"
#include "cuda/stored.cuh"
#include "float16.h"
#include "rounding.h"
#include "saturation.h"

namespace maxva::cuda {

// Note [Blocks]
// Where an operand has 16 bits a thread takes eight elements in a turn, else four, and blocks have fewer threads:
// between two chunks a block loads nothing, and the others of its multiprocessor must keep the memory busy. So many
// blocks must fit at once, which limits a thread to 80, 96 or 128 registers. Their threads have 48 KB and more under
// way, above what hides the latency of memory at full speed: 6 packets a thread where all operands are equally wide, 8
// and more where some are half as wide as others. Where all have 16 bits it is instructions that nearly bind on the
// fastest memory (8.0 to 10.x), and a fifth block fills cycles in which the warps of four all wait for a result.
template <typename Param, typename Grad, typename State>
constexpr int kStepThreads = sizeof(Param) == 2 || sizeof(Grad) == 2 || sizeof(State) == 2 ? 128 : 256;

#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1200)
constexpr bool kFastestMemory = false;
#else
constexpr bool kFastestMemory = true;
#endif

template <typename Param, typename Grad, typename State, bool kStatistics>
constexpr int kStepBlocks = [] {
  constexpr int kBytes = kStatistics ? 0 : sizeof(Param) + sizeof(Grad) + sizeof(State);
  return (kBytes == 12 ? 768 : kBytes == 6 && kFastestMemory ? 640 : 512) / kStepThreads<Param, Grad, State>;
}();

// Adds up the threads' sums pairwise and has one write the record. All threads of the block take part.
template <int kThreads, typename T>
__device__ __forceinline__ void write_record(const StatisticsSums<T>& own, StatisticsSums<float>* record) {
  __shared__ T sums[5][kThreads];
  const int thread = threadIdx.x;
  __syncthreads();  // the last chunk's record has been read
  sums[0][thread] = own.adaptive;
  sums[1][thread] = own.one_minus_beta;
  sums[2][thread] = own.at_upper;
  sums[3][thread] = own.at_lower;
  sums[4][thread] = own.grad_square;
  for (int stride = kThreads / 2; stride > 0; stride /= 2) {
    __syncthreads();
    if (thread < stride) {
#pragma unroll
      for (int i = 0; i < 5; ++i) {
        sums[i][thread] += sums[i][thread + stride];
      }
    }
  }
  if (thread == 0) {
    *in_global_memory(record) = {float(own.count),  float(sums[0][0]), float(sums[1][0]),
                                 float(sums[2][0]), float(sums[3][0]), float(sums[4][0])};
  }
}

// That of one lane.
template <typename T, int kCount>
__device__ __forceinline__ Update<T> lane(const Update<Several<T, kCount>>& of, int k) {
  return {of.change[k], of.adaptive[k], of.gradient[k], of.one_minus_beta[k]};
}

// What is the same for all elements of a tensor. Threads read it where it is, in shared memory: registers are scarce.
template <typename T>
struct Common {
  Coefficients<T> coefficients;
  RoundingKey key;  // of what is rounded stochastically
  bool rounds_param;
  int64_t step;    // with this one
  uint32_t stamp;  // of the chunk, see Note [Saturated chunks]
  bool searches;   // whether a chunk without stamp is to be looked through for w that are not 1
};

// The pointer of a warp's first thread, which is that of all: but so the compiler knows it, and keeps it once for the
// warp and not in two registers of each thread.
template <typename V>
__device__ __forceinline__ V* uniform(V* pointer) {
  const uint64_t bits = reinterpret_cast<uint64_t>(pointer);
  const uint32_t low = __shfl_sync(0xffffffffu, static_cast<uint32_t>(bits), 0);
  const uint32_t high = __shfl_sync(0xffffffffu, static_cast<uint32_t>(bits >> 32), 0);
  return reinterpret_cast<V*>(static_cast<uint64_t>(high) << 32 | low);
}

// What came of a chunk.
template <typename T>
struct Done {
  StatisticsSums<T> sums;  // of this thread, if they are taken
  uint32_t stamp;          // the chunk's for the next step
};

// Whether all w from `begin` to `end` are 1. All threads of the block take part.
template <int kThreads, typename State>
__device__ __forceinline__ bool is_saturated(const State* weight_sums, int begin, int end) {
  __syncthreads();  // what others of them have just written
  bool every = true;
  for (int i = begin + threadIdx.x; i < end; i += kThreads) {
    every = every && is_one(*in_global_memory(weight_sums + i));
  }
  return __syncthreads_and(every);
}

// Steps one chunk of one tensor.
template <Algorithm kAlgorithm, typename T, typename Param, typename Grad, typename State, bool kStatistics>
__device__ __forceinline__ Done<T> step_chunk(const StepRow& row, const Grad* grad, int64_t chunk,
                                              const Common<T>& common, const Modes modes) {
  constexpr int kThreads = kStepThreads<Param, Grad, State>;
  constexpr bool kRounds = !std::is_same_v<State, T>;
  constexpr bool kMayHaveMaster = std::is_same_v<Param, BFloat16>;
  constexpr bool kNarrowState = sizeof(State) <= sizeof(Param) && sizeof(State) <= sizeof(Grad);
  constexpr bool kNarrowParam = !kNarrowState && sizeof(Param) <= sizeof(Grad);
  using Narrow = std::conditional_t<kNarrowState, State, std::conditional_t<kNarrowParam, Param, Grad>>;
  constexpr int kWidth = kPerPacket<Narrow>;
  constexpr int kSlice = kPerPacket<State>;  // as many at a time need their state in registers
  // So many are updated side by side: as many as there are registers for, and in float64 there is no short chain.
  constexpr int kLanes = std::is_same_v<T, double> ? 1 : 4;
  static_assert(kStepChunk % (kWidth * kThreads) == 0);

  // 1. Where this chunk begins and ends, and whether packets can be used.
  const void* const narrow = kNarrowState ? row.exp_avg : kNarrowParam ? row.param : static_cast<const void*>(grad);
  const int misplaced = int(reinterpret_cast<uintptr_t>(narrow) % kPacketBytes) / int(sizeof(Narrow));
  const auto fits = [&](const auto* memory) { return is_packet_aligned(memory - misplaced); };
  const bool packets = fits(static_cast<Param*>(row.param)) && fits(grad) && fits(static_cast<State*>(row.exp_avg)) &&
                       fits(static_cast<State*>(row.grad_mean)) && fits(static_cast<State*>(row.grad_var)) &&
                       fits(static_cast<State*>(row.weight_sum)) &&
                       (!modes.amsgrad || fits(static_cast<State*>(row.max_denom))) &&
                       (!kMayHaveMaster || row.master == nullptr || fits(row.master));
  const int shift = packets ? misplaced : 0;
  const int64_t start = chunk * kStepChunk - shift;
  const bool is_last = (chunk + 1) * kStepChunk >= row.numel;

  Param* const params = uniform(static_cast<Param*>(row.param) + start);
  const Grad* const grads = uniform(grad + start);
  State* const exp_avgs = uniform(static_cast<State*>(row.exp_avg) + start);
  State* const grad_means = uniform(static_cast<State*>(row.grad_mean) + start);
  State* const grad_vars = uniform(static_cast<State*>(row.grad_var) + start);
  State* const weight_sums = uniform(static_cast<State*>(row.weight_sum) + start);
  State* const max_denoms = uniform(static_cast<State*>(row.max_denom) + start);
  int16_t* const rests = uniform(row.master + start);
  const bool has_master = kMayHaveMaster && row.master != nullptr;
  const bool known_saturated = is_stamped(common.stamp, common.step, shift);

  Place at;
  at.begin = chunk == 0 ? shift : 0;
  at.end = is_last ? int(row.numel - start) : int(kStepChunk);
  at.spacing = packets ? 1 : kThreads;
  StatisticsSums<T> sums{};
  const auto coefficients = broadcast<Several<T, kLanes>>(common.coefficients);
  const RoundingKey key{0, common.key.high};
  const uint32_t place = static_cast<uint32_t>(start) + common.key.low;  // which is added to all places
  for (at.first = threadIdx.x * (packets ? kWidth : 1); at.first < at.end; at.first += kThreads * kWidth) {
    at.whole = packets && at.first >= at.begin && at.first + kWidth <= at.end;

    Param param[kWidth];
    Grad gradient[kWidth];
    int16_t rest[kWidth];
#pragma unroll
    for (int from = 0; from < kWidth; from += kSlice) {
      // 2. Load, state in slices.
      State exp_avg[kSlice], grad_mean[kSlice], grad_var[kSlice], weight_sum[kSlice], max_denom[kSlice];
      fill_ones(weight_sum);
      at.if_whole([&](const auto whole) {
        if (from == 0) {
          at.load<whole>(params, 0, param);
          at.load<whole>(grads, 0, gradient);
          if constexpr (kMayHaveMaster) {
            if (has_master) {
              at.load<whole>(rests, 0, rest);
            }
          }
        }
        at.load<whole>(exp_avgs, from, exp_avg);
        at.load<whole>(grad_means, from, grad_mean);
        at.load<whole>(grad_vars, from, grad_var);
        if (!known_saturated) {
          at.load<whole>(weight_sums, from, weight_sum);
        }
        if (modes.amsgrad) {
          at.load<whole>(max_denoms, from, max_denom);
        }
      });
      const bool saturated = known_saturated || all_ones(weight_sum);

      // 3. Update. Where w is 1 the formula is shorter; a warp in which it is not everywhere would compute both.
      const auto update_slice = [&](const auto all_at_one) {
        const Modes of_slice{modes.eps, modes.decay, modes.amsgrad, all_at_one};
#pragma unroll
        for (int in_slice = 0; in_slice < kSlice; in_slice += kLanes) {
          const int in_packet = from + in_slice;
          const auto p = open_params<T, kLanes>(param + in_packet, has_master, rest + in_packet);
          const auto g = open<T, kLanes>(gradient + in_packet);
          auto m = open<T, kLanes>(exp_avg + in_slice), u = open<T, kLanes>(grad_mean + in_slice);
          auto s = open<T, kLanes>(grad_var + in_slice), w = open<T, kLanes>(weight_sum + in_slice);
          auto x = open<T, kLanes>(max_denom + in_slice);
          const auto to = update<kAlgorithm>(p, g, m, u, s, w, x, coefficients, of_slice);
          const auto random = [&](int k) {
            const int i = at.first + (in_packet + k) * at.spacing;
            return random_bits(key, place + static_cast<uint32_t>(i));
          };
          const auto results = p - to.change;
          const auto close = [&](const auto may_be_nan) {
            close_params(results, has_master, common.rounds_param, may_be_nan, random, param + in_packet,
                         rest + in_packet);
            keep(m, may_be_nan, [&](int k) { return random(k).exp_avg; }, exp_avg + in_slice);
            keep(u, may_be_nan, [&](int k) { return random(k).grad_mean; }, grad_mean + in_slice);
            keep(s, may_be_nan, [&](int k) { return random(k).grad_var; }, grad_var + in_slice);
            if (!all_at_one) {
              keep(w, may_be_nan, [&](int k) { return random(k).weight_sum; }, weight_sum + in_slice);
            }
          };
          if constexpr (kRounds) {  // a NaN in a moment is one in the parameter, see Update
            with_constant(may_have_nan(results), close);
          } else {
            close(std::true_type{});
          }
#pragma unroll
          for (int k = 0; k < kLanes; ++k) {
            convert(x[k], max_denom[in_slice + k]);  // to nearest: of rounded maxima the largest would stay, and grow
            if constexpr (kStatistics) {
              if (at.whole || at.find(in_packet + k) >= 0) {
                add_statistics(lane(to, k), common.coefficients, sums.adaptive, sums.one_minus_beta, sums.at_upper,
                               sums.at_lower, sums.grad_square);
              }
            }
          }
        }
      };
      with_constant(known_saturated || __all_sync(__activemask(), saturated), update_slice);

      // 4. Store.
      at.if_whole([&](const auto whole) {
        at.store<whole>(exp_avg, from, exp_avgs);
        at.store<whole>(grad_mean, from, grad_means);
        at.store<whole>(grad_var, from, grad_vars);
        if (!saturated) {  // once w is 1 it stays so
          at.store<whole>(weight_sum, from, weight_sums);
        }
        if (modes.amsgrad) {
          at.store<whole>(max_denom, from, max_denoms);
        }
        if (from + kSlice == kWidth) {
          at.store<whole>(param, 0, params);
          if constexpr (kMayHaveMaster) {
            if (has_master) {
              at.store<whole>(rest, 0, rests);
            }
          }
        }
      });
    }
  }
  sums.count = at.end - at.begin;

  // 5. Can the next step leave w alone?
  const bool saturated = known_saturated || (common.searches && is_saturated<kThreads>(weight_sums, at.begin, at.end));
  return {sums, saturated ? saturation_stamp(common.step + 1, shift) : 0};
}

// The last block to get here advances the step counts, when no other will read them any more.
template <int kThreads, typename T>
__device__ void advance_steps(const StepLaunch<T>& launch) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(launch.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) {
    return;
  }
  // Several at a time: a count is two reads away, one behind the other, and no other block hides that any more.
  constexpr int kAtOnce = 8;
  for (int first = threadIdx.x; first < launch.tensors; first += kAtOnce * kThreads) {
    int64_t* steps[kAtOnce];
    int64_t counts[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int tensor = first + k * kThreads;
      const bool counts_on = tensor < launch.tensors && launch.grads[tensor] != nullptr;
      steps[k] = counts_on ? launch.rows[tensor].step : nullptr;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      counts[k] = steps[k] != nullptr ? *in_global_memory(steps[k]) : 0;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (steps[k] != nullptr) {
        *in_global_memory(steps[k]) = counts[k] + 1;
      }
    }
  }
  if (threadIdx.x == 0) {
    *launch.ticket = 0;
  }
}

// Statistics are a template parameter because those who take none should not pay for their registers. With them all
// chunks are added up, which costs no time in a kernel that waits for memory, and those of the sample written.
template <Algorithm kAlgorithm, typename T, typename Param, typename Grad, typename State, bool kStatistics>
__global__ void __launch_bounds__(kStepThreads<Param, Grad, State>, kStepBlocks<Param, Grad, State, kStatistics>)
    step_kernel(const __grid_constant__ StepLaunch<T> launch) {
  // 1. Gradients that overflowed: neither parameters, nor state, nor step counts move. Devices add up their flags.
  if (launch.found_inf != nullptr && *launch.found_inf != T(0)) {
    return;
  }
  // 2. The blocks share out the chunks.
  __shared__ Common<T> common;
  __shared__ BiasCorrection<T> correction;  // of thread 0
  if (threadIdx.x == 0) {
    correction.step = 0;
  }
  for (int64_t chunk = blockIdx.x; chunk < launch.chunks; chunk += gridDim.x) {
    const int tensor = launch.chunk_rows[chunk];
    const Grad* grad = static_cast<const Grad*>(launch.grads[tensor]);
    if (grad == nullptr) {
      continue;
    }
    const StepRow row = launch.rows[tensor];
    const StepGroup<T>& group = launch.groups[row.group];
    if (threadIdx.x == 0) {
      const int64_t step = *in_global_memory(row.step) + 1;
      common.coefficients = read_coefficients(launch, group, tensor, correction.of(group.hyper.alpha_bits, step));
      common.step = step;
      common.stamp = launch.saturation == nullptr ? 0 : *in_global_memory(launch.saturation + chunk);
      common.searches = launch.saturation != nullptr && step % kSearches == 0;
      if constexpr (!std::is_same_v<State, T> || std::is_same_v<Param, BFloat16>) {
        common.key = rounding_key(row.rounding_key, step);
        common.rounds_param = group.rounds_params;
      }
    }
    __syncthreads();
    const Modes modes{group.eps_mode, group.hyper.decay_mode, row.max_denom != nullptr, false};
    const int64_t index = chunk - row.first_chunk;
    const Done<T> done = step_chunk<kAlgorithm, T, Param, Grad, State, kStatistics>(row, grad, index, common, modes);
    if constexpr (kStatistics) {
      if (is_sampled(index)) {
        write_record<kStepThreads<Param, Grad, State>>(done.sums, launch.statistics + chunk);
      }
    }
    __syncthreads();  // from here on the chunk's common is no longer read
    if (threadIdx.x == 0 && launch.saturation != nullptr) {
      *in_global_memory(launch.saturation + chunk) = done.stamp;
    }
  }
  // 3. Count the step.
  advance_steps<kStepThreads<Param, Grad, State>>(launch);
}

// The kernel of a parameter's and a state's dtype: each line fixes one thing more.
template <Algorithm kAlgorithm, typename T, typename Param, typename Grad, typename State>
Kernel select_statistics(bool statistics) {
  return {statistics ? reinterpret_cast<const void*>(&step_kernel<kAlgorithm, T, Param, Grad, State, true>)
                     : reinterpret_cast<const void*>(&step_kernel<kAlgorithm, T, Param, Grad, State, false>),
          kStepThreads<Param, Grad, State>};
}
template <typename T, typename Param, typename Grad, typename State>
Kernel select_algorithm(Algorithm algorithm, bool statistics) {
  return algorithm == Algorithm::kMAdam ? select_statistics<Algorithm::kMAdam, T, Param, Grad, State>(statistics)
                                        : select_statistics<Algorithm::kLaMAdam, T, Param, Grad, State>(statistics);
}
template <typename Param, typename State>
Kernel select_grad(DType grad, Algorithm algorithm, bool statistics) {
  switch (grad) {
    case DType::kFloat:
      return select_algorithm<float, Param, float, State>(algorithm, statistics);
    case DType::kHalf:
      return select_algorithm<float, Param, Half, State>(algorithm, statistics);
    case DType::kBFloat16:
      return select_algorithm<float, Param, BFloat16, State>(algorithm, statistics);
    case DType::kDouble:
      break;
  }
  return {};
}

}  // namespace maxva::cuda
