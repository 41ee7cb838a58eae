// maxva::step_ for CPU tensors: checks, then one parallel walk over all elements of all tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>

#include "cpu/kernels.h"
#include "cpu/tensors.h"
#include "operands.h"

namespace maxva::cpu {
namespace {

// Elements below which a thread is not worth waking.
constexpr int64_t kGrain = 32768;
// Threads divide a tensor at multiples of this, so that no two write to one cache line of an aligned tensor.
constexpr int64_t kSplit = 64;

struct Group {
  Hyperparameters<float> single;
  Hyperparameters<double> twice;
  float factor_single;
  double factor_twice;
  EpsMode eps_mode;
  bool amsgrad;
};

void check_length(const char* name, size_t length, size_t expected, const char* per) {
  STD_TORCH_CHECK(
      length == expected, "maxva: ", name, " has ", length, " entries for ", expected, " ", per, "; pass one for each");
}

// The walk: [begin, end) counts the elements of all tensors in their order.
void walk(const std::vector<TensorStep>& tensors, const std::vector<int64_t>& ends, int64_t begin, int64_t end) {
  const auto step = kernels().step;
  size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
  for (int64_t start = i == 0 ? 0 : ends[i - 1]; i < tensors.size() && start < end; start = ends[i], ++i) {
    const auto snap = [&](int64_t at) { return at >= ends[i] ? ends[i] - start : (at - start) / kSplit * kSplit; };
    const int64_t from = begin <= start ? 0 : snap(begin), to = snap(end);
    if (from < to) {
      step(tensors[i], from, to);
    }
  }
}

void step_cpu(
    std::vector<Tensor> params,
    std::vector<Tensor> grads,
    std::vector<Tensor> exp_avgs,
    std::vector<Tensor> grad_means,
    std::vector<Tensor> grad_vars,
    std::vector<Tensor> weight_sums,
    std::vector<Tensor> max_denoms,
    std::vector<Tensor> steps,
    bool laprop,
    std::vector<int64_t> group_sizes,
    Tensor lr,
    std::vector<double> beta1,
    std::vector<double> beta2_lower,
    std::vector<double> beta2_upper,
    std::vector<double> beta2_init,
    std::vector<double> eps,
    std::vector<double> weight_decay,
    std::vector<int64_t> decoupled_weight_decay,
    std::vector<int64_t> amsgrad,
    std::vector<int64_t> maximize,
    std::vector<int64_t> adam_eps,
    std::optional<Tensor> grad_scale,
    std::optional<Tensor> found_inf,
    std::optional<Tensor> grad_norm,
    double max_grad_norm) {
  const size_t count = params.size(), group_count = group_sizes.size();

  // 1. Check everything; until all is checked nothing is changed.
  const NamedList state[] = {
      {"exp_avgs", &exp_avgs}, {"grad_means", &grad_means}, {"grad_vars", &grad_vars}, {"weight_sums", &weight_sums}};
  check_length("grads", grads.size(), count, "params");
  check_length("steps", steps.size(), count, "params");
  for (const NamedList& list : state) {
    check_length(list.name, list.tensors->size(), count, "params");
  }
  for (const auto* list : {&beta1, &beta2_lower, &beta2_upper, &beta2_init, &eps, &weight_decay}) {
    check_length("a hyperparameter", list->size(), group_count, "groups");
  }
  for (const auto* list : {&decoupled_weight_decay, &amsgrad, &maximize, &adam_eps}) {
    check_length("a mode", list->size(), group_count, "groups");
  }
  STD_TORCH_CHECK(
      lr.is_cpu() && lr.scalar_type() == ScalarType::Double && lr.numel() == static_cast<int64_t>(group_count),
      "maxva: lr must be a float64 CPU tensor with one entry for each of the ", group_count, " groups");
  size_t in_groups = 0, with_max = 0;
  for (size_t g = 0; g < group_count; ++g) {
    in_groups += group_sizes[g];
    with_max += amsgrad[g] ? group_sizes[g] : 0;
  }
  check_length("params", count, in_groups, "tensors counted by group_sizes");
  check_length("max_denoms", max_denoms.size(), with_max, "params of groups with AMSGrad");
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = params[i];
    check_param(param, params[0], i);
    check_like(grads[i], {"grads", &grads}, i, param, nullptr, false);
    const ScalarType required = state_dtype(param.scalar_type());
    for (const NamedList& list : state) {
      check_like((*list.tensors)[i], list, i, param, &required, true);
    }
    STD_TORCH_CHECK(
        steps[i].is_cpu() && steps[i].scalar_type() == ScalarType::Long && steps[i].numel() == 1,
        "maxva: ", describe(steps[i], "steps", i), " must be one int64 on the CPU");
  }
  size_t next_max = 0;
  for (size_t g = 0, i = 0; g < group_count; i += group_sizes[g], ++g) {
    for (size_t j = i; amsgrad[g] && j < i + group_sizes[g]; ++j) {
      const ScalarType required = state_dtype(params[j].scalar_type());
      check_like(max_denoms[next_max++], {"max_denoms", &max_denoms}, j, params[j], &required, true);
    }
  }

