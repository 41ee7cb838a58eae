// What a step can tell about its coordinates: sums over chunks, which Python divides and adds up when it is asked.
//
// Note [Statistics]
// They are of a sample: one chunk in sixteen, and the first of every tensor, always the same. Where instructions and
// not bytes bind, on a CPU, taking them of all would cost a sixth to a half of the step. The sampled chunks follow the
// golden ratio, which no layer's width resonates with.
//
// A chunk's record is written by whoever steps the chunk, and no two chunks share one: so there are no atomics, and a
// record depends on nothing but the chunk and the backend, whose order of additions within a chunk is its own. Records
// are float32, whatever the arithmetic: they are for people.
#pragma once

#include "maxva.h"

namespace maxva {

// Elements of a tensor that share a record, a stamp (saturation.h) and a sum of squares in the norm of the update. A
// multiple of what a GPU's block loads at once, whatever the dtypes.
constexpr int64_t kStepChunk = 8192;

constexpr int64_t chunks_of(int64_t numel) {
  return (numel + kStepChunk - 1) / kStepChunk;
}

MAXVA_FN bool is_sampled(int64_t chunk) {
  return static_cast<uint32_t>(chunk) * 0x9e3779b9u < 0x10000000u;
}

// The fields of a record, in its order (maxva_kernels/statistics.py, FIELDS).
template <typename T>
struct StatisticsSums {
  T count;     // of coordinates
  T adaptive;  // |what was subtracted from the parameter, but for weight decay|
  T one_minus_beta;
  T at_upper;  // how many had beta at its upper bound
  T at_lower;
  T grad_square;  // of the gradient unscaled and clipped
};
constexpr int kStatisticsFields = sizeof(StatisticsSums<float>) / sizeof(float);

template <typename T>
MAXVA_FN void add_statistics(const Update<T>& of, const Coefficients<T>& c, T& adaptive, T& one_minus_beta, T& at_upper,
                             T& at_lower, T& grad_square) {
  adaptive += magnitude(of.adaptive);
  one_minus_beta += of.one_minus_beta;
  at_upper += of.one_minus_beta == c.one_minus_beta_upper ? T(1) : T(0);
  at_lower += of.one_minus_beta == c.one_minus_beta_lower ? T(1) : T(0);
  grad_square += of.gradient * of.gradient;
}

}  // namespace maxva
