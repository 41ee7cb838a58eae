#include "step_arguments.h"

#include <utility>

#include "check.h"
#include "statistics.h"

namespace maxva {
namespace {

void check_length(const char* name, size_t length, size_t expected, const char* per) {
  MAXVA_CHECK(length == expected, name, " has ", length, " entries for ", expected, " ", per, "; pass one for each");
}

void check_table(const char* name, const std::optional<Tensor>& table, ScalarType dtype, const char* dtype_name,
                 int64_t rows, int64_t columns) {
  MAXVA_CHECK(!table || (table->is_contiguous() && table->scalar_type() == dtype && table->numel() == rows * columns),
              name, " must be contiguous ", dtype_name, " of shape [", rows, ", ", columns, "]");
}

}  // namespace

void StepArguments::check() const {
  const size_t count = params.size(), groups = group_sizes.size();
  const std::pair<const char*, const std::vector<Tensor>*> moments[] = {
      {"exp_avgs", &exp_avgs}, {"grad_means", &grad_means}, {"grad_vars", &grad_vars}, {"weight_sums", &weight_sums}};

  // 1. Lengths.
  check_length("grads", grads.size(), count, "params");
  check_length("steps", steps.size(), count, "params");
  for (const auto& [list, tensors] : moments) {
    check_length(list, tensors->size(), count, "params");
  }
  for (const auto* values : {&beta1, &beta2_lower, &beta2_upper, &beta2_init, &eps, &weight_decay}) {
    check_length("a hyperparameter", values->size(), groups, "groups");
  }
  for (const auto* values : {&decoupled_weight_decay, &amsgrad, &maximize, &adam_eps, &stochastic_rounding}) {
    check_length("a mode", values->size(), groups, "groups");
  }
  MAXVA_CHECK(lr.is_cpu() && lr.scalar_type() == ScalarType::Double && lr.is_contiguous() &&
                  lr.numel() == static_cast<int64_t>(groups),
              "lr must be a contiguous float64 CPU tensor with one entry for each of the ", groups, " groups");
  size_t in_groups = 0, with_max = 0;
  for (size_t g = 0; g < groups; ++g) {
    in_groups += group_sizes[g];
    with_max += amsgrad[g] ? group_sizes[g] : 0;
  }
  check_length("params", count, in_groups, "tensors counted by group_sizes");
  check_length("max_denoms", max_denoms.size(), with_max, "params of groups with AMSGrad");

  const bool rounds = !rounding_keys.empty();
  if (rounds) {
    check_length("rounding_keys", rounding_keys.size(), count, "params");
  }

  if (!masters.empty()) {
    check_length("masters", masters.size(), count, "params");
  }

  // 2. Tensors.
  size_t next_max = 0;
  for (size_t g = 0, i = 0; g < groups; ++g) {
    for (const size_t end = i + group_sizes[g]; i < end; ++i) {
      const Named param{params[i], "params", i}, grad{grads[i], "grads", i};
      check_param(param, {params[0], "params", 0});
      check_grad(grad);
      check_like(grad, param);
      const auto check_state = [&](const char* list, const std::vector<Tensor>& tensors, size_t at) {
        const Named moment{tensors[at], list, at};
        check_moment(moment, param, rounds && exp_avgs[i].scalar_type() == ScalarType::BFloat16);
        check_like(moment, param);
      };
      for (const auto& [list, tensors] : moments) {
        check_state(list, *tensors, i);
      }
      if (amsgrad[g]) {
        check_state("max_denoms", max_denoms, next_max++);
      }
      if (has_master(i)) {
        check_master({masters[i], "masters", i}, param);
      }
      MAXVA_CHECK(!stochastic_rounding[g] || rounds, "stochastic_rounding needs rounding_keys");
      check_scalar({steps[i], "steps", i}, ScalarType::Long, param);
    }
  }

  // 3. Tables.
  int64_t chunks = 0;
  for (const Tensor& param : params) {
    chunks += chunks_of(param.numel());
  }
  check_table("trust_ratios", trust_ratios, ScalarType::Double, "float64", count, 1);
  check_table("update_norms", update_norms, ScalarType::Double, "float64", count, 2);
  check_table("statistics", statistics, ScalarType::Float, "float32", chunks, kStatisticsFields);
  check_table("saturation", saturation, ScalarType::Int, "int32", chunks, 1);
}

}  // namespace maxva
