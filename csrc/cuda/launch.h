// What the kernels are given, as plain structs: the host path (arguments.cpp, maxva_kernels/tensor_table.py) fills
// them, the kernels read them. Neither torch nor CUDA is known here.
//
// Note [What stays and what travels]
// Between steps only gradients move. What stays, pointers to parameters and state, sizes, the way the work is cut, is a
// table in device memory that is built once. What may change, gradients, hyperparameters, scalars, travels with the
// launch as its arguments, which are constant memory to the kernel: no copy to the device, and no wait for one. CUDA
// takes 32,764 bytes of arguments since 12.1, enough for a model of kMaxTensors tensors in one launch. Captured in a
// graph, launches of more than 4 KB were reported to crash under CUDA 12 (openxla/xla, pull request 19252), and PyTorch
// has them there from CUDA 13 on: so have we (GRAPHS in module.cpp, maxva_kernels/gpu.py).
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"
#include "maxva.h"
#include "norm.h"
#include "statistics.h"

namespace maxva::cuda {

constexpr size_t kMaxLaunchBytes = 32764;
constexpr int kMaxTensors = 2900;  // of one launch
constexpr int kMaxGroups = 64;

// One parameter in the table.
struct StepRow {
  void* param;
  void* exp_avg;
  void* grad_mean;
  void* grad_var;
  void* weight_sum;
  void* max_denom;  // null without AMSGrad
  int64_t* step;
  int64_t numel;
  int64_t group;          // index into StepLaunch::groups
  int64_t first_chunk;    // its place in the row of all chunks
  uint64_t rounding_key;  // of what is rounded stochastically
  int16_t* master;        // of a kBFloat16 parameter, or null
};

template <typename T>
struct StepGroup {
  Hyperparameters<T> hyper;
  const T* lr;  // on the device, in place of hyper.lr; null: that one counts
  EpsMode eps_mode;
  bool maximize;
  bool rounds_params;  // stochastically, where they are kBFloat16 and without master
};

// The arguments of a step's launch.
template <typename T>
struct StepLaunch {
  const StepRow* rows;
  const int32_t* chunk_rows;  // for each chunk its row
  int64_t chunks;
  unsigned* ticket;                   // counts the blocks that are done; 0 between launches
  const T* grad_scale;                // null: 1
  const T* found_inf;                 // null: 0
  const T* grad_norm;                 // null: no clip
  const T* trust_ratios;              // for each row what its learning rate is multiplied by; null: 1
  StatisticsSums<float>* statistics;  // for each chunk; null: none are taken
  uint32_t* saturation;               // for each chunk its stamp, see Note [Saturated chunks]; null: none
  UpdateSquares<T>* squares;          // for each chunk, where the kernels of update_norm.cuh
  T* norms;                           // leave two for each row, the parameter's and its update's
  T max_grad_norm;
  int32_t tensors;
  DType param_dtype, grad_dtype, state_dtype;  // for kernels that are not compiled for each
  StepGroup<T> groups[kMaxGroups];
  const void* grads[kMaxTensors];  // for each row; null: no gradient this time, the tensor is left alone
};

// One gradient in the table of the norm.
struct NormRow {
  int64_t numel;
  int64_t first_chunk;  // its place in the row of this launch's chunks
  int64_t first_sum;    // and in that of all launches' chunks, see Note [Deterministic norm]
};

// The arguments of a launch that sums the squares of chunks.
template <typename T>
struct NormLaunch {
  const NormRow* rows;
  const int32_t* chunk_rows;
  int64_t chunks;
  SumOfSquares<T>* sums;  // for each chunk of all launches
  const void* grads[kMaxTensors];
};

static_assert(sizeof(StepLaunch<float>) <= kMaxLaunchBytes && sizeof(StepLaunch<double>) <= kMaxLaunchBytes);
static_assert(sizeof(NormLaunch<double>) <= kMaxLaunchBytes);

}  // namespace maxva::cuda
