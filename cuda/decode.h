// Paged MLA decode: one kernel that attends, split by the plan, and one that combines the splits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_flashmla {

inline constexpr int kHeadDim = 576;    // columns of a key
inline constexpr int kLatentDim = 512;  // the first of them are also the value
inline constexpr int kRowTile = 64;     // query rows of one CTA

enum class DType { kBFloat16, kFloat16 };

// The query rows of a sequence and KV head are (s_q, heads per KV head), flattened: `num_rows`.
// A partial result has one row of floats per slot of num_splits, KV head and query row.
struct DecodeParams {
  DType dtype;
  const void* q_nope;  // [groups, batch, s_q, h_q, q_nope_stride]: its first 512 columns
  const void* q_rope;  // [groups, batch, s_q, h_q, q_rope_stride]: its first 64 columns
  int q_nope_stride;
  int q_rope_stride;
  const void* k_cache;                     // [groups, num_blocks, 64, h_kv, 576]
  const int32_t* block_table;              // [groups, batch, max_blocks]
  const int32_t* cache_seqlens;            // [groups, batch]
  const int32_t* tile_scheduler_metadata;  // [groups, num_parts, 8]
  const int32_t* num_splits;               // [groups, batch + 1]
  void* out;                               // [groups, batch, s_q, h_q, 512]
  float* lse;                              // [groups, batch, h_q, s_q]
  float* partial_out;                      // [groups, slots, h_kv, num_rows, 512]
  float* partial_lse;                      // [groups, slots, h_kv, num_rows], base 2
  int groups;
  int batch;
  int s_q;
  int h_q;
  int h_kv;
  int num_blocks;
  int max_blocks;
  int num_parts;
  int slots;  // batch + num_parts - 1 at least
  float softmax_scale;
  bool causal;

  __host__ __device__ int heads_per_kv() const { return h_q / h_kv; }
  __host__ __device__ int num_rows() const { return s_q * heads_per_kv(); }
  __host__ __device__ int row_tiles() const { return (num_rows() + kRowTile - 1) / kRowTile; }
};

// Enqueues both kernels on the current device; returns the first error.
cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream);

// The two halves, for launch_decode.
cudaError_t launch_split(const DecodeParams& params, cudaStream_t stream);
cudaError_t launch_combine(const DecodeParams& params, cudaStream_t stream);

}  // namespace jax_flashmla
