// Many features in one file; the same functions are compiled for the host (g++) as the reference.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define HD __host__ __device__ __forceinline__
#else
#define HD static inline
#endif
HD uint32_t f2u(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
HD float u2f(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
// Philox 4x32-10
HD void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
  for (int r = 0; r < 10; ++r) {
    uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
    uint32_t n0 = (uint32_t)(b >> 32) ^ c[1] ^ k0, n2 = (uint32_t)(a >> 32) ^ c[3] ^ k1;
    c[1] = (uint32_t)b;
    c[3] = (uint32_t)a;
    c[0] = n0;
    c[2] = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}
// stochastic rounding f32 -> bf16 bits
HD uint16_t sr_bf16(float x, uint32_t r) {
  uint32_t u = f2u(x);
  if ((u & 0x7F800000u) == 0x7F800000u) return (uint16_t)((u >> 16) | ((u & 0x7FFFFFu) ? 0x40 : 0));
  return (uint16_t)((u + (r & 0xFFFFu)) >> 16);
}
HD uint32_t mixed(uint32_t x, uint32_t y, int op) {
  int32_t a = (int32_t)x, b = (int32_t)y;
  float f = u2f(x), g = u2f(y);
  switch (op) {
    case 0:
      return (uint32_t)(b ? (int64_t)a / b : 0);
    case 1:
      return y ? x % y : 0;
    case 2:
      return (uint32_t)(((int64_t)a * b) >> 17);
    case 3:
      return (x << (y & 31)) ^ (x >> ((y >> 5) & 31));
    case 4:
      return (uint32_t)(a >> (y & 31));
    case 5:
      return f2u(f * g);
    case 6:
      return f2u(f + g);
    case 7:
      return f2u(f / g);
    case 8:
      return f2u(sqrtf(fabsf(f)));
    case 9:
      return f2u(fmaf(f, g, u2f(x ^ y)));
    case 10:
      return f2u((float)((double)f * (double)g));
    case 11:
      return f2u(floorf(f) + truncf(g));
    case 12:
      return fabsf(f) < 2e9f ? (uint32_t)(int32_t)f : 0u;
    case 13:
      return f2u((float)(int64_t)(((uint64_t)x << 32) | y));
    case 14:
      return f2u((float)x) ^ f2u((float)a);
    case 15:
      return (uint32_t)(((uint64_t)x * 0x100000001ull) / (y | 1u));
    case 16:
      return f2u(f < g ? f : g);
    case 17: {
      double d = (double)f / ((double)g);
      return f2u((float)d);
    }
    case 18: {
      double d = fma((double)f, (double)g, 1.0);
      return f2u((float)d);
    }
    case 19:
      return f2u(copysignf(f, g));
    case 20: {
      uint32_t c[4] = {x, y, 1, 2};
      philox(c, x ^ 7, y);
      return c[0] ^ c[1] ^ c[2] ^ c[3];
    }
    case 21:
      return sr_bf16(f, y);
    case 22: {
      uint8_t q[16];
      for (int i = 0; i < 16; ++i) q[i] = (uint8_t)(x >> (i & 7));
      uint32_t s = 0;
      for (uint32_t i = 0; i < 16; ++i) s = s * 31 + q[(i + y) & 15];
      return s;
    }
    case 23:
      return f2u(rintf(f * 0x1p-100f) + ldexpf(g, -3));
    default:
      return x ^ y;
  }
}
#ifdef __CUDACC__
extern "C" __global__ void torture(const uint32_t* x, const uint32_t* y, uint32_t* out, int n, int ops) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    for (int op = 0; op < ops; ++op) out[(int64_t)op * n + i] = mixed(x[i], y[i], op);
}
extern "C" __global__ void divergent_ops(const uint32_t* x, const uint32_t* y, uint32_t* out, int n, int ops) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = mixed(x[i], y[i], x[i] % ops);  // every lane takes its own switch case
}
#if __CUDA_ARCH__ >= 800 || !defined(__CUDA_ARCH__)
extern "C" __global__ void halves(const __half2* a, const __nv_bfloat162* b, __half2* oa, __nv_bfloat162* ob, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  __half2 h = a[i];
  __nv_bfloat162 q = b[i];
  oa[i] = __hfma2(h, h, __hadd2(h, __float2half2_rn(0.5f)));
  ob[i] = __hfma2(q, q, __hmul2(q, __float2bfloat162_rn(0.5f)));
}
extern "C" __global__ void warps(const float* x, float* mx, int* cnt, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float v = i < n ? fabsf(x[i]) : 0.f;
#if __CUDA_ARCH__ >= 800
  unsigned u = __reduce_max_sync(~0u, __float_as_uint(v));
#else
  unsigned u = 0;
#endif
  int any = __syncthreads_count(v > 1.f);
  unsigned bal = __ballot_sync(~0u, v > 1.f);
  if ((threadIdx.x & 31) == 0) {
    atomicMax((int*)mx, (int)u);
    atomicAdd(cnt, __popc(bal));
  }
  if (threadIdx.x == 0) atomicAdd(cnt + 1, any);
}
#endif
#else
extern "C" void host(const uint32_t* x, const uint32_t* y, uint32_t* out, int n, int ops) {
  for (int op = 0; op < ops; ++op)
    for (int i = 0; i < n; ++i) out[(int64_t)op * n + i] = mixed(x[i], y[i], op);
}
#endif
