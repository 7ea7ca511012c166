// Combines the partial results of sequences that the plan split.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/decode.h"

namespace jax_flashmla {
namespace {

constexpr int kRowVectors = kLatentDim / 4;  // of four columns each
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

// Of all lanes' values.
template <typename Combine>
__device__ __forceinline__ float warp_reduce(float x, const Combine& combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x = combine(x, __shfl_xor_sync(0xffffffffu, x, distance));
  }
  return x;
}

// How a CTA works: `kShare` warps share the splits of a row; a lane has `kVectors` vectors of four
// columns, so that `kSlices` CTAs share the columns of a row. `kAhead` splits are loaded at a time.
template <int kShare_, int kVectors_, int kWarps_, int kAhead_>
struct Shape {
  static constexpr int kShare = kShare_;
  static constexpr int kVectors = kVectors_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kAhead = kAhead_;
  static constexpr int kSlices = kRowVectors / (kVectors * 32);
  static constexpr int kTeams = kWarps / kShare;  // rows at a time
};
using FewSplits = Shape<1, 4, 4, 4>;
using ManySplits = Shape<8, 4, 8, 4>;
using FewRows = Shape<8, 1, 8, 16>;  // and many splits

// A weighted sum of partial results, relative to the largest log-sum-exp of them.
template <int kVectors>
struct Sum {
  float base = -INFINITY;
  float total = 0;
  float4 columns[kVectors] = {};

  __device__ void rebase(float new_base) {
    const float factor = exp2f(base - new_base);
    base = new_base;
    total *= factor;
#pragma unroll
    for (float4& v : columns) v = {v.x * factor, v.y * factor, v.z * factor, v.w * factor};
  }
};

// Adds up `splits` partial results of a row that lie `step` rows apart. Of every 32, lane i has the
// log-sum-exp of the i-th.
template <typename S>
__device__ __forceinline__ Sum<S::kVectors> add_splits(const float* lse, const float4* partial,
                                                       int splits, int64_t step, int lane) {
  const auto larger = [](float x, float y) { return fmaxf(x, y); };
  const auto add = [](float x, float y) { return x + y; };
  Sum<S::kVectors> sum;
  for (int begin = 0; begin < splits; begin += 32) {
    const int count = min(splits - begin, 32);
    const float mine = lane < count ? lse[(begin + lane) * step] : -INFINITY;
    float weight = 0;
#pragma unroll 1
    for (int i = 0; i < count; i += S::kAhead) {
      const float4* const first = partial + (begin + i) * step * kRowVectors + lane;
      float4 loaded[S::kAhead][S::kVectors];
#pragma unroll
      for (int j = 0; j < S::kAhead; ++j) {
        if (i + j >= count) break;
#pragma unroll
        for (int v = 0; v < S::kVectors; ++v) loaded[j][v] = first[j * step * kRowVectors + v * 32];
      }
      if (i == 0) {  // now that the first loads are on their way
        const float top = fmaxf(sum.base, warp_reduce(mine, larger));
        if (top == -INFINITY) break;
        sum.rebase(top);
        weight = exp2f(mine - top);
        sum.total += warp_reduce(weight, add);
      }
#pragma unroll
      for (int j = 0; j < S::kAhead; ++j) {
        const float factor = __shfl_sync(0xffffffffu, weight, (i + j) % 32);
        if (i + j >= count) break;
#pragma unroll
        for (int v = 0; v < S::kVectors; ++v) add_scaled(sum.columns[v], factor, loaded[j][v]);
      }
    }
  }
  return sum;
}

// What the warps that share a row tell each other.
template <typename S>
struct Shares {
  float base[S::kShare];
  float total[S::kShare];
  float4 columns[S::kShare][S::kVectors][32];
};

// Adds up the shares of a row, in a fixed order: each of the first warps one vector of every lane.
template <typename S>
__device__ __forceinline__ Sum<1> add_shares(const Shares<S>& shares, int vector, int lane) {
  Sum<1> sum;
#pragma unroll
  for (int i = 0; i < S::kShare; ++i) sum.base = fmaxf(sum.base, shares.base[i]);
  if (sum.base == -INFINITY) return sum;
#pragma unroll
  for (int i = 0; i < S::kShare; ++i) {
    const float factor = exp2f(shares.base[i] - sum.base);
    sum.total += factor * shares.total[i];
    add_scaled(sum.columns[0], factor, shares.columns[i][vector][lane]);
  }
  return sum;
}

// Writes vectors of row `row` from `first_vector` on, every 32nd, and its log-sum-exp with the
// first.
template <typename Element, int kVectors>
__device__ __forceinline__ void write_row(const DecodeParams& p, int group_seq, int row,
                                          int first_vector, int lane, const Sum<kVectors>& sum) {
  const bool empty = sum.total == 0;
  const float inverse = empty ? 0.0f : 1.0f / sum.total;
  // Rows are those of partial results: KV head, token, head of the KV head.
  const int kv_head = row / p.num_rows();
  const int token = row % p.num_rows() / p.heads_per_kv();
  const int head = kv_head * p.heads_per_kv() + row % p.heads_per_kv();
  const int64_t query = (static_cast<int64_t>(group_seq) * p.s_q + token) * p.h_q + head;
  Element* out = static_cast<Element*>(p.out) + query * kLatentDim + (first_vector + lane) * 4;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const float4 c = sum.columns[v];
    store4(out + v * 128, make_float4(c.x * inverse, c.y * inverse, c.z * inverse, c.w * inverse));
  }
  if (lane == 0 && first_vector == 0) {
    p.lse[(static_cast<int64_t>(group_seq) * p.h_q + head) * p.s_q + token] =
        empty ? -INFINITY : (sum.base + log2f(sum.total)) * kLn2;
  }
}

