// Times launches the way a serving step runs them: captured in a CUDA graph and replayed.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <vector>

namespace jax_flashmla {

// Captures `launch` `launches` times into one graph, replays it `replays` times after one warm-up,
// and writes the microseconds per launch of each replay. Creates and destroys its own stream.
cudaError_t time_in_graph(const std::function<cudaError_t(cudaStream_t)>& launch, int launches,
                          int replays, std::vector<float>& microseconds);

}  // namespace jax_flashmla
