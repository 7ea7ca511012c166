// The parameters as the decode kernels take them.
#pragma once

#include <cutlass/fast_math.h>

#include <algorithm>
#include <bit>

#include "cuda/decode.h"

namespace jax_flashmla {

// With what would otherwise be divisions, of some hundred cycles each before the first load.
struct KernelParams : DecodeParams {
  cutlass::FastDivmod by_heads_per_kv;
  cutlass::FastDivmod by_num_rows;
  cutlass::FastDivmod by_partial_tiles;
  cutlass::FastDivmod by_row_tiles;
  cutlass::FastDivmod by_h_kv;
  cutlass::FastDivmod by_num_parts;
  cutlass::FastDivmod by_batch;
  int page_shift;   // a page has two to so many blocks; where keys come row by row, tokens
  int parts;        // of a block, each in a page of its own
  int max_tokens;   // that the table can hold of a sequence
  int head_bytes;   // from a KV head's row of a token to the next one's
  int row_bytes;    // from a token's row to the next one's
  int most_hidden;  // keys at the end that the first query token does not see
  int window;       // the sliding window, or more keys than there are
  // What products of queries and keys are multiplied with, for scores of base 2; with a cap, first
  // for the exponent of its hyperbolic tangent, and then the tangent.
  float score_scale;
  float cap_scale;

  KernelParams(const DecodeParams& p)
      : DecodeParams(p),
        by_heads_per_kv(p.heads_per_kv()),
        by_num_rows(p.num_rows()),
        by_partial_tiles(p.partial_tiles()),
        by_row_tiles(p.row_tiles()),
        by_h_kv(p.h_kv),
        by_num_parts(p.num_parts),
        by_batch(p.batch),
        page_shift(std::countr_zero(static_cast<unsigned>(
            comes_by_rows(p) ? p.page_tokens : std::max(p.page_tokens / kBlockTokens, 1)))),
        parts(has_block_pages(p) ? 1 : kBlockTokens / p.page_tokens),
        max_tokens(p.max_blocks * p.page_tokens),
        head_bytes(p.key_stride * (p.is_fp8() ? 1 : 2)),
        row_bytes(p.h_kv * head_bytes),
        most_hidden(p.causal ? p.s_q - 1 : 0),
        window(p.sliding_window > 0 ? p.sliding_window : 1 << 30),
        score_scale((p.logits_soft_cap > 0 ? p.logits_soft_cap : p.softmax_scale) * kLog2E),
        cap_scale(p.logits_soft_cap > 0 ? p.softmax_scale / p.logits_soft_cap * 2 * kLog2E : 0) {}

  __device__ int heads_per_kv() const { return by_heads_per_kv.divisor; }
  __device__ int num_rows() const { return by_num_rows.divisor; }
  __device__ int row_tiles() const { return by_row_tiles.divisor; }
  __device__ int partial_tiles() const { return by_partial_tiles.divisor; }
};

}  // namespace jax_flashmla
