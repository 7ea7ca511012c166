// Combines many splits: the warps of a CTA share them.
#pragma once

#include "cuda/decode_combine_tile.cuh"

namespace jax_flashmla {

// A CTA has `kVectors` strips. Each of its warps loads them of `kAhead` splits of its own at a
// time; the weights of all of those are found meanwhile, a row and some splits a thread.
template <int kWarps_, int kVectors_, int kAhead_>
struct ManySplits {
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kVectors = kVectors_;
  static constexpr int kAhead = kAhead_;
  static constexpr int kAtOnce = kWarps * kAhead;  // splits
  static constexpr int kSlices = kPartialStrips / kVectors;
};

template <typename S>
struct ManyMemory {
  float weights[S::kAtOnce][kPartialRows];
  float maxima[S::kWarps][kPartialRows];
  float totals[S::kWarps][kPartialRows];
  float factor[kPartialRows];  // from the weights of splits before to those of now
  float4 columns[S::kWarps][S::kVectors][32];
};

// Now, and not when the result is needed, where the compiler would like to have it.
__device__ __forceinline__ uint2 load_early(const uint2* at) {
  uint2 x;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(at));
  return x;
}
__device__ __forceinline__ float load_early(const float* at) {
  float x;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(at));
  return x;
}

// Four that lie together, or one.
__device__ __forceinline__ void load_early(const float* at, float (&x)[4]) {
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "l"(at));
}
__device__ __forceinline__ void load_early(const float* at, float (&x)[1]) {
  x[0] = load_early(at);
}

// `leave` is asked when all is prepared that does not want the partial results.
template <typename Element, typename S, typename Leave>
__device__ __forceinline__ void combine_many(const KernelParams& p, const Tile& tile, int slice,
                                             ManyMemory<S>& smem, const Leave& leave) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  // As a finder of weights, a thread has a row, and every kGroups-th split.
  constexpr int kGroups = S::kThreads / kPartialRows;
  constexpr int kWeights = S::kAtOnce / kGroups;
  static_assert(kWeights * kGroups == S::kAtOnce);
  const int row = threadIdx.x % kPartialRows;
  const int group = threadIdx.x / kPartialRows;
  // In the end, it has two neighbouring columns of a row, of the `i`-th half of a strip's lane, in
  // every kEndStep-th strip.
  constexpr int kEndStep = S::kThreads / 64;
  const int end_lane = threadIdx.x / 2 % 32;
  const int i = threadIdx.x % 2;
  const int end_row = end_lane / 4 + 8 * i;

  const Target<Element> target = find_target<Element>(p, tile, end_row);
  const Target<Element> lse_target = find_target<Element>(p, tile, row);
  const int first = slice * S::kVectors;
  // Of the warp's and of the thread's first split, and from one to the next.
  const uint2* columns = tile.columns + (warp * tile.step * kPartialStrips + first) * 32 + lane;
  const int64_t columns_step = S::kWarps * tile.step * kPartialStrips * 32;
  const float* scales = tile.stats + warp * tile.step * kPartialStats + kPartialRows + first;
  const int64_t scales_step = S::kWarps * tile.step * kPartialStats;
  const float* lses = tile.stats + group * tile.step * kPartialStats + row;
  const int64_t lses_step = kGroups * tile.step * kPartialStats;
  if (leave()) return;

  float base = kLowest;  // of the row
  float total = 0;       // of the row, this thread's part
  float4 sum[S::kVectors] = {};
#pragma unroll 1
  for (int begin = 0; begin < tile.splits; begin += S::kAtOnce) {
    // First what the weights are found of, since all wait for them.
    float lse[kWeights];
#pragma unroll
    for (int k = 0; k < kWeights; ++k, lses += lses_step) {
      const bool there = begin + k * kGroups + group < tile.splits;
      lse[k] = there && lse_target.out != nullptr ? load_early(lses) : -INFINITY;
    }
    uint2 loaded[S::kAhead][S::kVectors];
    float scale[S::kAhead][S::kVectors];
#pragma unroll
    for (int j = 0; j < S::kAhead; ++j, columns += columns_step, scales += scales_step) {
      if (begin + j * S::kWarps + warp >= tile.splits) break;
#pragma unroll
      for (int v = 0; v < S::kVectors; ++v) loaded[j][v] = load_early(columns + v * 32);
      load_early(scales, scale[j]);
    }
    float top = kLowest;
#pragma unroll
    for (int k = 0; k < kWeights; ++k) top = fmaxf(top, lse[k]);
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, kPartialRows));
    __syncthreads();  // weights and factors of splits before have been read
    if (lane < kPartialRows) smem.maxima[warp][row] = top;
    __syncthreads();
    top = base;
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) top = fmaxf(top, smem.maxima[w][row]);
    const float factor = exp2f(base - top);
    base = top;
    total *= factor;
#pragma unroll
    for (int k = 0; k < kWeights; ++k) {
      const float weight = exp2f(lse[k] - base);
      total += weight;
      smem.weights[k * kGroups + group][row] = weight;
    }
    if (threadIdx.x < kPartialRows) smem.factor[row] = factor;
    __syncthreads();
    if (begin > 0) {
      const float factors[2] = {smem.factor[lane / 4], smem.factor[lane / 4 + 8]};
#pragma unroll
      for (float4& x : sum) {
        x = {x.x * factors[0], x.y * factors[0], x.z * factors[1], x.w * factors[1]};
      }
    }
#pragma unroll
    for (int j = 0; j < S::kAhead; ++j) {
      if (begin + j * S::kWarps + warp >= tile.splits) break;
      const float* weights = smem.weights[j * S::kWarps + warp];
      const float weight[2] = {weights[lane / 4], weights[lane / 4 + 8]};
#pragma unroll
      for (int v = 0; v < S::kVectors; ++v) {
        add_scaled(sum[v], weight, scale[j][v], loaded[j][v]);
      }
    }
  }
  total += __shfl_xor_sync(0xffffffffu, total, kPartialRows);
  if (lane < kPartialRows) smem.totals[warp][row] = total;
#pragma unroll
  for (int v = 0; v < S::kVectors; ++v) smem.columns[warp][v][lane] = sum[v];
  __syncthreads();
  const auto sum_totals = [&](int of_row) {
    float all = 0;
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) all += smem.totals[w][of_row];
    return all;
  };
  if (target.out != nullptr) {
    const float scale = over_total(sum_totals(end_row));
#pragma unroll
    for (int v = 0; v < S::kVectors; v += kEndStep) {
      const int vector = v + threadIdx.x / 64;
      if (vector >= S::kVectors) break;
      float2 all = {0, 0};
#pragma unroll
      for (int w = 0; w < S::kWarps; ++w) {
        const float2 x = reinterpret_cast<const float2*>(&smem.columns[w][vector][end_lane])[i];
        all = {all.x + x.x, all.y + x.y};
      }
      store2(target.out + (first + vector) * kPartialColumns + end_lane % 4 * 2, all.x * scale,
             all.y * scale);
    }
  }
  if (first == 0 && threadIdx.x < kPartialRows && lse_target.lse != nullptr) {
    *lse_target.lse = log_sum_exp(base, sum_totals(row)) * kLn2;
  }
}

}  // namespace jax_flashmla
