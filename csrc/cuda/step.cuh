// One step over the tensors of a table: the walk, the loads and the stores around the formula of maxva.h.
//
// Note [Modes at run time]
// Groups of one launch may differ in every mode, so within it modes are values that all threads of a block agree on:
// a few uniform branches in a kernel that waits for memory. Only what a whole launch shares is a template parameter.
//
// Note [Alignment]
// A thread takes kWidth consecutive elements, 16 bytes of the narrowest operand. A tensor may begin anywhere in such a
// packet (a view of a flat buffer does): its chunks are cut where packets begin, `shift` elements early, and only the
// packets over its two ends go element by element. That needs all operands to begin at the same place of a packet.
// Where they don't, the threads of that tensor take elements that are kStepThreads apart: every access is one element
// wide, and those of a warp still lie side by side.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/packet.cuh"
#include "cuda/several.cuh"
#include "float16.h"
#include "master.h"
#include "rounding.h"
#include "saturation.h"

namespace maxva::cuda {

// Blocks that must fit a multiprocessor at once, which limits a thread to 80 or 128 registers. Either way its threads
// have 48 KB and more under way, above what hides the latency of memory at full speed: 6 packets a thread where all
// operands are equally wide, 8 and more where some are half as wide as others.
template <typename Param, typename Grad, typename State, bool kStatistics>
constexpr int kStepBlocks = sizeof(Param) == 4 && sizeof(Grad) == 4 && sizeof(State) == 4 && !kStatistics ? 3 : 2;

// The elements of one thread in one turn: element k lies `first + k * spacing` behind where the chunk begins.
struct Place {
  int first;
  int begin, end;  // the chunk's elements that are there: before and beyond lie none, or other chunks'
  int spacing;
  bool whole;  // all are there and lie in aligned packets

  // Calls access(true or false), as a type that `load` and `store` take for kWhole: one branch for all operands.
  template <typename Access>
  __device__ __forceinline__ void if_whole(const Access& access) const {
    with_constant(whole, access);
  }

  // Where element k is, or -1 if it is not there. The empty statement hides how it was computed: else the compiler
  // keeps the addresses of these rare accesses from the loads to the stores, and spills other registers for them.
  __device__ __forceinline__ int find(int k) const {
    int i = first + k * spacing;
    asm volatile("" : "+r"(i));
    return i >= begin && i < end ? i : -1;
  }

  // Elements from ... from + kCount - 1 of the thread.
  template <bool kWhole, int kCount, typename Stored>
  __device__ __forceinline__ void load(const Stored* memory, int from, Stored (&to)[kCount]) const {
    if constexpr (kWhole) {
      load_packets(memory + first + from, to);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const int i = find(from + k);
        if (i >= 0) {
          to[k] = *in_global_memory(memory + i);
        }
      }
    }
  }

  template <bool kWhole, int kCount, typename Stored>
  __device__ __forceinline__ void store(const Stored (&values)[kCount], int from, Stored* memory) const {
    if constexpr (kWhole) {
      store_packets(values, memory + first + from);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const int i = find(from + k);
        if (i >= 0) {
          *in_global_memory(memory + i) = values[k];
        }
      }
    }
  }
};

// Adds up the threads' sums pairwise and has one write the record. All threads of the block take part.
template <typename T>
__device__ __forceinline__ void write_record(const StatisticsSums<T>& own, StatisticsSums<float>* record) {
  __shared__ T sums[5][kStepThreads];
  const int thread = threadIdx.x;
  __syncthreads();  // the last chunk's record has been read
  sums[0][thread] = own.adaptive;
  sums[1][thread] = own.one_minus_beta;
  sums[2][thread] = own.at_upper;
  sums[3][thread] = own.at_lower;
  sums[4][thread] = own.grad_square;
  for (int stride = kStepThreads / 2; stride > 0; stride /= 2) {
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

// Stores a moment: in the arithmetic's type, or rounded stochastically.
template <typename T>
__device__ __forceinline__ void keep(T value, uint32_t, T& stored) {
  stored = value;
}
__device__ __forceinline__ void keep(float value, uint32_t random, BFloat16& stored) {
  stored = round_stochastically(value, random);
}

// That of one lane.
template <typename T, int kCount>
__device__ __forceinline__ Update<T> lane(const Update<Several<T, kCount>>& of, int k) {
  return {of.change[k], of.adaptive[k], of.gradient[k], of.one_minus_beta[k]};
}

template <int kCount, typename Stored>
__device__ __forceinline__ void fill_ones(Stored (&values)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    values[k] = one<Stored>();
  }
}

template <int kCount, typename Stored>
__device__ __forceinline__ bool all_ones(const Stored (&values)[kCount]) {
  bool every = true;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    every = every && is_one(values[k]);
  }
  return every;
}

