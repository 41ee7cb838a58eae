// The dtypes that parameters and gradients are stored in.
#pragma once

namespace maxva {

// The numbers are those of maxva_kernels/launch.py (DTYPE_CODES).
enum class DType : int { kFloat, kDouble, kHalf, kBFloat16 };

}  // namespace maxva
