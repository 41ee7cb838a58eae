// From torch tensors to flat operands: what every backend's binding does before its kernel runs. Checks come first and
// change nothing; their messages name the tensor and say what to do.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace maxva {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor and its place in the schema, for messages: "grads[3] (shape [2, 3], torch.float32, strides [3, 1], cpu)".
struct Named {
  const Tensor& tensor;
  const char* list;
  size_t index;
};

// Each raises, naming the tensor, unless it fits.
// A strided floating-point tensor without overlapping memory on the device of the first parameter.
void check_param(const Named& param, const Named& first);
// A strided floating-point tensor.
void check_grad(const Named& grad);
// A strided tensor without overlapping memory, of the arithmetic's dtype or, if that is float32 and the state is
// `narrow`, bfloat16.
void check_moment(const Named& moment, const Named& param, bool narrow);
// What belongs to a bfloat16 parameter's master weight, see Note [Master weights].
void check_master(const Named& master, const Named& param);
// Of the parameter's shape and on its device.
void check_like(const Named& tensor, const Named& param);
// One element of that dtype on the parameter's device.
void check_scalar(const Named& scalar, ScalarType dtype, const Named& param);

// The dtype of a parameter's arithmetic, and of its state unless that is kept in bfloat16.
inline ScalarType arithmetic_dtype(ScalarType param) {
  return param == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Note [Layouts]
// A kernel sees a parameter as `numel` elements in memory order, so all operands of one parameter must agree on that
// order. They nearly always do: state is allocated like the parameter, and autograd gives gradients its strides. Where
// one does not (a transposed gradient, a parameter that is a slice of something), it is copied into the common layout
// and, if the kernel writes it, copied back: such tensors pay, no other does.
class FlatOperands {
 public:
  // Adopts `param`'s layout if it is dense, or else a dense one in the same order of dimensions.
  explicit FlatOperands(const Tensor& param);

  // The data of `tensor` in the common layout.
  void* data(const Tensor& tensor, bool written);

  // Copies back what the kernel wrote into temporaries.
  void write_back();

 private:
  struct Copy {
    Tensor temporary, original;
    bool written;
  };
  std::vector<int64_t> strides_;  // empty while the parameter's own can be used
  const Tensor& param_;
  std::vector<Copy> copies_;
};

// A tensor's elements in some dense memory order; a copy only where the tensor has none.
Tensor dense(const Tensor& tensor);

}  // namespace maxva
