// What the CPU bindings read off tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cpu/kernels.h"
#include "float16.h"

namespace maxva::cpu {

// The dtype of a checked parameter or gradient.
inline DType dtype_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat;
  }
}

// The value of a float32 or float64 CPU tensor with one element.
inline double scalar_value(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  MAXVA_CHECK(tensor.is_cpu() && tensor.numel() == 1 && (dtype == ScalarType::Float || dtype == ScalarType::Double),
              name, " must be one float32 or float64 on the CPU");
  const void* data = tensor.const_data_ptr();
  return dtype == ScalarType::Float ? *static_cast<const float*>(data) : *static_cast<const double*>(data);
}

}  // namespace maxva::cpu
