// MaxVA (arXiv 2006.11918), one coordinate at a time: the only place in C++ where beta is computed.
// Plain code for host and device, of a number or of a vector of them; it knows neither torch nor memory. The CPU kernel
// vectorises it, the CUDA kernel runs it for several numbers of each thread.
//
// Note [Centred moments]
// The paper keeps u~, v~ and w and computes sigma^2 = v~/w - (u~/w)^2 in Eq. 6. In fp32 that difference cancels: where
// the gradient's mean exceeds its deviation, v is wrong by percents, and by orders of magnitude once squared gradients
// near the constant that guards the denominator. We keep the bias-corrected mean u, the central second moment
// s = sigma^2 and w. With d = g - u, r = d^2 and q = (1 - beta) / w_new, the weight of g in the corrected averages, the
// paper's three recurrences become
//     w <- w + (1-beta) (1-w)      u <- u + q d      s <- (1-q) (s + q r)      v = s + u^2
// s is largest at q = h = (1 - s/r) / 2, for every w, which is Eq. 6; as a coefficient that is
//     1 - beta = h w / ((1-h) + h w) = (r - s) w / (r + s + (r - s) w),
// one division, then clipped to the bounds of 1 - beta, and q takes one more. Nothing nearly equal is subtracted that
// was rounded before, no constant sets a scale, and s cannot become negative.
//
// Note [Same bits everywhere]
// Only IEEE multiply, add, divide, square root, comparisons and integer operations occur, and every build forbids
// contraction into fused multiply-adds. So CPU, CUDA and Triton, every instruction set and every thread count give the
// same bits. Selections are written so that a NaN takes the side that the comment beside them names.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define MAXVA_FN __host__ __device__ __forceinline__
#else
// Internal linkage: each instruction set's translation unit must keep its own copy (see cpu/kernels.h).
#define MAXVA_FN [[gnu::always_inline]] static inline
#endif

namespace maxva {

enum class Algorithm : int { kMAdam, kLaMAdam };

// Where eps stands: beside sqrt(v~), as in line 12 of Algorithm 1, or beside the bias-corrected sqrt(v), as in Adam.
enum class EpsMode : int { kPaper, kAdam };

// kDecoupled shrinks the parameter (AdamW), kL2 adds to the gradient. kNone is apart so that an infinite parameter
// stays what it is: 0 * inf would make it NaN.
enum class WeightDecay : int { kNone, kDecoupled, kL2 };

// What changes a group's formula. The CPU kernel passes constants and so gets a loop for each combination; on a device,
// where groups of all modes share a launch, they are values that all threads of a block agree on.
struct Modes {
  EpsMode eps;
  WeightDecay decay;
  bool amsgrad;
  bool saturated;  // w is 1, which saves a division and a square root and changes no bit
};

// What a parameter group fixes, in the arithmetic's type T (float; double for float64 parameters).
template <typename T>
struct Hyperparameters {
  T lr;
  T eps;
  T weight_decay;
  T alpha;  // beta1 of the Python interface: the coefficient of the momentum
  T one_minus_alpha;
  uint64_t alpha_bits;  // alpha as a 64-bit binary fraction, see bias_correction
  T one_minus_beta_upper, one_minus_beta_lower;
  T first_weight;  // 1 - beta2_init: the weight of the first gradient (Eq. 7)
  T saturation;    // w is set to 1 once 1 - w is at most this
  WeightDecay decay_mode;
};

// What one tensor's step needs.
template <typename T>
struct Coefficients {
  T grad_factor;  // unscale, clip and maximize in one: +-clip / grad_scale
  T alpha, one_minus_alpha;
  T one_minus_beta_upper, one_minus_beta_lower;
  T first_weight, saturation;
  T eps;
  T step_size;  // lr / (1 - alpha^t)
  T decay;      // lr * weight_decay, or with kL2 weight_decay
};

// beta and alpha enter as differences from 1 where those matter, rounded once from double.
template <typename T>
inline Hyperparameters<T> make_hyperparameters(double lr, double alpha, double beta_lower, double beta_upper,
                                               double beta_init, double eps, double weight_decay,
                                               bool decoupled_weight_decay) {
  constexpr bool kDouble = sizeof(T) == sizeof(double);
  const double half_ulp = std::numeric_limits<T>::epsilon() / 2.0;
  const double most = kDouble ? 0x1p-43 : 0x1p-14;
  const double stall = beta_upper < 1 ? half_ulp / (1 - beta_upper) : most;
  Hyperparameters<T> h{};
  h.lr = T(lr);
  h.eps = T(eps);
  h.weight_decay = T(weight_decay);
  h.alpha = T(alpha);
  h.one_minus_alpha = T(1 - alpha);
  h.alpha_bits = static_cast<uint64_t>(std::ldexp(alpha, 64));
  h.one_minus_beta_upper = T(1 - beta_upper);
  h.one_minus_beta_lower = T(1 - beta_lower);
  h.first_weight = T(1 - beta_init);
  h.saturation = T(stall < most ? stall : most);
  h.decay_mode = weight_decay == 0        ? WeightDecay::kNone
                 : decoupled_weight_decay ? WeightDecay::kDecoupled
                                          : WeightDecay::kL2;
  return h;
}

MAXVA_FN uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  const uint64_t a0 = a & 0xffffffffu, a1 = a >> 32, b0 = b & 0xffffffffu, b1 = b >> 32;
  const uint64_t middle = a1 * b0 + (a0 * b0 >> 32);
  const uint64_t carry = a0 * b1 + (middle & 0xffffffffu);
  return a1 * b1 + (middle >> 32) + (carry >> 32);
#endif
}

