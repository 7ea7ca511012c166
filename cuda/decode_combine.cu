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

// A query row of one sequence and KV head, and where its partial results start.
struct Row {
  int64_t lse;     // index of its result in params.lse
  int64_t query;   // index of its row of params.out
  int64_t start;   // row of its first partial result
  int64_t stride;  // from one partial result to the next
  int splits;      // 0: nothing to combine
};

__device__ __forceinline__ Row find_row(const DecodeParams& p, unsigned index) {
  const int num_rows = p.num_rows();
  const int row = static_cast<int>(index % num_rows);
  const unsigned seq_head = index / num_rows;
  const int kv_head = static_cast<int>(seq_head % p.h_kv);
  const int64_t group_seq = seq_head / p.h_kv;
  const int64_t group = group_seq / p.batch;
  const int64_t seq = group_seq % p.batch;
  const int32_t* bounds = p.num_splits + group * (p.batch + 1) + seq;
  const int begin = bounds[0];
  const int end = bounds[1];
  // Any metadata keeps the kernel inside its buffers.
  const int first = min(max(begin, 0), p.slots);
  const int head = kv_head * p.heads_per_kv() + row % p.heads_per_kv();
  const int token = row / p.heads_per_kv();
  Row result;
  result.lse = (group_seq * p.h_q + head) * p.s_q + token;
  result.query = (group_seq * p.s_q + token) * p.h_q + head;
  result.stride = int64_t{p.h_kv} * num_rows;
  result.start = (group * p.slots + first) * result.stride + int64_t{kv_head} * num_rows + row;
  result.splits = end - begin > 1 ? min(end, p.slots) - first : 0;
  return result;
}

// A warp adds up every `kShare`-th split of a row; `kShare` warps share a row and add up at the
// end, in a fixed order.
template <typename Element, int kShare>
__global__ void __launch_bounds__(kWarps * 32)
    combine_kernel(const __grid_constant__ DecodeParams p, unsigned rows) {
  __shared__ float4 sums[kShare > 1 ? kShare : 1][kVectors][32];
  __shared__ float totals[kShare];

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int share = warp % kShare;
  const unsigned index = blockIdx.x * (kWarps / kShare) + warp / kShare;
  if (index >= rows) return;
  const Row row = find_row(p, index);
  if (row.splits == 0) return;

  const float* lse = p.partial_lse + row.start;
  float top = -INFINITY;
  for (int i = lane; i < row.splits; i += 32) top = fmaxf(top, lse[i * row.stride]);
  top = warp_max(top);
  const float base = top == -INFINITY ? 0.0f : top;

  const float4* partial =
      reinterpret_cast<const float4*>(p.partial_out) + row.start * (kLatentDim / 4) + lane;
  float total = 0;
  float4 sum[kVectors] = {};
#pragma unroll 4
  for (int i = share; i < row.splits; i += kShare) {
    const float weight = exp2f(lse[i * row.stride] - base);
    total += weight;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      add_scaled(sum[v], weight, partial[i * row.stride * (kLatentDim / 4) + v * 32]);
    }
  }
  if constexpr (kShare > 1) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) sums[share][v][lane] = sum[v];
    if (lane == 0) totals[share] = total;
    __syncthreads();
    // Each of the first warps finishes one vector of every lane.
    if (share >= kVectors) return;
    sum[0] = sums[0][share][lane];
    total = totals[0];
#pragma unroll
    for (int other = 1; other < kShare; ++other) {
      add_scaled(sum[0], 1.0f, sums[other][share][lane]);
      total += totals[other];
    }
  }

  const bool empty = total == 0;
  const float inverse = empty ? 0.0f : 1.0f / total;
  Element* out = static_cast<Element*>(p.out) + row.query * kLatentDim + lane * 4;
  constexpr int kMine = kShare > 1 ? 1 : kVectors;
  const int first = kShare > 1 ? share : 0;
#pragma unroll
  for (int v = 0; v < kMine; ++v) {
    store4(out + (first + v) * 128, make_float4(sum[v].x * inverse, sum[v].y * inverse,
                                                sum[v].z * inverse, sum[v].w * inverse));
  }
  if (lane == 0 && share == 0) {
    p.lse[row.lse] = empty ? -INFINITY : (base + log2f(total)) * kLn2;
  }
}

template <typename Element, int kShare>
cudaError_t launch(const DecodeParams& p, unsigned rows, cudaStream_t stream) {
  constexpr unsigned kRows = kWarps / kShare;
  combine_kernel<Element, kShare><<<(rows + kRows - 1) / kRows, kWarps * 32, 0, stream>>>(p, rows);
  return cudaGetLastError();
}

template <typename Element>
cudaError_t launch_for_splits(const DecodeParams& p, unsigned rows, cudaStream_t stream) {
  // Splits of a sequence, if the batch shares the partitions evenly.
  const int splits = (p.num_parts + p.batch - 1) / p.batch;
  return splits > 4 ? launch<Element, kWarps>(p, rows, stream)
                    : launch<Element, 1>(p, rows, stream);
}

}  // namespace

cudaError_t launch_combine(const DecodeParams& p, cudaStream_t stream) {
  const int64_t rows = int64_t{p.groups} * p.batch * p.s_q * p.h_q;
  if (rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto count = static_cast<unsigned>(rows);
  return p.dtype == DType::kBFloat16 ? launch_for_splits<__nv_bfloat16>(p, count, stream)
                                     : launch_for_splits<__half>(p, count, stream);
}

}  // namespace jax_flashmla
