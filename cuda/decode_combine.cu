// Combines the partial results of sequences that the plan split.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/decode.h"

namespace jax_flashmla {
namespace {

constexpr int kThreads = kLatentDim / 4;  // each owns four columns
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ void store4(__nv_bfloat16* target, float4 v) {
  __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(v.x, v.y), __floats2bfloat162_rn(v.z, v.w)};
  *reinterpret_cast<uint2*>(target) = *reinterpret_cast<uint2*>(pairs);
}
__device__ __forceinline__ void store4(__half* target, float4 v) {
  __half2 pairs[2] = {__floats2half2_rn(v.x, v.y), __floats2half2_rn(v.z, v.w)};
  *reinterpret_cast<uint2*>(target) = *reinterpret_cast<uint2*>(pairs);
}

// One CTA per query row of each sequence and KV head; leaves at once if the sequence has one split.
template <typename Element>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ DecodeParams p) {
  const int num_rows = p.num_rows();
  int64_t index = blockIdx.x;
  const int row = static_cast<int>(index % num_rows);
  index /= num_rows;
  const int kv_head = static_cast<int>(index % p.h_kv);
  const int64_t group_seq = index / p.h_kv;
  const int64_t group = group_seq / p.batch;
  const int64_t seq = group_seq % p.batch;

  const int32_t* bounds = p.num_splits + group * (p.batch + 1) + seq;
  // Any metadata keeps the kernel inside its buffers.
  const int first = min(max(bounds[0], 0), p.slots);
  const int splits = min(bounds[1], p.slots) - first;
  if (bounds[1] - bounds[0] <= 1) return;

  const int64_t stride = int64_t{p.h_kv} * num_rows;
  const int64_t start = (group * p.slots + first) * stride + int64_t{kv_head} * num_rows + row;
  float max = -INFINITY;
  for (int i = 0; i < splits; ++i) max = fmaxf(max, p.partial_lse[start + i * stride]);
  const float base = max == -INFINITY ? 0.0f : max;
  float total = 0;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int i = 0; i < splits; ++i) {
    const float weight = exp2f(p.partial_lse[start + i * stride] - base);
    const float4 v = *reinterpret_cast<const float4*>(
        p.partial_out + (start + i * stride) * kLatentDim + threadIdx.x * 4);
    total += weight;
    sum.x += weight * v.x;
    sum.y += weight * v.y;
    sum.z += weight * v.z;
    sum.w += weight * v.w;
  }
  const bool empty = total == 0;
  const float inverse = empty ? 0.0f : 1.0f / total;
  const int head = kv_head * p.heads_per_kv() + row % p.heads_per_kv();
  const int token = row / p.heads_per_kv();
  const int64_t query = (group_seq * p.s_q + token) * p.h_q + head;
  store4(static_cast<Element*>(p.out) + query * kLatentDim + threadIdx.x * 4,
         make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse));
  if (threadIdx.x == 0) {
    p.lse[(group_seq * p.h_q + head) * p.s_q + token] =
        empty ? -INFINITY : (base + log2f(total)) * kLn2;
  }
}

}  // namespace

cudaError_t launch_combine(const DecodeParams& p, cudaStream_t stream) {
  const int64_t ctas = int64_t{p.groups} * p.batch * p.s_q * p.h_q;
  if (ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (p.dtype == DType::kBFloat16) {
    combine_kernel<__nv_bfloat16><<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(p);
  } else {
    combine_kernel<__half><<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace jax_flashmla
