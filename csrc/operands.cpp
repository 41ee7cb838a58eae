#include "operands.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>

#include "check.h"

namespace maxva {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::Layout;

std::string list_of(IntHeaderOnlyArrayRef values) {
  std::string out = "[";
  for (size_t i = 0; i < values.size(); ++i) {
    out += joined(i == 0 ? "" : ", ", values[i]);
  }
  return out + "]";
}

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

bool is_strided(const Tensor& tensor) {
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  return layout == aoti_torch_layout_strided();
}

int32_t device_type(const Tensor& tensor) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

bool same_device(const Tensor& a, const Tensor& b) {
  return device_type(a) == device_type(b) && a.get_device_index() == b.get_device_index();
}

bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

bool same_strides(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef a, IntHeaderOnlyArrayRef b) {
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > 1 && a[i] != b[i]) {
      return false;
    }
  }
  return true;
}

// The dimensions that have more than one entry, the one with the smallest stride first.
std::vector<size_t> memory_order(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  std::vector<size_t> order;
  for (size_t i = sizes.size(); i-- > 0;) {
    if (sizes[i] > 1) {
      order.push_back(i);
    }
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  return order;
}

std::string describe(const Named& named) {
  const Tensor& tensor = named.tensor;
  const std::string strides = is_strided(tensor) ? joined(", strides ", list_of(tensor.strides())) : "";
  const std::string device = tensor.is_cpu()    ? "cpu"
                             : tensor.is_cuda() ? joined("cuda:", tensor.get_device_index())
                                                : "another device";
  return joined(named.list, "[", named.index, "] (shape ", list_of(tensor.sizes()), ", ",
                dtype_name(tensor.scalar_type()), strides, ", ", device, ")");
}

void check_memory(const Named& named) {
  MAXVA_CHECK(named.tensor.numel() == 0 || named.tensor.const_data_ptr() != nullptr, describe(named),
              " has no memory: its storage was freed; pass the tensor that is used in its place");
}

// Sufficient for distinct places: every stride exceeds what the dimensions below it span.
bool may_overlap(const Tensor& tensor) {
  if (tensor.is_contiguous() || tensor.numel() == 0) {
    return false;
  }
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t span = 0;
  for (size_t i : memory_order(sizes, strides)) {
    if (strides[i] <= span) {
      return true;
    }
    span += (sizes[i] - 1) * strides[i];
  }
  return false;
}

// Strides without gaps in the same order of dimensions.
std::vector<int64_t> dense_strides(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  std::vector<int64_t> strides(sizes.size(), 1);
  int64_t stride = 1;
  for (size_t i : memory_order(sizes, tensor.strides())) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  return strides;
}

// No gaps and no overlaps: the elements are exactly `numel` places in memory.
bool is_dense(const Tensor& tensor) {
  return tensor.is_contiguous() || tensor.numel() == 0 ||
         same_strides(tensor.sizes(), tensor.strides(), dense_strides(tensor));
}

Tensor empty_strided_like(const Tensor& tensor, const int64_t* strides) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  const auto sizes = tensor.sizes();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(tensor.dim(), sizes.data(), strides, dtype, device_type(tensor),
                                                  tensor.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace

void check_param(const Named& param, const Named& first) {
  MAXVA_CHECK(is_strided(param.tensor), describe(param), " is sparse, which is not supported; use a dense parameter");
  MAXVA_CHECK(is_supported(param.tensor.scalar_type()), describe(param),
              " must be float32, bfloat16, float16 or float64; ",
              "for a complex parameter optimise torch.view_as_real(parameter)");
  MAXVA_CHECK(same_device(param.tensor, first.tensor), describe(param), " is on another device than ", describe(first),
              "; pass the parameters of each device in a call of their own");
  MAXVA_CHECK(!may_overlap(param.tensor), describe(param),
              " has elements that share memory (an expanded tensor?); use parameter.clone() or .contiguous()");
  check_memory(param);
}

void check_grad(const Named& grad) {
  MAXVA_CHECK(is_strided(grad.tensor), describe(grad), " is sparse, which is not supported; ",
              "use .to_dense(), or sparse=False where the layer that makes it has that option");
  MAXVA_CHECK(is_supported(grad.tensor.scalar_type()), describe(grad),
              " must be float32, bfloat16, float16 or float64");
  check_memory(grad);
}

void check_moment(const Named& moment, const Named& param, bool narrow) {
  MAXVA_CHECK(is_strided(moment.tensor), describe(moment), " is sparse, which is not supported; use .to_dense()");
  ScalarType required = arithmetic_dtype(param.tensor.scalar_type());
  if (narrow && required == ScalarType::Float) {
    required = ScalarType::BFloat16;
  }
  MAXVA_CHECK(moment.tensor.scalar_type() == required, describe(moment), " must be ", dtype_name(required),
              " as the state of ", describe(param), "; was a checkpoint loaded in another dtype?");
  MAXVA_CHECK(!may_overlap(moment.tensor), describe(moment),
              " has elements that share memory (an expanded tensor?); use .clone()");
  check_memory(moment);
}

void check_master(const Named& master, const Named& param) {
  MAXVA_CHECK(param.tensor.scalar_type() == ScalarType::BFloat16, describe(master), " belongs to ", describe(param),
              ", and only bfloat16 parameters have such masters; pass a tensor without elements");
  MAXVA_CHECK(is_strided(master.tensor) && master.tensor.scalar_type() == ScalarType::BFloat16, describe(master),
              " must be dense and torch.bfloat16 as the master of ", describe(param));
  MAXVA_CHECK(!may_overlap(master.tensor), describe(master),
              " has elements that share memory (an expanded tensor?); use .clone()");
  check_memory(master);
  check_like(master, param);
}

void check_like(const Named& tensor, const Named& param) {
  MAXVA_CHECK(tensor.tensor.sizes().equals(param.tensor.sizes()), describe(tensor), " must have the shape of ",
              describe(param));
  MAXVA_CHECK(same_device(tensor.tensor, param.tensor), describe(tensor), " must be on the device of ", describe(param),
              "; move it there");
}

void check_scalar(const Named& scalar, ScalarType dtype, const Named& param) {
  const Tensor& tensor = scalar.tensor;
  MAXVA_CHECK(
      is_strided(tensor) && tensor.scalar_type() == dtype && tensor.numel() == 1 && same_device(tensor, param.tensor),
      describe(scalar), " must be one ", dtype_name(dtype), " on the device of ", describe(param));
}

FlatOperands::FlatOperands(const Tensor& param) : param_(param) {
  if (!is_dense(param)) {
    strides_ = dense_strides(param);
  }
}

void* FlatOperands::data(const Tensor& tensor, bool written) {
  const IntHeaderOnlyArrayRef common = strides_.empty() ? param_.strides() : IntHeaderOnlyArrayRef(strides_);
  if (tensor.numel() == 0 || same_strides(tensor.sizes(), tensor.strides(), common)) {
    return written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  }
  Copy copy{empty_strided_like(tensor, common.data()), tensor, written};
  torch::stable::copy_(copy.temporary, tensor);
  copies_.push_back(copy);
  return copy.temporary.mutable_data_ptr();
}

void FlatOperands::write_back() {
  for (Copy& copy : copies_) {
    if (copy.written) {
      torch::stable::copy_(copy.original, copy.temporary);
    }
  }
}

Tensor dense(const Tensor& tensor) {
  if (is_dense(tensor)) {
    return tensor;
  }
  Tensor temporary = empty_strided_like(tensor, dense_strides(tensor).data());
  torch::stable::copy_(temporary, tensor);
  return temporary;
}

}  // namespace maxva