// 1 - alpha^step for step >= 1. Integer arithmetic on 64-bit fractions: within step * 2^-64 of the truth, and the same
// bits on host and device, which pow() does not promise.
template <typename T>
MAXVA_FN T bias_correction(uint64_t alpha_bits, int64_t step) {
  uint64_t power = 0;  // alpha^step; 0 stands for the empty product until the first factor
  bool empty = true;
  for (uint64_t base = alpha_bits, n = static_cast<uint64_t>(step); n != 0; n >>= 1) {
    if (n & 1) {
      power = empty ? base : multiply_high(power, base);
      empty = false;
    }
    base = multiply_high(base, base);
  }
  return power == 0 ? T(1) : static_cast<T>(uint64_t(0) - power) * T(0x1p-64);
}

// +-min(1, max_grad_norm / norm) / grad_scale, where norm is that of the gradients as they stand (still scaled).
// max_grad_norm < 0: no clip. A NaN norm gives a NaN factor, as torch.nn.utils.clip_grad_norm_ does.
template <typename T>
MAXVA_FN T grad_factor(T grad_scale, T norm, T max_grad_norm, bool maximize) {
  const T inverse = T(1) / grad_scale;
  T factor = inverse;
  if (!(max_grad_norm < T(0))) {
    const T clip = max_grad_norm / (norm * inverse);
    factor = clip >= T(1) ? inverse : inverse * clip;
  }
  return maximize ? -factor : factor;
}

// `correction` is bias_correction's of the step.
template <typename T>
MAXVA_FN Coefficients<T> make_coefficients(const Hyperparameters<T>& h, T correction, T grad_factor) {
  Coefficients<T> c;
  c.grad_factor = grad_factor;
  c.alpha = h.alpha;
  c.one_minus_alpha = h.one_minus_alpha;
  c.one_minus_beta_upper = h.one_minus_beta_upper;
  c.one_minus_beta_lower = h.one_minus_beta_lower;
  c.first_weight = h.first_weight;
  c.saturation = h.saturation;
  c.eps = h.eps;
  c.step_size = h.lr / correction;
  c.decay = h.decay_mode == WeightDecay::kL2 ? h.weight_decay : h.lr * h.weight_decay;
  return c;
}

// Coefficients for several numbers at once.
template <typename To, typename T>
MAXVA_FN Coefficients<To> broadcast(const Coefficients<T>& c) {
  return {To(c.grad_factor),
          To(c.alpha),
          To(c.one_minus_alpha),
          To(c.one_minus_beta_upper),
          To(c.one_minus_beta_lower),
          To(c.first_weight),
          To(c.saturation),
          To(c.eps),
          To(c.step_size),
          To(c.decay)};
}

// What the formula needs beside arithmetic and comparisons. A vector has its own (cpu/vector.h).
template <typename T>
MAXVA_FN T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}
// Where the first is a NaN these two give the second, which must be none.
template <typename T>
MAXVA_FN T larger(T x, T y) {
  return x > y ? x : y;
}
template <typename T>
MAXVA_FN T smaller(T x, T y) {
  return x < y ? x : y;
}
template <typename T>
MAXVA_FN T magnitude(T x) {
  return std::fabs(x);
}
template <typename T>
MAXVA_FN T square_root(T x) {
  return std::sqrt(x);
}