// Values of parameters, which only in bfloat16 may have masters.
template <typename T, int kCount, typename Param>
__device__ __forceinline__ Several<T, kCount> open_params(const Param* params, bool has_master, const int16_t* rests) {
  if constexpr (std::is_same_v<Param, BFloat16>) {
    if (has_master) {
      return each<kCount>([&](int k) { return join_master(params[k], rests[k]); });
    }
  }
  return each<kCount>([&](int k) { return widen<T>(params[k]); });
}
// And back. `random(k)` gives a lane's RandomBits.
template <typename T, int kCount, typename Param, typename Random>
__device__ __forceinline__ void close_params(const Several<T, kCount>& values, bool has_master, bool rounds,
                                             const Random& random, Param* params, int16_t* rests) {
  const auto for_each = [&](const auto& close) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      close(k);
    }
  };
  if constexpr (std::is_same_v<Param, BFloat16>) {
    if (has_master) {
      return for_each([&](int k) { split_master(values[k], params[k], rests[k]); });
    }
    if (rounds) {
      return for_each([&](int k) { params[k] = round_stochastically(values[k], random(k).param); });
    }
  }
  for_each([&](int k) { convert(values[k], params[k]); });
}

// The last bias correction of a block. The chunks of a model mostly share it, and while one thread computes it, which
// takes some twenty multiplications in a row, its block loads nothing.
template <typename T>
struct BiasCorrection {
  uint64_t alpha_bits;
  int64_t step;  // 0: none yet
  T value;

  __device__ T of(uint64_t its_alpha_bits, int64_t its_step) {
    if (its_step != step || its_alpha_bits != alpha_bits) {
      *this = {its_alpha_bits, its_step, bias_correction<T>(its_alpha_bits, its_step)};
    }
    return value;
  }
};

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
template <typename State>
__device__ __forceinline__ bool is_saturated(const State* weight_sums, int begin, int end) {
  __syncthreads();  // what others of them have just written
  bool every = true;
  for (int i = begin + threadIdx.x; i < end; i += kStepThreads) {
    every = every && is_one(*in_global_memory(weight_sums + i));
  }
  return __syncthreads_and(every);
}

