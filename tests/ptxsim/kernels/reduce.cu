#include <stdint.h>
__device__ __forceinline__ float warp_sum(float x) {
  for (int o = 16; o; o >>= 1) x += __shfl_down_sync(0xffffffffu, x, o);
  return x;
}
extern "C" __global__ void sumsq(const float* __restrict__ x, int64_t n, float* out, int* found_inf) {
  __shared__ float part[32];
  float s = 0.f;
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
    float f = x[i];
    if (!isfinite(f)) *found_inf = 1;
    s = fmaf(f, f, s);
  }
  s = warp_sum(s);
  int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
  if (lane == 0) part[w] = s;
  __syncthreads();
  if (w == 0) {
    int nw = (blockDim.x + 31) >> 5;
    s = lane < nw ? part[lane] : 0.f;
    s = warp_sum(s);
    if (lane == 0) atomicAdd(out, s);
  }
}
// dynamic shared memory tree reduction + last-block-done pattern, double accumulate
extern __shared__ double dyn[];
extern "C" __global__ void norm_final(const float* __restrict__ part, int n, float* norm, unsigned* ticket,
                                      double* scratch) {
  __shared__ bool last;
  double s = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s += part[i];
  dyn[threadIdx.x] = s;
  __syncthreads();
  for (int k = blockDim.x / 2; k > 0; k >>= 1) {
    if (threadIdx.x < k) dyn[threadIdx.x] += dyn[threadIdx.x + k];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    scratch[blockIdx.x] = dyn[0];
    __threadfence();
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    double t = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) t += ((volatile double*)scratch)[b];
    *norm = (float)sqrt(t);
  }
}
