// Describes keys and queries to the bulk tensor copy engine (TMA).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/decode.h"

namespace jax_flashmla {

// All boxes are 64 columns wide and swizzled by 128 bytes.
struct TensorMaps {
  // k_cache, coordinates (column, token of the page, KV head, page, group), boxes of 64 tokens. A
  // page id outside the pool reads as zeros.
  CUtensorMap keys;
  // All query rows, coordinates (column, row), boxes of q_box_rows rows: as many of a row tile as
  // are always neighbours in memory.
  CUtensorMap q_nope;
  CUtensorMap q_rope;
  int q_box_rows;
};

cudaError_t make_tensor_maps(const DecodeParams& params, TensorMaps* maps);

}  // namespace jax_flashmla