  // 2. What holds for the whole step.
  if (found_inf && scalar_value(*found_inf, "found_inf") != 0) {
    return;
  }
  const double scale = grad_scale ? scalar_value(*grad_scale, "grad_scale") : 1;
  const double norm = grad_norm ? scalar_value(*grad_norm, "grad_norm") : 0;
  const double max_norm = grad_norm ? max_grad_norm : -1;
  const double* rates = static_cast<const double*>(lr.const_data_ptr());

  // 3. The groups' coefficients and the tensors' flat operands.
  std::vector<TensorStep> work;
  std::vector<int64_t> ends;
  std::vector<FlatOperands> flat;
  work.reserve(count);
  ends.reserve(count);
  flat.reserve(count);
  int64_t total = 0;
  next_max = 0;
  for (size_t g = 0, i = 0; g < group_count; ++g) {
    const auto hyperparameters = [&](auto zero) {
      return make_hyperparameters<decltype(zero)>(
          rates[g], beta1[g], beta2_lower[g], beta2_upper[g], beta2_init[g], eps[g], weight_decay[g],
          decoupled_weight_decay[g] != 0);
    };
    const auto single = hyperparameters(0.0f);
    const auto twice = hyperparameters(0.0);
    const float factor = maxva::grad_factor(float(scale), float(norm), float(max_norm), maximize[g] != 0);
    const double factor_twice = maxva::grad_factor(scale, norm, max_norm, maximize[g] != 0);
    for (const size_t end = i + group_sizes[g]; i < end; ++i) {
      int64_t& t = *static_cast<int64_t*>(steps[i].mutable_data_ptr());
      t += 1;
      if (params[i].numel() == 0) {
        next_max += amsgrad[g] != 0;
        continue;
      }
      FlatOperands& operands = flat.emplace_back(params[i]);
      TensorStep tensor{};
      tensor.param = operands.data(params[i], true);
      tensor.grad = operands.data(grads[i], false);
      tensor.exp_avg = operands.data(exp_avgs[i], true);
      tensor.grad_mean = operands.data(grad_means[i], true);
      tensor.grad_var = operands.data(grad_vars[i], true);
      tensor.weight_sum = operands.data(weight_sums[i], true);
      tensor.max_denom = amsgrad[g] ? operands.data(max_denoms[next_max++], true) : nullptr;
      tensor.param_dtype = dtype_of(params[i]);
      tensor.grad_dtype = dtype_of(grads[i]);
      tensor.algorithm = laprop ? Algorithm::kLaMAdam : Algorithm::kMAdam;
      tensor.eps_mode = adam_eps[g] ? EpsMode::kAdam : EpsMode::kPaper;
      if (tensor.param_dtype == DType::kDouble) {
        tensor.twice = make_coefficients(twice, t, factor_twice);
      } else {
        tensor.single = make_coefficients(single, t, factor);
      }
      work.push_back(tensor);
      ends.push_back(total += params[i].numel());
    }
  }

  // 4. The pass.
  torch::stable::parallel_for(
      0, total, kGrain, [&](int64_t begin, int64_t end) { walk(work, ends, begin, end); });
  for (FlatOperands& operands : flat) {
    operands.write_back();
  }
}

}  // namespace
}  // namespace maxva::cpu

STABLE_TORCH_LIBRARY_IMPL(maxva, CPU, m) {
  m.impl("step_", TORCH_BOX(&maxva::cpu::step_cpu));
}
