// The floor of a memory-bound decode: the same copies, and nothing else.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/decode.h"

namespace jax_flashmla {

// Copies every block of keys that the split kernel would, over the same grid of CTAs, into shared
// memory. Up to 64 query rows per KV head: one row tile. Reads bfloat16 or float16, writes nothing.
cudaError_t launch_load_floor(const DecodeParams& params, cudaStream_t stream);

}  // namespace jax_flashmla
