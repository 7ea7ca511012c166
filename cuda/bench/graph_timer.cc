#include "cuda/bench/graph_timer.h"

#include <cstddef>

namespace jax_flashmla {
namespace {

// Owns what a measurement creates, so that every early return releases it.
struct Resources {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;

  ~Resources() {
    if (begin) cudaEventDestroy(begin);
    if (end) cudaEventDestroy(end);
    if (exec) cudaGraphExecDestroy(exec);
    if (graph) cudaGraphDestroy(graph);
    if (stream) cudaStreamDestroy(stream);
  }
};

#define RETURN_IF_ERROR(call)                             \
  if (cudaError_t error = (call); error != cudaSuccess) { \
    return error;                                         \
  }

}  // namespace

cudaError_t time_in_graph(const std::function<cudaError_t(cudaStream_t)>& launch, int launches,
                          int replays, std::vector<float>& microseconds) {
  Resources r;
  RETURN_IF_ERROR(cudaStreamCreateWithFlags(&r.stream, cudaStreamNonBlocking));
  RETURN_IF_ERROR(cudaEventCreate(&r.begin));
  RETURN_IF_ERROR(cudaEventCreate(&r.end));

  RETURN_IF_ERROR(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal));
  cudaError_t launched = cudaSuccess;
  for (int i = 0; i < launches && launched == cudaSuccess; ++i) launched = launch(r.stream);
  RETURN_IF_ERROR(cudaStreamEndCapture(r.stream, &r.graph));
  RETURN_IF_ERROR(launched);
  RETURN_IF_ERROR(cudaGraphInstantiate(&r.exec, r.graph, 0));

  RETURN_IF_ERROR(cudaGraphLaunch(r.exec, r.stream));
  microseconds.assign(static_cast<size_t>(replays), 0.0f);
  for (float& sample : microseconds) {
    RETURN_IF_ERROR(cudaEventRecord(r.begin, r.stream));
    RETURN_IF_ERROR(cudaGraphLaunch(r.exec, r.stream));
    RETURN_IF_ERROR(cudaEventRecord(r.end, r.stream));
    RETURN_IF_ERROR(cudaEventSynchronize(r.end));
    float milliseconds = 0;
    RETURN_IF_ERROR(cudaEventElapsedTime(&milliseconds, r.begin, r.end));
    sample = milliseconds * 1000.0f / static_cast<float>(launches);
  }
  return cudaSuccess;
}

}  // namespace jax_flashmla
