// How the kernels of a decode are launched.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace jax_flashmla {

// Older drivers cannot capture a dependent launch into a graph.
inline bool driver_has_dependent_launches() {
  static const bool has = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12030;
  }();
  return has;
}

struct LaunchShape {
  int64_t ctas;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;
};

// Above 48 KB a kernel must be told how much shared memory it may have: once on every device, since
// that takes as long as a launch.
template <auto kKernel>
cudaError_t allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> told = 0;  // a bit for each of the first devices
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (told & bit) return cudaSuccess;
  error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) told |= bit;
  return error;
}

// Launches a kernel that may begin before the one before it in the stream has ended: it waits for
// that, see below.
template <auto kKernel, typename... Arguments>
cudaError_t launch_dependent(const LaunchShape& shape, cudaStream_t stream,
                             const Arguments&... arguments) {
  if (shape.ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shape.shared_bytes > 0) {
    const cudaError_t error = allow_shared_memory<kKernel>(shape.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.ctas));
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = driver_has_dependent_launches() ? 2 : 1;
  return cudaLaunchKernelEx(&config, kKernel, arguments...);
}

// What all threads of such a kernel call before they touch memory that others write: from then on,
// all before it in the stream is done. Until then, they can only get ready. Only then may the next
// kernel take its place on an SM that has no more work, and not before: the combine kernel relies
// on that when it reads the plan before its own wait. (What comes after the combine kernel relies
// on nothing, and may come earlier.)
__device__ __forceinline__ void wait_for_kernel_before() {
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
}

// The same, with an address, not null, that is computed before: the assembler would put what does
// not depend on the wait behind it, and the wait depends on the address.
__device__ __forceinline__ void wait_for_kernel_before(const void* address) {
  asm volatile(
      "{\n\t"
      ".reg .pred is_there;\n\t"
      "setp.ne.u64 is_there, %0, 0;\n\t"
      "@is_there griddepcontrol.wait;\n\t"
      "}"
      :
      : "l"(address)
      : "memory");
  cudaTriggerProgrammaticLaunchCompletion();
}

}  // namespace jax_flashmla
