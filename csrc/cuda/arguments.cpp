#include "cuda/arguments.h"

#include "check.h"

namespace maxva::cuda {
namespace {

template <typename Pointee>
Pointee* pointer(uint64_t address) {
  return reinterpret_cast<Pointee*>(static_cast<uintptr_t>(address));
}

void fill_grads(const void** to, const uint64_t* grads, int64_t tensors) {
  MAXVA_CHECK(tensors <= kMaxTensors, tensors, " tensors for one launch, which takes ", kMaxTensors);
  for (int64_t i = 0; i < tensors; ++i) {
    to[i] = pointer<const void>(grads[i]);
  }
}

}  // namespace

template <typename T>
void fill(StepLaunch<T>& launch, const StepInput& input) {
  MAXVA_CHECK(input.group_count <= kMaxGroups, input.group_count, " groups for one launch, which takes ", kMaxGroups);
  launch.param_dtype = static_cast<DType>(input.param_dtype);
  launch.grad_dtype = static_cast<DType>(input.grad_dtype);
  launch.state_dtype = static_cast<DType>(input.state_dtype);
  launch.rows = pointer<const StepRow>(input.rows);
  launch.chunk_rows = pointer<const int32_t>(input.chunk_rows);
  launch.chunks = input.chunks;
  launch.ticket = pointer<unsigned>(input.ticket);
  launch.grad_scale = pointer<const T>(input.grad_scale);
  launch.found_inf = pointer<const T>(input.found_inf);
  launch.grad_norm = pointer<const T>(input.grad_norm);
  launch.trust_ratios = pointer<const T>(input.trust_ratios);
  launch.statistics = pointer<StatisticsSums<float>>(input.statistics);
  launch.saturation = pointer<uint32_t>(input.saturation);
  launch.squares = pointer<UpdateSquares<T>>(input.squares);
  launch.norms = pointer<T>(input.norms);
  launch.max_grad_norm = static_cast<T>(input.max_grad_norm);
  launch.tensors = static_cast<int32_t>(input.tensors);
  for (int64_t i = 0; i < input.group_count; ++i) {
    const PackedGroup& g = input.groups[i];
    StepGroup<T>& group = launch.groups[i];
    group.hyper = make_hyperparameters<T>(g.lr, g.beta1, g.beta2_lower, g.beta2_upper, g.beta2_init, g.eps,
                                          g.weight_decay, g.decoupled_weight_decay != 0);
    group.lr = pointer<const T>(g.lr_address);
    group.eps_mode = g.adam_eps != 0 ? EpsMode::kAdam : EpsMode::kPaper;
    group.maximize = g.maximize != 0;
    group.rounds_params = g.stochastic_rounding != 0;
  }
  fill_grads(launch.grads, input.grads, input.tensors);
}

template <typename T>
void fill(NormLaunch<T>& launch, const NormInput& input) {
  launch.rows = pointer<const NormRow>(input.rows);
  launch.chunk_rows = pointer<const int32_t>(input.chunk_rows);
  launch.chunks = input.chunks;
  launch.sums = pointer<SumOfSquares<T>>(input.sums);
  fill_grads(launch.grads, input.grads, input.tensors);
}

template void fill(StepLaunch<float>&, const StepInput&);
template void fill(StepLaunch<double>&, const StepInput&);
template void fill(NormLaunch<float>&, const NormInput&);
template void fill(NormLaunch<double>&, const NormInput&);

}  // namespace maxva::cuda
