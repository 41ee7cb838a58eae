// maxva::step_ for CPU tensors: one parallel walk over all elements of all tensors, to step them or to take norms.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/pieces.h"
#include "cpu/sums.h"
#include "cpu/tensors.h"
#include "operands.h"
#include "step_arguments.h"

namespace maxva::cpu {
namespace {

// Elements below which a thread is not worth waking.
constexpr int64_t kGrain = 32768;

// All tensors of a step as one row of elements: tensors[i] has those from ends[i-1] to ends[i]. Threads divide a tensor
// by chunks.
struct Work {
  std::vector<TensorStep> tensors;
  std::vector<size_t> params;  // of each its index in the lists: those without elements are left out
  std::vector<int64_t> ends;
  std::vector<FlatOperands> operands;

  explicit Work(size_t count) {
    tensors.reserve(count);
    params.reserve(count);
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
      const auto snap = [&](int64_t at) {
        return at >= ends[i] ? ends[i] - start : (at - start) / kStepChunk * kStepChunk;
      };
      const int64_t from = begin <= start ? 0 : snap(begin), to = snap(end);
      if (from < to) {
        step(tensors[i], from, to);
      }
    }
  }
};

// Lists the work and, unless it is to take norms, advances every tensor's step count.
Work prepare(const StepArguments& a) {
  const double scale = a.grad_scale ? scalar_value(*a.grad_scale, "grad_scale") : 1;
  const double norm = a.grad_norm ? scalar_value(*a.grad_norm, "grad_norm") : 0;
  const double max_norm = a.grad_norm ? a.max_grad_norm : -1;
  const double* ratios = a.trust_ratios ? static_cast<const double*>(a.trust_ratios->const_data_ptr()) : nullptr;
  auto* statistics = a.statistics ? static_cast<StatisticsSums<float>*>(a.statistics->mutable_data_ptr()) : nullptr;
  auto* saturation = a.saturation ? static_cast<uint32_t*>(a.saturation->mutable_data_ptr()) : nullptr;
  const bool written = !a.update_norms;

  Work work(a.params.size());
  size_t next_max = 0;
  for (size_t g = 0, i = 0; g < a.group_sizes.size(); ++g) {
    auto single = a.hyperparameters<float>(g);
    auto twice = a.hyperparameters<double>(g);
    const float rate = single.lr;
    const double rate_twice = twice.lr;
    const float factor = grad_factor(float(scale), float(norm), float(max_norm), a.maximize[g] != 0);
    const double factor_twice = grad_factor(scale, norm, max_norm, a.maximize[g] != 0);
    for (const size_t end = i + a.group_sizes[g]; i < end; ++i) {
      const Tensor* max_denom = a.amsgrad[g] ? &a.max_denoms[next_max++] : nullptr;
      const int64_t step = *static_cast<const int64_t*>(a.steps[i].const_data_ptr()) + 1;
      if (written) {
        *static_cast<int64_t*>(a.steps[i].mutable_data_ptr()) = step;
      }
      const int64_t count = a.params[i].numel();
      if (count == 0) {
        continue;
      }
      FlatOperands& flat = work.operands.emplace_back(a.params[i]);
      TensorStep t{};
      t.param = flat.data(a.params[i], written);
      t.grad = flat.data(a.grads[i], false);
      t.exp_avg = flat.data(a.exp_avgs[i], written);
      t.grad_mean = flat.data(a.grad_means[i], written);
      t.grad_var = flat.data(a.grad_vars[i], written);
      t.weight_sum = flat.data(a.weight_sums[i], written);
      t.max_denom = max_denom == nullptr ? nullptr : flat.data(*max_denom, written);
      t.master = a.has_master(i) ? static_cast<int16_t*>(flat.data(a.masters[i], written)) : nullptr;
      t.param_dtype = dtype_of(a.params[i]);
      t.grad_dtype = dtype_of(a.grads[i]);
      t.state_dtype = dtype_of(a.exp_avgs[i]);
      t.rounding_key = a.rounding_keys.empty() ? 0 : static_cast<uint64_t>(a.rounding_keys[i]);
      t.rounds_param = a.stochastic_rounding[g] != 0;
      t.step = step;
      t.algorithm = a.laprop ? Algorithm::kLaMAdam : Algorithm::kMAdam;
      t.eps_mode = a.adam_eps[g] ? EpsMode::kAdam : EpsMode::kPaper;
      t.decay_mode = single.decay_mode;
      const double ratio = ratios == nullptr ? 1 : ratios[i];
      if (t.param_dtype == DType::kDouble) {
        twice.lr = a.update_norms ? 1 : rate_twice * ratio;
        t.twice = make_coefficients(twice, bias_correction<double>(twice.alpha_bits, step), factor_twice);
      } else {
        single.lr = a.update_norms ? 1 : rate * float(ratio);
        t.single = make_coefficients(single, bias_correction<float>(single.alpha_bits, step), factor);
      }
      t.statistics = statistics;
      statistics += statistics == nullptr ? 0 : chunks_of(count);
      t.saturation = saturation;
      saturation += saturation == nullptr ? 0 : chunks_of(count);
      if (t.saturation != nullptr && t.weight_sum != a.weight_sums[i].const_data_ptr()) {
        std::fill_n(std::exchange(t.saturation, nullptr), chunks_of(count), 0);  // a copy has other chunks
      }
      work.tensors.push_back(t);
      work.params.push_back(i);
      work.ends.push_back(work.total() + count);
    }
  }
  return work;
}

// Takes the norm of each tensor whose arithmetic is T, and of its update: chunks side by side, then each tensor's
// chunks in order.
template <typename T>
void take_norms(const Work& work, UpdateSquares<T> (*squares_of)(const TensorStep&, int64_t, int64_t), double* norms) {
  constexpr bool kTwice = sizeof(T) == sizeof(double);
  struct Chunk {
    int64_t place;
    const TensorStep* tensor;
    int64_t begin, end;
  };
  std::vector<Chunk> chunks;
  int64_t total = 0;
  for (size_t i = 0; i < work.tensors.size(); ++i) {
    const int64_t count = work.ends[i] - (i == 0 ? 0 : work.ends[i - 1]);
    const bool is_twice = work.tensors[i].param_dtype == DType::kDouble;
    for (int64_t begin = 0; begin < count && is_twice == kTwice; begin += kStepChunk) {
      const int64_t end = std::min(begin + kStepChunk, count);
      chunks.push_back({total, &work.tensors[i], begin, end});
      total += end - begin;
    }
  }
  std::vector<SumOfSquares<T>> params(chunks.size()), updates(chunks.size());
  for_chunks(chunks, total, kGrain, [&](int64_t i) {
    const auto squares = squares_of(*chunks[i].tensor, chunks[i].begin, chunks[i].end);
    params[i] = squares.param;
    updates[i] = squares.update;
  });
  for (size_t from = 0, to = 0; from < chunks.size(); from = to) {
    const TensorStep* tensor = chunks[from].tensor;
    while (to < chunks.size() && chunks[to].tensor == tensor) {
      ++to;
    }
    double* norm = norms + 2 * work.params[tensor - work.tensors.data()];
    norm[0] = root(add_up(params.data() + from, to - from));
    norm[1] = root(add_up(updates.data() + from, to - from));
  }
}

void step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
          std::vector<Tensor> grad_means, std::vector<Tensor> grad_vars, std::vector<Tensor> weight_sums,
          std::vector<Tensor> max_denoms, std::vector<Tensor> masters, std::vector<Tensor> steps, bool laprop,
          std::vector<int64_t> group_sizes, Tensor lr, std::vector<double> beta1, std::vector<double> beta2_lower,
          std::vector<double> beta2_upper, std::vector<double> beta2_init, std::vector<double> eps,
          std::vector<double> weight_decay, std::vector<int64_t> decoupled_weight_decay, std::vector<int64_t> amsgrad,
          std::vector<int64_t> maximize, std::vector<int64_t> adam_eps, std::vector<int64_t> stochastic_rounding,
          std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> grad_norm,
          double max_grad_norm, std::optional<Tensor> trust_ratios, std::vector<int64_t> rounding_keys,
          std::optional<Tensor> statistics, std::optional<Tensor> update_norms, std::optional<Tensor> saturation) {
  const StepArguments arguments{std::move(params),
                                std::move(grads),
                                std::move(exp_avgs),
                                std::move(grad_means),
                                std::move(grad_vars),
                                std::move(weight_sums),
                                std::move(max_denoms),
                                std::move(masters),
                                std::move(steps),
                                laprop,
                                std::move(group_sizes),
                                std::move(lr),
                                std::move(beta1),
                                std::move(beta2_lower),
                                std::move(beta2_upper),
                                std::move(beta2_init),
                                std::move(eps),
                                std::move(weight_decay),
                                std::move(decoupled_weight_decay),
                                std::move(amsgrad),
                                std::move(maximize),
                                std::move(adam_eps),
                                std::move(stochastic_rounding),
                                std::move(grad_scale),
                                std::move(found_inf),
                                std::move(grad_norm),
                                max_grad_norm,
                                std::move(trust_ratios),
                                std::move(rounding_keys),
                                std::move(statistics),
                                std::move(update_norms),
                                std::move(saturation)};
  arguments.check();
  if (arguments.found_inf && scalar_value(*arguments.found_inf, "found_inf") != 0) {
    return;  // the gradients overflowed: neither parameters, nor state, nor step counts move
  }
  const IeeeMode mode;
  Work work = prepare(arguments);
  if (arguments.update_norms) {
    auto* norms = static_cast<double*>(arguments.update_norms->mutable_data_ptr());
    take_norms(work, kernels().update_squares, norms);
    take_norms(work, kernels().update_squares_double, norms);
    return;
  }
  for_pieces(work.total(), kGrain, [&](int64_t begin, int64_t end) { work.walk(begin, end); });
  for (FlatOperands& operands : work.operands) {
    operands.write_back();
  }
}

}  // namespace
}  // namespace maxva::cpu

STABLE_TORCH_LIBRARY_IMPL(maxva, CPU, m) {
  m.impl("step_", TORCH_BOX(&maxva::cpu::step));
}
