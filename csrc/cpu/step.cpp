// maxva::step_ for CPU tensors: one parallel walk over all elements of all tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/tensors.h"
#include "operands.h"
#include "step_arguments.h"

namespace maxva::cpu {
namespace {

// Elements below which a thread is not worth waking.
constexpr int64_t kGrain = 32768;
// Threads divide a tensor at multiples of this, so that no two write to one cache line of an aligned tensor.
constexpr int64_t kSplit = 64;

// All tensors of a step as one row of elements: tensors[i] has those from ends[i-1] to ends[i].
struct Work {
  std::vector<TensorStep> tensors;
  std::vector<int64_t> ends;
  std::vector<FlatOperands> operands;

  explicit Work(size_t count) {
    tensors.reserve(count);
    ends.reserve(count);
    operands.reserve(count);
  }

  int64_t total() const { return ends.empty() ? 0 : ends.back(); }

  // Steps the elements begin <= i < end of the row.
  void walk(int64_t begin, int64_t end) const {
    const auto step = kernels().step;
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; i < tensors.size(); ++i) {
      const int64_t start = i == 0 ? 0 : ends[i - 1];
      if (start >= end) {
        break;
      }
      const auto snap = [&](int64_t at) { return at >= ends[i] ? ends[i] - start : (at - start) / kSplit * kSplit; };
      const int64_t from = begin <= start ? 0 : snap(begin), to = snap(end);
      if (from < to) {
        step(tensors[i], from, to);
      }
    }
  }
};

// Advances every tensor's step count and lists the work.
Work prepare(const StepArguments& a) {
  const double scale = a.grad_scale ? scalar_value(*a.grad_scale, "grad_scale") : 1;
  const double norm = a.grad_norm ? scalar_value(*a.grad_norm, "grad_norm") : 0;
  const double max_norm = a.grad_norm ? a.max_grad_norm : -1;

  Work work(a.params.size());
  size_t next_max = 0;
  for (size_t g = 0, i = 0; g < a.group_sizes.size(); ++g) {
    const auto single = a.hyperparameters<float>(g);
    const auto twice = a.hyperparameters<double>(g);
    const float factor = grad_factor(float(scale), float(norm), float(max_norm), a.maximize[g] != 0);
    const double factor_twice = grad_factor(scale, norm, max_norm, a.maximize[g] != 0);
    for (const size_t end = i + a.group_sizes[g]; i < end; ++i) {
      const Tensor* max_denom = a.amsgrad[g] ? &a.max_denoms[next_max++] : nullptr;
      const int64_t step = ++*static_cast<int64_t*>(a.steps[i].mutable_data_ptr());
      const int64_t count = a.params[i].numel();
      if (count == 0) {
        continue;
      }
      FlatOperands& flat = work.operands.emplace_back(a.params[i]);
      TensorStep t{};
      t.param = flat.data(a.params[i], true);
      t.grad = flat.data(a.grads[i], false);
      t.exp_avg = flat.data(a.exp_avgs[i], true);
      t.grad_mean = flat.data(a.grad_means[i], true);
      t.grad_var = flat.data(a.grad_vars[i], true);
      t.weight_sum = flat.data(a.weight_sums[i], true);
      t.max_denom = max_denom == nullptr ? nullptr : flat.data(*max_denom, true);
      t.param_dtype = dtype_of(a.params[i]);
      t.grad_dtype = dtype_of(a.grads[i]);
      t.algorithm = a.laprop ? Algorithm::kLaMAdam : Algorithm::kMAdam;
      t.eps_mode = a.adam_eps[g] ? EpsMode::kAdam : EpsMode::kPaper;
      t.decay_mode = single.decay_mode;
      if (t.param_dtype == DType::kDouble) {
        t.twice = make_coefficients(twice, step, factor_twice);
      } else {
        t.single = make_coefficients(single, step, factor);
      }
      work.tensors.push_back(t);
      work.ends.push_back(work.total() + count);
    }
  }
  return work;
}

void step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
          std::vector<Tensor> grad_means, std::vector<Tensor> grad_vars, std::vector<Tensor> weight_sums,
          std::vector<Tensor> max_denoms, std::vector<Tensor> steps, bool laprop, std::vector<int64_t> group_sizes,
          Tensor lr, std::vector<double> beta1, std::vector<double> beta2_lower, std::vector<double> beta2_upper,
          std::vector<double> beta2_init, std::vector<double> eps, std::vector<double> weight_decay,
          std::vector<int64_t> decoupled_weight_decay, std::vector<int64_t> amsgrad, std::vector<int64_t> maximize,
          std::vector<int64_t> adam_eps, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
          std::optional<Tensor> grad_norm, double max_grad_norm) {
  const StepArguments arguments{std::move(params),      std::move(grads),        std::move(exp_avgs),
                                std::move(grad_means),  std::move(grad_vars),    std::move(weight_sums),
                                std::move(max_denoms),  std::move(steps),        laprop,
                                std::move(group_sizes), std::move(lr),           std::move(beta1),
                                std::move(beta2_lower), std::move(beta2_upper),  std::move(beta2_init),
                                std::move(eps),         std::move(weight_decay), std::move(decoupled_weight_decay),
                                std::move(amsgrad),     std::move(maximize),     std::move(adam_eps),
                                std::move(grad_scale),  std::move(found_inf),    std::move(grad_norm),
                                max_grad_norm};
  arguments.check();
  if (arguments.found_inf && scalar_value(*arguments.found_inf, "found_inf") != 0) {
    return;  // the gradients overflowed: neither parameters, nor state, nor step counts move
  }
  Work work = prepare(arguments);
  torch::stable::parallel_for(0, work.total(), kGrain, [&](int64_t begin, int64_t end) { work.walk(begin, end); });
  for (FlatOperands& operands : work.operands) {
    operands.write_back();
  }
}

}  // namespace
}  // namespace maxva::cpu

STABLE_TORCH_LIBRARY_IMPL(maxva, CPU, m) {
  m.impl("step_", TORCH_BOX(&maxva::cpu::step));
}
