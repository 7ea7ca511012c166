// Combines the partial results of sequences that the plan split.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/decode.h"

namespace jax_flashmla {
namespace {

constexpr int kColumnThreads = kLatentDim / 4;  // each owns four columns
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ void store4(__nv_bfloat16* target, float4 v) {
  __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(v.x, v.y), __floats2bfloat162_rn(v.z, v.w)};
  *reinterpret_cast<uint2*>(target) = *reinterpret_cast<uint2*>(pairs);
}
__device__ __forceinline__ void store4(__half* target, float4 v) {
  __half2 pairs[2] = {__floats2half2_rn(v.x, v.y), __floats2half2_rn(v.z, v.w)};
  *reinterpret_cast<uint2*>(target) = *reinterpret_cast<uint2*>(pairs);
}

__device__ __forceinline__ void add_scaled(float4& sum, float weight, float4 v) {
  sum.x += weight * v.x;
  sum.y += weight * v.y;
  sum.z += weight * v.z;
  sum.w += weight * v.w;
}

// One CTA per query row of each sequence and KV head; leaves at once if the sequence has one split.
// `kLanes` groups of threads take every kLanes-th split and add up at the end, in a fixed order.
template <typename Element, int kLanes>
__global__ void __launch_bounds__(kLanes* kColumnThreads)
    combine_kernel(const __grid_constant__ DecodeParams p) {
  __shared__ float4 sums[kLanes][kColumnThreads];
  __shared__ float totals[kLanes];
  __shared__ float tops[kLanes * kColumnThreads / 32];

  const int num_rows = p.num_rows();
  const unsigned query_row = blockIdx.x;
  const int row = static_cast<int>(query_row % num_rows);
  const unsigned seq_head = query_row / num_rows;
  const int kv_head = static_cast<int>(seq_head % p.h_kv);
  const int64_t group_seq = seq_head / p.h_kv;
  const int64_t group = group_seq / p.batch;
  const int64_t seq = group_seq % p.batch;

  const int32_t* bounds = p.num_splits + group * (p.batch + 1) + seq;
  const int begin = bounds[0];
  const int end = bounds[1];
  if (end - begin <= 1) return;
  // Any metadata keeps the kernel inside its buffers.
  const int first = min(max(begin, 0), p.slots);
  const int splits = min(end, p.slots) - first;

  const int64_t stride = int64_t{p.h_kv} * num_rows;
  const int64_t start = (group * p.slots + first) * stride + int64_t{kv_head} * num_rows + row;
  const float* lse = p.partial_lse + start;

  // The largest log-sum-exp, over all threads.
  float top = -INFINITY;
  for (int i = threadIdx.x; i < splits; i += kLanes * kColumnThreads) {
    top = fmaxf(top, lse[i * stride]);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, distance));
  }
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kLanes * kColumnThreads / 32; ++warp) top = fmaxf(top, tops[warp]);
  const float base = top == -INFINITY ? 0.0f : top;

  const int lane = threadIdx.x / kColumnThreads;
  const int column = threadIdx.x % kColumnThreads;
  const float4* partial =
      reinterpret_cast<const float4*>(p.partial_out) + start * kColumnThreads + column;
  float total = 0;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int i = lane; i < splits; i += kLanes) {
    const float weight = exp2f(lse[i * stride] - base);
    total += weight;
    add_scaled(sum, weight, partial[i * stride * kColumnThreads]);
  }
  sums[lane][column] = sum;
  if (column == 0) totals[lane] = total;
  __syncthreads();
  if (lane != 0) return;
#pragma unroll
  for (int other = 1; other < kLanes; ++other) {
    add_scaled(sum, 1.0f, sums[other][column]);
    total += totals[other];
  }

  const bool empty = total == 0;
  const float inverse = empty ? 0.0f : 1.0f / total;
  const int head = kv_head * p.heads_per_kv() + row % p.heads_per_kv();
  const int token = row / p.heads_per_kv();
  const int64_t query = (group_seq * p.s_q + token) * p.h_q + head;
  store4(static_cast<Element*>(p.out) + query * kLatentDim + column * 4,
         make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse));
  if (column == 0) {
    p.lse[(group_seq * p.h_q + head) * p.s_q + token] =
        empty ? -INFINITY : (base + log2f(total)) * kLn2;
  }
}

template <typename Element, int kLanes>
cudaError_t launch(const DecodeParams& p, unsigned ctas, cudaStream_t stream) {
  combine_kernel<Element, kLanes><<<ctas, kLanes * kColumnThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename Element>
cudaError_t launch_for_splits(const DecodeParams& p, unsigned ctas, cudaStream_t stream) {
  // Splits of a sequence, if the batch shares the partitions evenly.
  const int splits = (p.num_parts + p.batch - 1) / p.batch;
  return splits > 8 ? launch<Element, 8>(p, ctas, stream) : launch<Element, 1>(p, ctas, stream);
}

}  // namespace

cudaError_t launch_combine(const DecodeParams& p, cudaStream_t stream) {
  const int64_t ctas = int64_t{p.groups} * p.batch * p.s_q * p.h_q;
  if (ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto count = static_cast<unsigned>(ctas);
  return p.dtype == DType::kBFloat16 ? launch_for_splits<__nv_bfloat16>(p, count, stream)
                                     : launch_for_splits<__half>(p, count, stream);
}

}  // namespace jax_flashmla