// Steps one chunk of one tensor.
template <Algorithm kAlgorithm, typename T, typename Param, typename Grad, typename State, bool kStatistics>
__device__ __forceinline__ Done<T> step_chunk(const StepRow& row, const Grad* grad, int64_t chunk,
                                              const Common<T>& common, const Modes modes) {
  constexpr bool kRounds = !std::is_same_v<State, T>;
  constexpr bool kMayHaveMaster = std::is_same_v<Param, BFloat16>;
  constexpr bool kNarrowState = sizeof(State) <= sizeof(Param) && sizeof(State) <= sizeof(Grad);
  constexpr bool kNarrowParam = !kNarrowState && sizeof(Param) <= sizeof(Grad);
  using Narrow = std::conditional_t<kNarrowState, State, std::conditional_t<kNarrowParam, Param, Grad>>;
  constexpr int kWidth = kPerPacket<Narrow>;
  constexpr int kSlice = kPerPacket<State>;  // as many at a time need their state in registers
  // So many are updated side by side: as many as there are registers for, and in float64 there is no short chain.
  constexpr int kLanes = std::is_same_v<T, double> ? 1 : kRounds && kStatistics ? 2 : 4;
  static_assert(kStepChunk % (kWidth * kStepThreads) == 0);

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
  at.spacing = packets ? 1 : kStepThreads;
  StatisticsSums<T> sums{};
  const auto coefficients = broadcast<Several<T, kLanes>>(common.coefficients);
  for (at.first = threadIdx.x * (packets ? kWidth : 1); at.first < at.end; at.first += kStepThreads * kWidth) {
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
          const auto open = [](const auto* stored) { return each<kLanes>([&](int k) { return widen<T>(stored[k]); }); };
          const auto p = open_params<T, kLanes>(param + in_packet, has_master, rest + in_packet);
          const auto g = open(gradient + in_packet);
          auto m = open(exp_avg + in_slice), u = open(grad_mean + in_slice), s = open(grad_var + in_slice);
          auto w = open(weight_sum + in_slice), x = open(max_denom + in_slice);
          const auto to = update<kAlgorithm>(p, g, m, u, s, w, x, coefficients, of_slice);
          const auto random = [&](int k) {
            const int i = at.first + (in_packet + k) * at.spacing;
            return random_bits(common.key, static_cast<uint32_t>(start) + static_cast<uint32_t>(i));
          };
          close_params(p - to.change, has_master, common.rounds_param, random, param + in_packet, rest + in_packet);
#pragma unroll
          for (int k = 0; k < kLanes; ++k) {
            const RandomBits<uint32_t> bits = kRounds ? random(k) : RandomBits<uint32_t>{};
            keep(m[k], bits.exp_avg, exp_avg[in_slice + k]);
            keep(u[k], bits.grad_mean, grad_mean[in_slice + k]);
            keep(s[k], bits.grad_var, grad_var[in_slice + k]);
            keep(w[k], bits.weight_sum, weight_sum[in_slice + k]);
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
  const bool saturated = known_saturated || (common.searches && is_saturated(weight_sums, at.begin, at.end));
  return {sums, saturated ? saturation_stamp(common.step + 1, shift) : 0};
}

// What a tensor's elements share. The gradient's factor is read here, on the device, as the step count is, so that no
// host waits for them and a captured graph sees their values of the day.
template <typename T>
__device__ Coefficients<T> read_coefficients(const StepLaunch<T>& launch, const StepGroup<T>& group, int tensor,
                                             T correction) {
  const T scale = launch.grad_scale != nullptr ? *launch.grad_scale : T(1);
  const T norm = launch.grad_norm != nullptr ? *launch.grad_norm : T(0);
  const T max_norm = launch.grad_norm != nullptr ? launch.max_grad_norm : T(-1);
  Hyperparameters<T> hyper = group.hyper;
  if (group.lr != nullptr) {
    hyper.lr = *group.lr;
  }
  if (launch.trust_ratios != nullptr) {
    hyper.lr = hyper.lr * launch.trust_ratios[tensor];
  }
  return make_coefficients(hyper, correction, grad_factor(scale, norm, max_norm, group.maximize));
}

// The last block to get here advances the step counts, when no other will read them any more.
template <typename T>
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
  for (int tensor = threadIdx.x; tensor < launch.tensors; tensor += kStepThreads) {
    if (launch.grads[tensor] != nullptr) {
      ++*in_global_memory(launch.rows[tensor].step);
    }
  }
  if (threadIdx.x == 0) {
    *launch.ticket = 0;
  }
}

// Statistics are a template parameter because those who take none should not pay for their registers. With them all
// chunks are added up, which costs no time in a kernel that waits for memory, and those of the sample written.
template <Algorithm kAlgorithm, typename T, typename Param, typename Grad, typename State, bool kStatistics>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks<Param, Grad, State, kStatistics>)
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
        write_record(done.sums, launch.statistics + chunk);
      }
    }
    __syncthreads();  // from here on the chunk's common is no longer read
    if (threadIdx.x == 0 && launch.saturation != nullptr) {
      *in_global_memory(launch.saturation + chunk) = done.stamp;
    }
  }
  // 3. Count the step.
  advance_steps(launch);
}

// The kernel of a parameter's and a state's dtype: each line fixes one thing more.
template <Algorithm kAlgorithm, typename T, typename Param, typename Grad, typename State>
const void* select_statistics(bool statistics) {
  return statistics ? reinterpret_cast<const void*>(&step_kernel<kAlgorithm, T, Param, Grad, State, true>)
                    : reinterpret_cast<const void*>(&step_kernel<kAlgorithm, T, Param, Grad, State, false>);
}
template <typename T, typename Param, typename Grad, typename State>
const void* select_algorithm(Algorithm algorithm, bool statistics) {
  return algorithm == Algorithm::kMAdam ? select_statistics<Algorithm::kMAdam, T, Param, Grad, State>(statistics)
                                        : select_statistics<Algorithm::kLaMAdam, T, Param, Grad, State>(statistics);
}
template <typename Param, typename State>
const void* select_grad(DType grad, Algorithm algorithm, bool statistics) {
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
  return nullptr;
}

}  // namespace maxva::cuda
