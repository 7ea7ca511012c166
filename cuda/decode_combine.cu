// Combines the partial results of sequences that the plan split.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/decode.h"

namespace jax_flashmla {
namespace {

constexpr int kWarps = 8;    // of a CTA
constexpr int kVectors = 4;  // of four columns, that a lane owns: a warp has a whole row
constexpr float kLn2 = 0.6931471805599453f;
static_assert(kVectors * 4 * 32 == kLatentDim);

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

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  }
  return x;
}

// A warp adds up every `kShare`-th split of a row; `kShare` warps share a row and add up at the
// end, in a fixed order. A CTA has `rows_per_warp` times kWarps / kShare rows of one sequence.
template <typename Element, int kShare>
__global__ void __launch_bounds__(kWarps * 32)
    combine_kernel(const __grid_constant__ DecodeParams p, int rows_per_warp) {
  constexpr int kTeams = kWarps / kShare;
  __shared__ float4 sums[kShare > 1 ? kShare : 1][kVectors][32];
  __shared__ float totals[kShare];

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int share = warp % kShare;
  const int sequence_rows = p.s_q * p.h_q;
  const int ctas = (sequence_rows + kTeams * rows_per_warp - 1) / (kTeams * rows_per_warp);
  const int group_seq = static_cast<int>(blockIdx.x) / ctas;
  const int group = group_seq / p.batch;
  const int seq = group_seq % p.batch;
  const int32_t* bounds = p.num_splits + static_cast<int64_t>(group) * (p.batch + 1) + seq;
  const int begin = bounds[0];
  const int end = bounds[1];
  if (end - begin <= 1) return;
  // Any metadata keeps the kernel inside its buffers.
  const int slot = min(max(begin, 0), p.slots);
  const int splits = min(end, p.slots) - slot;

  const int num_rows = p.num_rows();
  const int64_t stride = int64_t{p.h_kv} * num_rows;  // from one partial result to the next
  const int first = (static_cast<int>(blockIdx.x) % ctas * kTeams + warp / kShare) * rows_per_warp;
  for (int row = first; row < min(first + rows_per_warp, sequence_rows); ++row) {
    // Rows are those of partial results: KV head, token, head of the KV head.
    const int kv_head = row / num_rows;
    const int token = row % num_rows / p.heads_per_kv();
    const int head = kv_head * p.heads_per_kv() + row % p.heads_per_kv();
    const int64_t start = (static_cast<int64_t>(group) * p.slots + slot) * stride + row;
    const float* lse = p.partial_lse + start;
    float top = -INFINITY;
    for (int i = lane; i < splits; i += 32) top = fmaxf(top, lse[i * stride]);
    top = warp_max(top);
    const float base = top == -INFINITY ? 0.0f : top;

    const float4* partial =
        reinterpret_cast<const float4*>(p.partial_out) + start * (kLatentDim / 4) + lane;
    float total = 0;
    float4 sum[kVectors] = {};
#pragma unroll 4
    for (int i = share; i < splits; i += kShare) {
      const float weight = exp2f(lse[i * stride] - base);
      total += weight;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        add_scaled(sum[v], weight, partial[i * stride * (kLatentDim / 4) + v * 32]);
      }
    }
    if constexpr (kShare > 1) {
      __syncthreads();  // the row before has been read
#pragma unroll
      for (int v = 0; v < kVectors; ++v) sums[share][v][lane] = sum[v];
      if (lane == 0) totals[share] = total;
      __syncthreads();
      // Each of the first warps finishes one vector of every lane.
      if (share < kVectors) sum[0] = sums[0][share][lane];
      total = totals[0];
#pragma unroll
      for (int other = 1; other < kShare; ++other) {
        if (share < kVectors) add_scaled(sum[0], 1.0f, sums[other][share][lane]);
        total += totals[other];
      }
      if (share >= kVectors) continue;
    }

    const bool empty = total == 0;
    const float inverse = empty ? 0.0f : 1.0f / total;
    const int64_t query = (static_cast<int64_t>(group_seq) * p.s_q + token) * p.h_q + head;
    constexpr int kMine = kShare > 1 ? 1 : kVectors;
    const int first_vector = kShare > 1 ? share : 0;
    Element* out = static_cast<Element*>(p.out) + query * kLatentDim + lane * 4;
#pragma unroll
    for (int v = 0; v < kMine; ++v) {
      store4(out + (first_vector + v) * 128, make_float4(sum[v].x * inverse, sum[v].y * inverse,
                                                         sum[v].z * inverse, sum[v].w * inverse));
    }
    if (lane == 0 && share == 0) {
      p.lse[(static_cast<int64_t>(group_seq) * p.h_q + head) * p.s_q + token] =
          empty ? -INFINITY : (base + log2f(total)) * kLn2;
    }
  }
}

template <typename Element, int kShare>
cudaError_t launch(const DecodeParams& p, int rows_per_warp, cudaStream_t stream) {
  const int64_t cta_rows = int64_t{kWarps / kShare} * rows_per_warp;
  const int64_t ctas = (int64_t{p.s_q} * p.h_q + cta_rows - 1) / cta_rows * p.groups * p.batch;
  if (ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  combine_kernel<Element, kShare>
      <<<static_cast<unsigned>(ctas), kWarps * 32, 0, stream>>>(p, rows_per_warp);
  return cudaGetLastError();
}

template <typename Element>
cudaError_t launch_for_splits(const DecodeParams& p, cudaStream_t stream) {
  // Splits of a sequence, if the batch shares the partitions evenly. With many, a row is work for a
  // whole CTA; with few, there are many rows, most of which are whole and only cost their CTA.
  const int splits = (p.num_parts + p.batch - 1) / p.batch;
  if (splits > 4) return launch<Element, kWarps>(p, 1, stream);
  const int64_t rows = int64_t{p.groups} * p.batch * p.s_q * p.h_q;
  return launch<Element, 1>(p, rows > 8192 ? 4 : 1, stream);
}

}  // namespace

cudaError_t launch_combine(const DecodeParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? launch_for_splits<__nv_bfloat16>(p, stream)
                                     : launch_for_splits<__half>(p, stream);
}

}  // namespace jax_flashmla
