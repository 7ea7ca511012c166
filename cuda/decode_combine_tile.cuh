// What is combined: 16 rows of a sequence, and where their partial results and results are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>

#include "cuda/kernel_params.cuh"
#include "cuda/launch.cuh"
#include "cuda/weight_sums.cuh"

namespace jax_flashmla {

inline constexpr float kLowest = -FLT_MAX;  // not above any log-sum-exp, and still finite

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
  int row;               // the first
  int splits;            // one or none: the sequence was not split, there is nothing to do
  const uint2* columns;  // of the first split
  const float* stats;
  int64_t step;  // tiles from one split to the next
};

// The plan was there before the split kernel began; its results are only now: this loads none.
__device__ __forceinline__ Tile find_tile(const KernelParams& p, int group, int64_t group_seq,
                                          int kv_head, int number) {
  Tile tile;
  const int32_t* bounds = p.num_splits + group_seq + group;
  tile.group_seq = group_seq;
  tile.kv_head = kv_head;
  tile.row = number * kPartialRows;
  // Any metadata keeps the kernel inside its buffers.
  const int slot = min(max(bounds[0], 0), p.slots);
  tile.splits = min(max(bounds[1], slot), p.slots) - slot;
  tile.step = int64_t{p.h_kv} * p.partial_tiles();
  const int64_t first = (static_cast<int64_t>(group) * p.slots + slot) * tile.step +
                        kv_head * p.partial_tiles() + number;
  tile.columns = static_cast<const uint2*>(p.partial_out) + first * kPartialStrips * 32;
  tile.stats = p.partial_stats + first * kPartialStats;
  return tile;
}

// Whether the first partition has few blocks: as many as its sequences had if all were as long as
// the first.
__device__ __forceinline__ bool first_partition_is_short(const KernelParams& p) {
  constexpr int kFewBlocks = 64;
  const int4 range = *reinterpret_cast<const int4*>(p.tile_scheduler_metadata);
  const int sequences = min(max(range.z - max(range.x, 0), 0), p.batch);
  return int64_t{sequences} * (p.cache_seqlens[0] / kBlockTokens) + range.w <= kFewBlocks;
}

// Returns whether there is nothing to combine, once the partial results are there. One CTA waits in
// any case, so that this kernel does not end before the split kernel: the next one waits for this.
// Where no CTA has anything to combine, the next kernel gets ready while the split kernel ends, if
// partitions are short: behind long ones it would be slower (benchmarks/NOTES.md, attempt 72).
__device__ __forceinline__ bool leave_or_wait(const KernelParams& p, bool nothing) {
  if (nothing) {
    if (blockIdx.x != 0) return true;
    if (first_partition_is_short(p)) cudaTriggerProgrammaticLaunchCompletion();
  }
  wait_for_kernel_before();
  return nothing;
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

// Adds a lane's part of a strip, by its rows' weights and the strip's scale.
__device__ __forceinline__ void add_scaled(float4& sum, const float (&weight)[2], float scale,
                                           const uint2& part) {
  const float2 first = __half22float2(reinterpret_cast<const __half2&>(part.x));
  const float2 second = __half22float2(reinterpret_cast<const __half2&>(part.y));
  const float by[2] = {weight[0] * scale, weight[1] * scale};
  sum.x += by[0] * first.x, sum.y += by[0] * first.y;
  sum.z += by[1] * second.x, sum.w += by[1] * second.y;
}

}  // namespace jax_flashmla
