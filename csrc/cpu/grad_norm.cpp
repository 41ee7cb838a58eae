// maxva::grad_norm for CPU tensors: the global norm by the rule of norm.h, and the query of the instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/pieces.h"
#include "cpu/sums.h"
#include "cpu/tensors.h"
#include "operands.h"

namespace maxva::cpu {
namespace {

// Elements below which a thread is not worth waking.
constexpr int64_t kGrain = 65536;

struct Chunk {
  int64_t place;
  const char* data;
  DType dtype;
  int64_t count;
};

template <typename T>
T global_norm(const std::vector<Chunk>& chunks, int64_t total,
              SumOfSquares<T> (*sum_of_squares)(const void*, DType, int64_t)) {
  std::vector<SumOfSquares<T>> sums(chunks.size());
  for_chunks(chunks, total, kGrain,
             [&](int64_t i) { sums[i] = sum_of_squares(chunks[i].data, chunks[i].dtype, chunks[i].count); });
  return root(add_up(sums.data(), sums.size()));
}

Tensor grad_norm_cpu(std::vector<Tensor> grads) {
  MAXVA_CHECK(!grads.empty(), "grads is empty; pass at least one tensor");
  std::vector<Tensor> flat;
  std::vector<Chunk> chunks;
  bool any_double = false;
  int64_t total = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    check_grad({grads[i], "grads", i});
    any_double = any_double || grads[i].scalar_type() == ScalarType::Double;
  }
  for (const Tensor& grad : grads) {
    if (grad.numel() == 0) {
      continue;
    }
    const Tensor& elements = flat.emplace_back(dense(grad));
    const char* data = static_cast<const char*>(elements.const_data_ptr());
    for (int64_t start = 0, size = grad.element_size(); start < grad.numel(); start += kNormChunk) {
      chunks.push_back(
          {total + start, data + start * size, dtype_of(grad), std::min(kNormChunk, grad.numel() - start)});
    }
    total += grad.numel();
  }
  const IeeeMode mode;
  Tensor norm = torch::stable::new_empty(grads[0], {}, any_double ? ScalarType::Double : ScalarType::Float);
  if (any_double) {
    *static_cast<double*>(norm.mutable_data_ptr()) =
        global_norm<double>(chunks, total, kernels().sum_of_squares_double);
  } else {
    *static_cast<float*>(norm.mutable_data_ptr()) = global_norm<float>(chunks, total, kernels().sum_of_squares);
  }
  return norm;
}

std::string cpu_capability() {
  return kernels().capability;
}

}  // namespace
}  // namespace maxva::cpu

STABLE_TORCH_LIBRARY_IMPL(maxva, CPU, m) {
  m.impl("grad_norm", TORCH_BOX(&maxva::cpu::grad_norm_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(maxva, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&maxva::cpu::cpu_capability));
}
