// The dtypes that parameters and gradients are stored in.
#pragma once

namespace maxva {

// The numbers are those of maxva_kernels/tensor_table.py.
enum class DType : int { kFloat, kDouble, kHalf, kBFloat16 };

}  // namespace maxva
