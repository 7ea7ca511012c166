#include "cuda/bench/bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/bench/graph_timer.h"
#include "cuda/plan.h"

namespace nb = nanobind;

namespace jax_flashmla {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Device memory that is freed on every way out.
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(int32_t)));
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  int32_t* data() const { return data_; }

 private:
  int32_t* data_ = nullptr;
};

using HostLengths = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<float> time_plan(HostLengths cache_seqlens, int num_parts, int overhead_blocks,
                             int min_split_blocks, int max_blocks, int launches, int replays) {
  const size_t batch = cache_seqlens.shape(0);
  const DeviceArray lengths(batch);
  const DeviceArray metadata(static_cast<size_t>(num_parts) * kMetadataColumns);
  const DeviceArray splits(batch + 1);
  check(cudaMemcpy(lengths.data(), cache_seqlens.data(), batch * sizeof(int32_t),
                   cudaMemcpyHostToDevice));
  const PlanParams params = {
      .cache_seqlens = lengths.data(),
      .tile_scheduler_metadata = metadata.data(),
      .num_splits = splits.data(),
      .groups = 1,
      .batch = static_cast<int>(batch),
      .num_parts = num_parts,
      .overhead_blocks = overhead_blocks,
      .min_split_blocks = min_split_blocks,
      .max_blocks = max_blocks,
  };
  std::vector<float> microseconds;
  check(time_in_graph([&](cudaStream_t stream) { return launch_plan(params, stream); }, launches,
                      replays, microseconds));
  return microseconds;
}

}  // namespace

void bind_benchmarks(nb::module_& module) {
  using namespace nb::literals;
  module.def("time_plan", &time_plan, "cache_seqlens"_a, nb::kw_only(), "num_parts"_a,
             "overhead_blocks"_a, "min_split_blocks"_a, "max_blocks"_a, "launches"_a, "replays"_a,
             "Microseconds per launch of the planner, one sample per replay of a CUDA graph.");
}

}  // namespace jax_flashmla
