// The CPU kernels as tables of functions, one table for each instruction set, chosen when the first is asked for.
//
// Note [One source, several instruction sets]
// kernels.inc holds the loops and is compiled once for each instruction set by kernels_{default,avx2,avx512}.cpp, so
// a wheel built anywhere is fast everywhere. All of it has internal linkage: were an inline function shared between
// those translation units, the linker could keep the AVX-512 copy for a machine that has none.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "maxva.h"
#include "norm.h"
#include "statistics.h"

namespace maxva::cpu {

// One tensor's step: what stands still while its elements are walked. All operands have the same layout.
struct TensorStep {
  void* param;
  const void* grad;
  void* exp_avg;
  void* grad_mean;
  void* grad_var;
  void* weight_sum;
  void* max_denom;    // null without AMSGrad
  int16_t* master;    // of a kBFloat16 parameter, or null
  DType param_dtype;  // kDouble: state and arithmetic are double, else float
  DType grad_dtype;
  DType state_dtype;  // that of the arithmetic, or kBFloat16
  Algorithm algorithm;
  EpsMode eps_mode;
  WeightDecay decay_mode;
  Coefficients<float> single;  // the one that belongs to the arithmetic is set
  Coefficients<double> twice;
  StatisticsSums<float>* statistics;  // the record of its first chunk; null: none are taken
  uint32_t* saturation;               // the stamp of its first chunk, see Note [Saturated chunks]; null: none
  uint64_t rounding_key;              // of what is rounded stochastically
  bool rounds_param;                  // stochastically, if it is kBFloat16 and without master
  int64_t step;                       // with this one
};

struct Kernels {
  const char* capability;
  // Updates the elements begin <= i < end, which are whole chunks.
  void (*step)(const TensorStep& tensor, int64_t begin, int64_t end);
  // Updates nothing and sums the squares of the elements begin <= i < end, one chunk, and of what a step would
  // subtract.
  UpdateSquares<float> (*update_squares)(const TensorStep& tensor, int64_t begin, int64_t end);
  UpdateSquares<double> (*update_squares_double)(const TensorStep& tensor, int64_t begin, int64_t end);
  // Sums the squares of `count` elements (one chunk of a tensor) by the rule of norm.h.
  SumOfSquares<float> (*sum_of_squares)(const void* grad, DType dtype, int64_t count);
  SumOfSquares<double> (*sum_of_squares_double)(const void* grad, DType dtype, int64_t count);
};

extern const Kernels kKernelsDefault;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

// The best table that this machine runs, or a lesser one named by the environment variable MAXVA_CPU_CAPABILITY.
const Kernels& kernels();

}  // namespace maxva::cpu