// What would be stored below the smallest normal number is stored as 0: a coordinate long without gradient would
// otherwise decay into subnormals, on which CPUs crawl. Explicit, so that every backend does the same. NaN stays.
template <typename T>
MAXVA_FN T flush_subnormal(T x) {
  return select(magnitude(x) < std::numeric_limits<T>::min(), T(0), x);
}

// The same of what is negative only where rounding had a coefficient exceed 1: one comparison less.
template <typename T>
MAXVA_FN T flush_variance(T x) {
  return select(x < std::numeric_limits<T>::min(), T(0), x);
}

// One MaxVA update of the centred moments (Eq. 6 and lines 7 to 11 of Algorithm 1; see Note [Centred moments]).
// w == 0 marks a coordinate before its first gradient, whose weight is Eq. 7's.
// Where w is 1 it stays so. Returns b = 1 - beta.
template <typename T>
MAXVA_FN T update_moments(T g, T& u, T& s, T& w, const Coefficients<T>& c, const bool saturated) {
  const T d = g - u;
  const T r = d * d;
  // b = 1 - beta. A NaN (r = s = 0) takes the bound that is compared first.
  const T rise = saturated ? r - s : (r - s) * w;
  T b = rise / ((r + s) + rise);
  b = smaller(larger(b, c.one_minus_beta_upper), c.one_minus_beta_lower);
  T q = b;
  if (!saturated) {
    b = select(w == T(0), c.first_weight, b);
    w = w + b * (T(1) - w);
    q = b / w;
    w = select(T(1) - w <= c.saturation, T(1), w);
  }
  const T p = T(1) - q;
  const T e = q * d;
  u = flush_subnormal(u + e);
  const T variance = p * s + (p * e) * d;  // in this order q = 0 or p = 0 wins over a square that overflows
  s = flush_variance(variance);
  return b;
}

// What a coordinate's step comes to. What a kernel has no use for is not computed.
template <typename T>
struct Update {
  T change;    // is subtracted from the parameter; where a moment is a NaN so is this
  T adaptive;  // the part of it that is not weight decay: step_size times the normalised momentum
  T gradient;  // unscaled and clipped, with the sign of a descent
  T one_minus_beta;
};

// A coordinate's step has two halves, which a kernel may run apart. The first: parameter p, gradient g as stored,
// moments u, s, w, which are updated. Returns the gradient as the second half wants it.
template <typename T>
MAXVA_FN T begin_update(const T p, T g, T& u, T& s, T& w, const Coefficients<T>& c, const Modes modes,
                        Update<T>& result) {
  result.gradient = g = g * c.grad_factor;
  if (modes.decay == WeightDecay::kL2) {
    g = g + c.decay * p;
  }
  result.one_minus_beta = update_moments(g, u, s, w, c, modes.saturated);
  return g;
}

// The second: the first's gradient g and moments u, s, w, momentum m, and with AMSGrad the running maximum x of the
// bias-corrected sqrt(v). The parameter is left to the caller.
template <Algorithm kAlgorithm, typename T>
MAXVA_FN void finish_update(const T p, const T g, T& m, const T u, const T s, const T w, T& x, const Coefficients<T>& c,
                            const Modes modes, Update<T>& result) {
  T root_v = square_root(s + u * u);
  if (modes.amsgrad) {
    root_v = select(root_v <= x, x, root_v);  // a NaN is kept
    x = root_v;
  }
  // sqrt(w) y / (sqrt(v~) + eps) with v~ = w v, or y / (sqrt(v) + eps)
  const T root_w = modes.eps == EpsMode::kPaper && !modes.saturated ? square_root(w) : T(1);
  const auto normalise = [&](T y) { return (root_w * y) / (root_w * root_v + c.eps); };
  T direction;
  if constexpr (kAlgorithm == Algorithm::kMAdam) {
    m = flush_subnormal(c.alpha * m + c.one_minus_alpha * g);
    direction = normalise(m);
  } else {
    m = flush_subnormal(c.alpha * m + c.one_minus_alpha * normalise(g));
    direction = m;
  }
  result.change = result.adaptive = c.step_size * direction;
  if (modes.decay == WeightDecay::kDecoupled) {
    result.change = c.decay * p + result.adaptive;
  }
}

template <Algorithm kAlgorithm, typename T>
MAXVA_FN Update<T> update(const T p, T g, T& m, T& u, T& s, T& w, T& x, const Coefficients<T>& c, const Modes modes) {
  Update<T> result;
  g = begin_update(p, g, u, s, w, c, modes, result);
  finish_update<kAlgorithm>(p, g, m, u, s, w, x, c, modes, result);
  return result;
}

}  // namespace maxva
