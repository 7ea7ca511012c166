// Combines the partial results of sequences that the plan split.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>

#include "cuda/kernel_params.cuh"
#include "cuda/launch.cuh"

namespace jax_flashmla {
namespace {

constexpr float kLowest = -FLT_MAX;  // not above any log-sum-exp, and still finite

// Two neighbouring columns.
__device__ __forceinline__ void store2(__nv_bfloat16* target, float x, float y) {
  *reinterpret_cast<__nv_bfloat162*>(target) = __floats2bfloat162_rn(x, y);
}
__device__ __forceinline__ void store2(__half* target, float x, float y) {
  *reinterpret_cast<__half2*>(target) = __floats2half2_rn(x, y);
}

// The tile of 16 rows of one sequence that a CTA works on, with others that have other columns.
struct Tile {
  int64_t group_seq;
  int kv_head;
  int row;     // the first
  int slice;   // of the columns
  bool whole;  // the sequence was not split: nothing to do
  int splits;
  const uint2* columns;  // of the first split
  const float* stats;
  int64_t step;  // tiles from one split to the next
};

// The plan was there before the split kernel began; its results are only now: this loads none.
__device__ __forceinline__ Tile find_tile(const KernelParams& p,
                                          const cutlass::FastDivmod& by_slices) {
  Tile tile;
  int tile_of_all, head_of_all, number, group_seq;
  by_slices(tile_of_all, tile.slice, static_cast<int>(blockIdx.x));
  p.by_partial_tiles(head_of_all, number, tile_of_all);
  p.by_h_kv(group_seq, tile.kv_head, head_of_all);
  const int group = p.by_batch.div(group_seq);
  const int32_t* bounds = p.num_splits + static_cast<int64_t>(group_seq) + group;
  const int begin = bounds[0];
  const int end = bounds[1];
  tile.group_seq = group_seq;
  tile.row = number * kPartialRows;
  tile.whole = end - begin <= 1;
  // Any metadata keeps the kernel inside its buffers.
  const int slot = min(max(begin, 0), p.slots);
  tile.splits = min(end, p.slots) - slot;
  tile.step = int64_t{p.h_kv} * p.partial_tiles();
  const int64_t first = (static_cast<int64_t>(group) * p.slots + slot) * tile.step +
                        tile.kv_head * p.partial_tiles() + number;
  tile.columns = static_cast<const uint2*>(p.partial_out) + first * kPartialStrips * 32;
  tile.stats = p.partial_stats + first * kPartialStats;
  return tile;
}

// Returns whether there is nothing to combine, once the partial results are there. One CTA waits in
// any case, so that this kernel does not end before the split kernel: the next one waits for this.
__device__ __forceinline__ bool leave_or_wait(const Tile& tile) {
  if (tile.whole && blockIdx.x != 0) return true;
  wait_for_kernel_before();
  return tile.whole;
}

// Where the results of a row go; null if there is no such row.
template <typename Element>
struct Target {
  Element* out = nullptr;
  float* lse = nullptr;
};

template <typename Element>
__device__ __forceinline__ Target<Element> find_target(const KernelParams& p, const Tile& tile,
                                                       int row) {
  if (tile.row + row >= p.num_rows()) return {};
  int token, head;
  p.by_heads_per_kv(token, head, tile.row + row);
  head += tile.kv_head * p.heads_per_kv();
  const int64_t query = (tile.group_seq * p.s_q + token) * p.h_q + head;
  return {static_cast<Element*>(p.out) + query * kLatentDim,
          p.lse + (tile.group_seq * p.h_q + head) * p.s_q + token};
}

__device__ __forceinline__ float inverse(float total) {
  return total == 0 ? 0 : __fdividef(1.0f, total);
}
__device__ __forceinline__ float log_sum_exp(float base, float total) {
  return total == 0 ? -INFINITY : (base + __log2f(total)) * kLn2;
}

// Adds a lane's part of a strip, by its rows' weights and the strip's scale.
__device__ __forceinline__ void add_scaled(float4& sum, const float (&weight)[2], float scale,
                                           const uint2& part) {
  const float2 first = __half22float2(reinterpret_cast<const __half2&>(part.x));
  const float2 second = __half22float2(reinterpret_cast<const __half2&>(part.y));
  const float by[2] = {weight[0] * scale, weight[1] * scale};
  sum.x += by[0] * first.x, sum.y += by[0] * first.y;
  sum.z += by[1] * second.x, sum.w += by[1] * second.y;
}

// Few splits: a warp has all of them, for `kVectors` strips at a time.
struct FewSplits {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kVectors = 4;
  static constexpr int kAhead = 4;  // splits loaded at a time
  static constexpr int kSlices = kPartialStrips / (kWarps * kVectors);
};

template <typename Element>
__global__ void __launch_bounds__(FewSplits::kThreads)
    combine_few(const __grid_constant__ KernelParams p, cutlass::FastDivmod by_slices) {
  using S = FewSplits;
  const int lane = threadIdx.x % 32;
  const Tile tile = find_tile(p, by_slices);
  Target<Element> target[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) target[i] = find_target<Element>(p, tile, lane / 4 + 8 * i);
  if (leave_or_wait(tile)) return;

  for (int first = (tile.slice * S::kWarps + threadIdx.x / 32) * S::kVectors;
       first < kPartialStrips; first += by_slices.divisor * S::kWarps * S::kVectors) {
    float base[2] = {kLowest, kLowest};
    float total[2] = {0, 0};
    float4 sum[S::kVectors] = {};
#pragma unroll 1
    for (int begin = 0; begin < tile.splits; begin += S::kAhead) {
      float lse[S::kAhead][2];
      uint2 loaded[S::kAhead][S::kVectors];
      float4 scales[S::kAhead];
      static_assert(S::kVectors == 4);
#pragma unroll
      for (int j = 0; j < S::kAhead; ++j) {
        const bool there = begin + j < tile.splits;
        const int64_t split = (begin + j) * tile.step;
#pragma unroll
        for (int v = 0; v < S::kVectors; ++v) {
          const uint2* at = tile.columns + (split * kPartialStrips + first + v) * 32 + lane;
          loaded[j][v] = there ? *at : uint2{};
        }
        const float* const stats = tile.stats + split * kPartialStats;
        const auto* at = reinterpret_cast<const float4*>(stats + kPartialRows + first);
        scales[j] = there ? *at : float4{};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool has = there && target[i].out != nullptr;
          lse[j][i] = has ? stats[lane / 4 + 8 * i] : -INFINITY;
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float top = base[i];
#pragma unroll
        for (int j = 0; j < S::kAhead; ++j) top = fmaxf(top, lse[j][i]);
        const float factor = exp2f(base[i] - top);
        base[i] = top;
        total[i] *= factor;
#pragma unroll
        for (float4& x : sum) {
          float* pair = i == 0 ? &x.x : &x.z;
          pair[0] *= factor, pair[1] *= factor;
        }
      }
#pragma unroll
      for (int j = 0; j < S::kAhead; ++j) {
        const float weight[2] = {exp2f(lse[j][0] - base[0]), exp2f(lse[j][1] - base[1])};
        total[0] += weight[0], total[1] += weight[1];
#pragma unroll
        for (int v = 0; v < S::kVectors; ++v) {
          add_scaled(sum[v], weight, reinterpret_cast<const float*>(&scales[j])[v], loaded[j][v]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (target[i].out == nullptr) break;
      const float factor = inverse(total[i]);
#pragma unroll
      for (int v = 0; v < S::kVectors; ++v) {
        const float* pair = i == 0 ? &sum[v].x : &sum[v].z;
        store2(target[i].out + (first + v) * kPartialColumns + lane % 4 * 2, pair[0] * factor,
               pair[1] * factor);
      }
      if (first == 0 && lane % 4 == 0) *target[i].lse = log_sum_exp(base[i], total[i]);
    }
  }
}

// Many splits: eight warps share them, for `kVectors` strips. Each loads `kAhead` of its
// own at a time; the weights of all of those are found meanwhile, a row and some splits a thread.
template <int kVectors_, int kAhead_>
struct ManySplits {
  static constexpr int kWarps = 8;
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

template <typename Element, typename S>
__global__ void __launch_bounds__(S::kThreads)
    combine_many(const __grid_constant__ KernelParams p, cutlass::FastDivmod by_slices) {
  __shared__ ManyMemory<S> smem;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  // As a finder of weights, a thread has a row, and every kGroups-th split.
  constexpr int kGroups = S::kThreads / kPartialRows;
  constexpr int kWeights = S::kAtOnce / kGroups;
  static_assert(kWeights * kGroups == S::kAtOnce);
  const int row = threadIdx.x % kPartialRows;
  const int group = threadIdx.x / kPartialRows;
  // In the end, it has two neighbouring columns of a row: of the `i`-th half of a tile's lane.
  const int end_lane = threadIdx.x / 2 % 32;
  const int end_vector = threadIdx.x / 64;
  const int i = threadIdx.x % 2;
  const int end_row = end_lane / 4 + 8 * i;

  const Tile tile = find_tile(p, by_slices);
  const Target<Element> target = find_target<Element>(p, tile, end_row);
  const Target<Element> lse_target = find_target<Element>(p, tile, row);
  const int first = tile.slice * S::kVectors;
  // Of the warp's and of the thread's first split, and from one to the next.
  const uint2* columns = tile.columns + (warp * tile.step * kPartialStrips + first) * 32 + lane;
  const int64_t columns_step = S::kWarps * tile.step * kPartialStrips * 32;
  const float* scales = tile.stats + warp * tile.step * kPartialStats + kPartialRows + first;
  const int64_t scales_step = S::kWarps * tile.step * kPartialStats;
  const float* lses = tile.stats + group * tile.step * kPartialStats + row;
  const int64_t lses_step = kGroups * tile.step * kPartialStats;
  if (leave_or_wait(tile)) return;

  float base = kLowest;  // of the row
  float total = 0;       // of the row, this thread's part
  float4 sum[S::kVectors] = {};
#pragma unroll 1
  for (int begin = 0; begin < tile.splits; begin += S::kAtOnce) {
    uint2 loaded[S::kAhead][S::kVectors];
    float scale[S::kAhead][S::kVectors];
#pragma unroll
    for (int j = 0; j < S::kAhead; ++j, columns += columns_step, scales += scales_step) {
      if (begin + j * S::kWarps + warp >= tile.splits) break;
#pragma unroll
      for (int v = 0; v < S::kVectors; ++v) {
        loaded[j][v] = load_early(columns + v * 32);
        scale[j][v] = load_early(scales + v);
      }
    }
    float lse[kWeights];
    float top = kLowest;
#pragma unroll
    for (int k = 0; k < kWeights; ++k, lses += lses_step) {
      const bool there = begin + k * kGroups + group < tile.splits;
      lse[k] = there && lse_target.out != nullptr ? *lses : -INFINITY;
      top = fmaxf(top, lse[k]);
    }
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
  if (end_vector < S::kVectors && target.out != nullptr) {
    float2 all = {0, 0};
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) {
      const float2 x = reinterpret_cast<const float2*>(&smem.columns[w][end_vector][end_lane])[i];
      all = {all.x + x.x, all.y + x.y};
    }
    const float scale = inverse(sum_totals(end_row));
    store2(target.out + (first + end_vector) * kPartialColumns + end_lane % 4 * 2, all.x * scale,
           all.y * scale);
  }
  if (first == 0 && threadIdx.x < kPartialRows && lse_target.lse != nullptr) {
    *lse_target.lse = log_sum_exp(base, sum_totals(row));
  }
}

template <typename Element>
cudaError_t launch_for_splits(const DecodeParams& p, cudaStream_t stream) {
  // Splits of a sequence, if the batch shares the partitions evenly. With many, a tile is work for
  // several CTAs; with few, there are many tiles, most of which are whole and only cost their CTA.
  const int splits = (p.num_parts + p.batch - 1) / p.batch;
  const int64_t tiles = int64_t{p.groups} * p.batch * p.h_kv * p.partial_tiles();
  const auto launch_many = [&](auto shape) {
    using S = decltype(shape);
    return launch_dependent<combine_many<Element, S>>(
        {.ctas = tiles * S::kSlices, .threads = S::kThreads}, stream, p,
        cutlass::FastDivmod(S::kSlices));
  };
  if (splits > 8) {
    return tiles <= 4 ? launch_many(ManySplits<1, 18>{}) : launch_many(ManySplits<4, 4>{});
  }
  const int slices = tiles > 256 ? 1 : FewSplits::kSlices;
  return launch_dependent<combine_few<Element>>(
      {.ctas = tiles * slices, .threads = FewSplits::kThreads}, stream, p,
      cutlass::FastDivmod(slices));
}

}  // namespace

cudaError_t launch_combine(const DecodeParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? launch_for_splits<__nv_bfloat16>(p, stream)
                                     : launch_for_splits<__half>(p, stream);
}

}  // namespace jax_flashmla
