// Multi-tensor Adam-like step: pointer table passed by value as a kernel parameter.
// With -fmad=false its rounding is the same for all architectures: which products nvcc contracts by itself is not.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

constexpr int MAX_TENSORS = 24;
constexpr int MAX_BLOCKS = 128;
constexpr int CHUNK = 2048;

template <typename P, typename G>
struct Table {
  P* p[MAX_TENSORS];
  const G* g[MAX_TENSORS];
  float* m[MAX_TENSORS];
  float* v[MAX_TENSORS];
  int64_t n[MAX_TENSORS];
  uint8_t block_to_tensor[MAX_BLOCKS];
  int32_t block_to_chunk[MAX_BLOCKS];
};

struct Hyper {
  float lr, beta1, beta2, eps, wd, bc1, bc2_sqrt;
  int step;
};

__device__ __forceinline__ void adam1(float& p, float g, float& m, float& v, const Hyper& h) {
  m = fmaf(h.beta1, m, (1.f - h.beta1) * g);
  v = fmaf(h.beta2, v, (1.f - h.beta2) * g * g);
  float denom = sqrtf(v) / h.bc2_sqrt + h.eps;
  p = p - h.lr * h.wd * p - (h.lr / h.bc1) * (m / denom);
}

extern "C" __global__ void adam_f32(const __grid_constant__ Table<float, float> t, Hyper h,
                                    const float* __restrict__ inv_scale) {
  int ti = t.block_to_tensor[blockIdx.x];
  int64_t base = (int64_t)t.block_to_chunk[blockIdx.x] * CHUNK;
  int64_t n = t.n[ti] - base;
  if (n > CHUNK) n = CHUNK;
  float* p = t.p[ti] + base;
  const float* g = t.g[ti] + base;
  float* m = t.m[ti] + base;
  float* v = t.v[ti] + base;
  float s = *inv_scale;
  bool al = n % 4 == 0 && (((uintptr_t)p | (uintptr_t)g | (uintptr_t)m | (uintptr_t)v) & 15) == 0;
  if (al) {
    for (int i = threadIdx.x * 4; i < n; i += blockDim.x * 4) {
      float4 p4 = *(float4*)(p + i), g4 = *(const float4*)(g + i);
      float4 m4 = *(float4*)(m + i), v4 = *(float4*)(v + i);
      adam1(p4.x, g4.x * s, m4.x, v4.x, h);
      adam1(p4.y, g4.y * s, m4.y, v4.y, h);
      adam1(p4.z, g4.z * s, m4.z, v4.z, h);
      adam1(p4.w, g4.w * s, m4.w, v4.w, h);
      *(float4*)(p + i) = p4;
      *(float4*)(m + i) = m4;
      *(float4*)(v + i) = v4;
    }
  } else {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      float pp = p[i], mm = m[i], vv = v[i];
      adam1(pp, g[i] * s, mm, vv, h);
      p[i] = pp;
      m[i] = mm;
      v[i] = vv;
    }
  }
}

// bf16 params / fp16 grads, 4 at a time through 8-byte loads; fp32 math.
extern "C" __global__ void adam_bf16(const __grid_constant__ Table<__nv_bfloat16, __half> t, Hyper h) {
  int ti = t.block_to_tensor[blockIdx.x];
  int64_t base = (int64_t)t.block_to_chunk[blockIdx.x] * CHUNK;
  int64_t n = t.n[ti] - base;
  if (n > CHUNK) n = CHUNK;
  __nv_bfloat16* p = t.p[ti] + base;
  const __half* g = t.g[ti] + base;
  float* m = t.m[ti] + base;
  float* v = t.v[ti] + base;
  for (int i0 = threadIdx.x * 4; i0 < n; i0 += blockDim.x * 4) {
    if (i0 + 4 <= n) {
      union {
        uint2 u;
        __nv_bfloat162 h[2];
      } pu;
      union {
        uint2 u;
        __half2 h[2];
      } gu;
      pu.u = *(uint2*)(p + i0);
      gu.u = *(const uint2*)(g + i0);
      float4 m4 = *(float4*)(m + i0), v4 = *(float4*)(v + i0);
      float2 pa = __bfloat1622float2(pu.h[0]), pb = __bfloat1622float2(pu.h[1]);
      float2 ga = __half22float2(gu.h[0]), gb = __half22float2(gu.h[1]);
      adam1(pa.x, ga.x, m4.x, v4.x, h);
      adam1(pa.y, ga.y, m4.y, v4.y, h);
      adam1(pb.x, gb.x, m4.z, v4.z, h);
      adam1(pb.y, gb.y, m4.w, v4.w, h);
      pu.h[0] = __float22bfloat162_rn(pa);
      pu.h[1] = __float22bfloat162_rn(pb);
      *(uint2*)(p + i0) = pu.u;
      *(float4*)(m + i0) = m4;
      *(float4*)(v + i0) = v4;
    } else {
      for (int i = i0; i < n; ++i) {
        float pp = __bfloat162float(p[i]), mm = m[i], vv = v[i];
        adam1(pp, __half2float(g[i]), mm, vv, h);
        p[i] = __float2bfloat16(pp);
        m[i] = mm;
        v[i] = vv;
      }
    }
  }
}
