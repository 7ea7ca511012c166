// Paged MLA decode: a kernel that attends, split by the plan, and one that combines the splits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/plan.h"

namespace jax_flashmla {

inline constexpr int kHeadDim = 576;        // columns of a key
inline constexpr int kLatentDim = 512;      // the first of them are also the value
inline constexpr int kFp8BlockBytes = 656;  // of a row of kFp8Block: 512, four scales, 64 bfloat16
inline constexpr int kRowTile = 64;         // query rows of a CTA of the wide kernel
inline constexpr int kNarrowRows = 16;      // of the narrow one
inline constexpr int kFp8FewRows = 32;      // of the one for FP8 caches; or kRowTile
inline constexpr int kPartialRows = 16;     // partial results: tiles of so many rows
inline constexpr int kPartialColumns = 8;   // and columns
inline constexpr int kPartialStrips = kLatentDim / kPartialColumns;  // of a tile
inline constexpr int kPartialStats = kPartialRows + kPartialStrips;  // numbers beside a tile
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;  // natural logarithms from base 2

enum class DType { kBFloat16, kFloat16 };
// Of a row of the cache: values of the queries' type, 576 e4m3 values, or 512 of them, four float32
// scales and 64 bfloat16 values (docs/fp8.md).
enum class KeyFormat { kPlain, kFp8PerTensor, kFp8Block };

// The query rows of a sequence and KV head are (s_q, heads per KV head), flattened: `num_rows`.
// Partial results, one per slot of num_splits and KV head, are in the order of accumulators, so
// that warps store and load whole lines: tiles of kPartialRows rows (the last one's may be more
// than there are), in them strips of eight columns, in them four numbers of each of 32 lanes. Lane
// i has, of rows i / 4 and i / 4 + 8, columns 2 (i % 4) and the next. Numbers are 16-bit floats,
// since an SM writes no more than some 34 bytes a cycle; each strip's over a power of two, since
// values may be of any size.
// Queries, keys, tile_scheduler_metadata, out and the partial results are aligned to 16 bytes.
struct DecodeParams {
  DType dtype;
  KeyFormat key_format;
  const void* q_nope;  // [groups, batch, s_q, h_q, q_nope_stride]: its first 512 columns
  const void* q_rope;  // [groups, batch, s_q, h_q, q_rope_stride]: its first 64 columns
  int q_nope_stride;
  int q_rope_stride;
  const void* k_cache;   // [groups, num_blocks, page_tokens, h_kv, key_stride]: the first columns
  const float* k_scale;  // [groups], of kFp8PerTensor: what its values are multiplied with
  const int32_t* block_table;              // [groups, batch, max_blocks]
  const int32_t* cache_seqlens;            // [groups, batch]
  const int32_t* tile_scheduler_metadata;  // [groups, num_parts, 8]
  const int32_t* num_splits;               // [groups, batch + 1]
  void* out;                               // [groups, batch, s_q, h_q, 512]
  float* lse;                              // [groups, batch, h_q, s_q]
  void* partial_out;  // [groups, slots, h_kv, partial_tiles, kPartialStrips, 32, 4]
  // [groups, slots, h_kv, partial_tiles, kPartialStats]: rows' log-sum-exps of base 2, then what
  // strips are to be multiplied with.
  float* partial_stats;
  int groups;
  int batch;
  int s_q;
  int h_q;
  int h_kv;
  int num_blocks;
  int page_tokens;  // a power of two
  int key_stride;   // values, or bytes of kFp8Block; at least a row, whole 16 bytes
  int max_blocks;
  int num_parts;
  int slots;  // batch + num_parts - 1 at least
  float softmax_scale;
  float logits_soft_cap;  // scores become cap tanh(score / cap); 0: they stay
  int sliding_window;     // the last so many keys that a query may see; 0: all of them
  bool causal;

  __host__ __device__ int heads_per_kv() const { return h_q / h_kv; }
  __host__ __device__ int num_rows() const { return s_q * heads_per_kv(); }
  __host__ __device__ bool is_fp8() const { return key_format != KeyFormat::kPlain; }
  // Query rows of one CTA, and how many CTAs share a sequence's keys.
  __host__ __device__ int cta_rows() const { return has_few_rows() ? kFp8FewRows : kRowTile; }
  // From small pages, FP8 rows come into CTAs of few query rows only.
  __host__ __device__ bool has_few_rows() const {
    return is_fp8() && (num_rows() <= kFp8FewRows || page_tokens < kBlockTokens);
  }
  __host__ __device__ int row_tiles() const { return (num_rows() + cta_rows() - 1) / cta_rows(); }
  __host__ __device__ int partial_tiles() const {
    return (num_rows() + kPartialRows - 1) / kPartialRows;
  }
};

// Few query rows have a split kernel of their own, in which they are padded to so many.
inline bool is_narrow(const DecodeParams& p) { return p.num_rows() <= kNarrowRows; }

// Keys come by the copy engine from pages that hold whole blocks of the plan, and in the wide
// kernel also from smaller ones with so many tokens. From others they come row by row.
inline constexpr int kLeastCopiedPage = 16;
inline bool has_block_pages(const DecodeParams& p) { return p.page_tokens >= kBlockTokens; }
inline bool comes_by_rows(const DecodeParams& p) {
  const bool whole_blocks = is_narrow(p) || p.is_fp8();
  return p.page_tokens < (whole_blocks ? kBlockTokens : kLeastCopiedPage);
}

// Enqueues both kernels on the current device; returns the first error.
cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream);

// The two halves, for launch_decode; not with an empty batch.
cudaError_t launch_split(const DecodeParams& params, cudaStream_t stream);
cudaError_t launch_combine(const DecodeParams& params, cudaStream_t stream);

}  // namespace jax_flashmla