// A CTA has `rows_per_warp` times kTeams rows of one sequence, or one of the slices of their
// columns.
template <typename Element, typename S>
__global__ void __launch_bounds__(S::kWarps * 32)
    combine_kernel(const __grid_constant__ DecodeParams p, int rows_per_warp) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int share = warp % S::kShare;
  const int sequence_rows = p.s_q * p.h_q;
  const int cta_rows = S::kTeams * rows_per_warp;
  const int ctas = (sequence_rows + cta_rows - 1) / cta_rows;  // of a sequence and slice
  const int slice = static_cast<int>(blockIdx.x) % S::kSlices;
  const int index = static_cast<int>(blockIdx.x) / S::kSlices;
  const int group_seq = index / ctas;
  const int group = group_seq / p.batch;
  const int32_t* bounds =
      p.num_splits + static_cast<int64_t>(group) * (p.batch + 1) + group_seq % p.batch;
  const int begin = bounds[0];
  const int end = bounds[1];
  // The plan was there before the split kernel began; its results are only now. One CTA waits in
  // any case, so that this kernel does not end before that one.
  const bool whole = end - begin <= 1;
  if (whole && blockIdx.x != 0) return;
  cudaGridDependencySynchronize();
  if (whole) return;
  // Any metadata keeps the kernel inside its buffers.
  const int slot = min(max(begin, 0), p.slots);
  const int splits = min(end, p.slots) - slot;
  const int my_splits = max(splits - share + S::kShare - 1, 0) / S::kShare;

  const int64_t stride = int64_t{p.h_kv} * p.num_rows();  // from one partial result to the next
  const int first_vector = slice * S::kVectors * 32;
  const int first = (index % ctas * S::kTeams + warp / S::kShare) * rows_per_warp;
  for (int row = first; row < min(first + rows_per_warp, sequence_rows); ++row) {
    const int64_t start = (static_cast<int64_t>(group) * p.slots + slot + share) * stride + row;
    const float4* partial =
        reinterpret_cast<const float4*>(p.partial_out) + start * kRowVectors + first_vector;
    const auto sum =
        add_splits<S>(p.partial_lse + start, partial, my_splits, stride * S::kShare, lane);
    if constexpr (S::kShare == 1) {
      write_row<Element>(p, group_seq, row, first_vector, lane, sum);
    } else {
      static_assert(S::kTeams == 1 && S::kVectors <= S::kShare);
      __shared__ Shares<S> shares;
      __syncthreads();  // the row before has been read
      shares.base[share] = sum.base;
      shares.total[share] = sum.total;
#pragma unroll
      for (int v = 0; v < S::kVectors; ++v) shares.columns[share][v][lane] = sum.columns[v];
      __syncthreads();
      if (share >= S::kVectors) continue;
      write_row<Element>(p, group_seq, row, first_vector + share * 32, lane,
                         add_shares<S>(shares, share, lane));
    }
  }
}

// Older drivers cannot capture a dependent launch into a graph.
bool driver_has_dependent_launches() {
  static const bool has = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12030;
  }();
  return has;
}

template <typename Element, typename S>
cudaError_t launch(const DecodeParams& p, int rows_per_warp, cudaStream_t stream) {
  const int64_t cta_rows = int64_t{S::kTeams} * rows_per_warp;
  const int64_t ctas =
      (int64_t{p.s_q} * p.h_q + cta_rows - 1) / cta_rows * p.groups * p.batch * S::kSlices;
  if (ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(S::kWarps * 32);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = driver_has_dependent_launches();
  return cudaLaunchKernelEx(&config, combine_kernel<Element, S>, p, rows_per_warp);
}

template <typename Element>
cudaError_t launch_for_splits(const DecodeParams& p, cudaStream_t stream) {
  // Splits of a sequence, if the batch shares the partitions evenly. With many, a row is work for
  // one CTA or several; with few, there are many rows, most of which are whole and only cost their
  // CTA.
  const int splits = (p.num_parts + p.batch - 1) / p.batch;
  const int64_t rows = int64_t{p.groups} * p.batch * p.s_q * p.h_q;
  if (splits > 8 && rows <= 64) return launch<Element, FewRows>(p, 1, stream);
  if (splits > 8) return launch<Element, ManySplits>(p, 1, stream);
  return launch<Element, FewSplits>(p, rows > 4096 ? 4 : 1, stream);
}

}  // namespace

cudaError_t launch_combine(const DecodeParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? launch_for_splits<__nv_bfloat16>(p, stream)
                                     : launch_for_splits<__half>(p, stream);
}

}  // namespace jax_flashmla
