// The split kernel for FP8 caches; see decode.h.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/decode.h"

namespace jax_flashmla {

// With params.is_fp8() only.
cudaError_t launch_fp8_split(const DecodeParams& params, cudaStream_t stream);

}  // namespace jax_flashmla
