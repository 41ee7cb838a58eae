// Steps through every combination of dtypes and modes and prints the instruction set and a hash of all parameters,
// states and sums: whatever compiler and architecture built this, the hash must be the same (test_portability.py).
// State is kept in the arithmetic's type and, rounded stochastically, in bfloat16.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "float16.h"

using namespace maxva;
using namespace maxva::cpu;

namespace {

constexpr int64_t kCount = 1000;

// FNV-1a.
struct Hash {
  uint64_t value = 14695981039346656037ull;
  void add(const void* data, size_t size) {
    for (size_t i = 0; i < size; ++i) {
      value = (value ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211ull;
    }
  }
};

size_t size_of(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

// Values in [-1, 1), the same sequence everywhere.
std::vector<char> values(DType dtype, uint64_t& state) {
  std::vector<char> out(kCount * size_of(dtype));
  for (int64_t i = 0; i < kCount; ++i) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    const double value = static_cast<double>(state >> 11) * 0x1p-52 - 1;
    char* at = out.data() + i * size_of(dtype);
    const auto put = [&](auto stored) { std::memcpy(at, &stored, sizeof(stored)); };
    if (dtype == DType::kDouble) {
      put(value);
    } else if (dtype == DType::kFloat) {
      put(static_cast<float>(value));
    } else if (dtype == DType::kHalf) {
      Half half;
      convert(static_cast<float>(value), half);
      put(half);
    } else {
      BFloat16 brain;
      convert(static_cast<float>(value), brain);
      put(brain);
    }
  }
  return out;
}

// With `ones` w is 1 from the beginning.
void run(TensorStep t, bool amsgrad, bool ones, Hash& hash) {
  std::vector<std::vector<char>> state(5, std::vector<char>(kCount * size_of(t.state_dtype)));
  if (ones) {
    for (int64_t i = 0; i < kCount; ++i) {
      const BFloat16 narrow = one<BFloat16>();
      const float wide = 1;
      const bool is_narrow = t.state_dtype == DType::kBFloat16;
      const size_t size = size_of(t.state_dtype);
      std::memcpy(state[3].data() + i * size, is_narrow ? static_cast<const void*>(&narrow) : &wide, size);
    }
  }
  uint64_t seed = 7;
  std::vector<char> param = values(t.param_dtype, seed);
  const double decay = t.decay_mode == WeightDecay::kNone ? 0 : 0.1;
  const bool decoupled = t.decay_mode == WeightDecay::kDecoupled;
  t.param = param.data();
  t.exp_avg = state[0].data();
  t.grad_mean = state[1].data();
  t.grad_var = state[2].data();
  t.weight_sum = state[3].data();
  t.max_denom = amsgrad ? state[4].data() : nullptr;
  for (int step = 1; step <= 6; ++step) {
    const std::vector<char> grad = values(t.grad_dtype, seed);
    t.grad = grad.data();
    t.step = step;
    const auto single = make_hyperparameters<float>(0.1, 0.7, 0.5, 0.98, 0.98, 1e-3, decay, decoupled);
    const auto twice = make_hyperparameters<double>(0.1, 0.7, 0.5, 0.98, 0.98, 1e-3, decay, decoupled);
    t.single = make_coefficients(single, bias_correction<float>(single.alpha_bits, step), 0.5f);
    t.twice = make_coefficients(twice, bias_correction<double>(twice.alpha_bits, step), 0.5);
    kernels().step(t, 0, kCount);
    const SumOfSquares<float> sum = kernels().sum_of_squares(t.grad, t.grad_dtype, kCount);
    hash.add(&sum, sizeof(sum));
  }
  hash.add(param.data(), param.size());
  for (const auto& moment : state) {
    hash.add(moment.data(), moment.size());
  }
}

}  // namespace

int main() {
  Hash hash;
  for (int modes = 0; modes < 4 * 4 * 2 * 2 * 2 * 3; ++modes) {
    int rest = modes;
    const auto next = [&](int choices) {
      const int choice = rest % choices;
      rest /= choices;
      return choice;
    };
    TensorStep t{};
    t.param_dtype = static_cast<DType>(next(4));
    t.grad_dtype = static_cast<DType>(next(4));
    t.algorithm = static_cast<Algorithm>(next(2));
    t.eps_mode = static_cast<EpsMode>(next(2));
    t.decay_mode = static_cast<WeightDecay>(next(3));
    const bool amsgrad = next(2) != 0;
    t.state_dtype = t.param_dtype == DType::kDouble ? DType::kDouble : DType::kFloat;
    run(t, amsgrad, false, hash);
    if (t.param_dtype == DType::kDouble) {
      continue;
    }
    run(t, amsgrad, true, hash);
    t.state_dtype = DType::kBFloat16;
    t.rounding_key = 1234567890123456789u + static_cast<uint64_t>(modes);
    t.rounds_param = modes % 3 == 0;
    run(t, amsgrad, false, hash);
    run(t, amsgrad, true, hash);
  }
  std::printf("%s %016llx\n", kernels().capability, static_cast<unsigned long long>(hash.value));
}
