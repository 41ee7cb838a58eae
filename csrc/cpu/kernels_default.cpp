// The kernels for the compiler's baseline (any architecture). See Note [One source, several instruction sets].
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/kernels.inc"

namespace maxva::cpu {
extern const Kernels kKernelsDefault{
    "DEFAULT", step, update_squares<float>, update_squares<double>, sum_of_squares<float>, sum_of_squares<double>};
}
