// Plans a decode step: which thread-block partition works on which blocks of which sequence.
// The layout and the balancing rule are described in jax_flashmla/planner.py, the reference that
// this kernel equals bit for bit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_flashmla {

struct PlanParams {
  const int32_t* cache_seqlens;      // [groups, batch]
  int32_t* tile_scheduler_metadata;  // [groups, num_parts, kMetadataColumns], 16-byte aligned
  int32_t* num_splits;               // [groups, batch + 1]
  int groups;
  int batch;
  int num_parts;
  int overhead_blocks;    // cost of starting and ending a sequence, in blocks
  int min_split_blocks;   // no cut leaves fewer blocks of a sequence on one side
  int split_cost_blocks;  // what a partition gains if no sequence is split
  int max_blocks;         // blocks per sequence that are balanced; keeps the sums inside int32
};

// For `max_blocks`: the line of all sequences is then no longer than 2^30.
inline int max_balanced_blocks(int batch, int overhead_blocks) {
  const int share = (1 << 30) / (batch > 0 ? batch : 1) - overhead_blocks;
  return share > 1 ? share : 1;
}

inline constexpr int kBlockTokens = 64;
inline constexpr int kMetadataColumns = 8;

// Enqueues one launch; returns its error.
cudaError_t launch_plan(const PlanParams& params, cudaStream_t stream);

}  // namespace jax_flashmla
