// Describes the page pool to the bulk tensor copy engine (TMA).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/decode.h"

namespace jax_flashmla {

// A map of k_cache with coordinates (column, token of the page, KV head, page, group) and boxes of
// 64 tokens x 64 columns, swizzled by 128 bytes. A page id outside the pool reads as zeros.
cudaError_t make_pool_map(const DecodeParams& params, CUtensorMap* map);

}  // namespace jax_flashmla
