// The split kernel for few query rows; see decode.h.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/decode.h"
#include "cuda/tensor_map.h"

namespace jax_flashmla {

// With is_narrow(params) only.
cudaError_t launch_narrow_split(const DecodeParams& params, const TensorMaps& maps,
                                cudaStream_t stream);

}  // namespace jax_flashmla
