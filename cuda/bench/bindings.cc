#include "cuda/bench/bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/bench/graph_timer.h"
#include "cuda/bench/load_floor.h"
#include "cuda/decode.h"
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
                             int min_split_blocks, int split_cost_blocks, int launches,
                             int replays) {
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
      .split_cost_blocks = split_cost_blocks,
      .max_blocks = max_balanced_blocks(static_cast<int>(batch), overhead_blocks),
  };
  std::vector<float> microseconds;
  check(time_in_graph([&](cudaStream_t stream) { return launch_plan(params, stream); }, launches,
                      replays, microseconds));
  return microseconds;
}

// Times decode on device arrays that the caller keeps alive, given by their addresses
// (jax.Array.unsafe_buffer_pointer) in the order q, k_cache, block_table, cache_seqlens,
// tile_scheduler_metadata, num_splits, out, lse, partial_out, partial_stats, and, of an FP8 cache
// with one scale, k_scale. `key_format`: "plain", "fp8_per_tensor" or "fp8_block". One group, whole
// queries. `what`: "decode", its kernels "split" and "combine", or "floor". `copies`: how many q
// and out there are, one after the other; launches take them in turn.
std::vector<float> time_decode(const std::vector<uintptr_t>& operands, int batch, int s_q, int h_q,
                               int h_kv, int num_blocks, int max_blocks, int num_parts, int slots,
                               bool causal, const std::string& dtype, const std::string& what,
                               int launches, int replays, int copies, int page_tokens,
                               int key_stride, int sliding_window, float logits_soft_cap,
                               const std::string& key_format) {
  const KeyFormat format = key_format == "fp8_per_tensor" ? KeyFormat::kFp8PerTensor
                           : key_format == "fp8_block"    ? KeyFormat::kFp8Block
                                                          : KeyFormat::kPlain;
  if (format == KeyFormat::kPlain && key_format != "plain") {
    throw std::invalid_argument("key_format: " + key_format);
  }
  const bool scaled = format == KeyFormat::kFp8PerTensor;
  if (operands.size() != (scaled ? 11 : 10))
    throw std::invalid_argument("a wrong number of arrays");
  if (dtype != "bfloat16" && dtype != "float16") throw std::invalid_argument("dtype: " + dtype);
  const auto pointer = [&](int i) { return reinterpret_cast<void*>(operands[i]); };
  const auto ints = [&](int i) { return static_cast<const int32_t*>(pointer(i)); };
  const DecodeParams params = {
      .dtype = dtype == "bfloat16" ? DType::kBFloat16 : DType::kFloat16,
      .key_format = format,
      .q_nope = pointer(0),
      .q_rope = static_cast<const uint16_t*>(pointer(0)) + kLatentDim,
      .q_nope_stride = kHeadDim,
      .q_rope_stride = kHeadDim,
      .k_cache = pointer(1),
      .k_scale = scaled ? static_cast<const float*>(pointer(10)) : nullptr,
      .block_table = ints(2),
      .cache_seqlens = ints(3),
      .tile_scheduler_metadata = ints(4),
      .num_splits = ints(5),
      .out = pointer(6),
      .lse = static_cast<float*>(pointer(7)),
      .partial_out = pointer(8),
      .partial_stats = static_cast<float*>(pointer(9)),
      .groups = 1,
      .batch = batch,
      .s_q = s_q,
      .h_q = h_q,
      .h_kv = h_kv,
      .num_blocks = num_blocks,
      .page_tokens = page_tokens,
      .key_stride = key_stride,
      .max_blocks = max_blocks,
      .num_parts = num_parts,
      .slots = slots,
      .softmax_scale = 1.0f / 24,
      .logits_soft_cap = logits_soft_cap,
      .sliding_window = sliding_window,
      .causal = causal,
  };
  std::vector<float> microseconds;
  cudaError_t (*launch)(const DecodeParams&, cudaStream_t) = nullptr;
  if (what == "decode") launch = launch_decode;
  if (what == "split") launch = launch_split;
  if (what == "combine") launch = launch_combine;
  if (what == "floor") launch = launch_load_floor;
  if (launch == nullptr) throw std::invalid_argument("unknown: " + what);
  int launched = 0;
  const auto enqueue = [&](cudaStream_t stream) {
    DecodeParams turn = params;
    const int64_t rows = int64_t{batch} * s_q * h_q * (launched++ % copies);
    turn.q_nope = static_cast<const uint16_t*>(params.q_nope) + rows * kHeadDim;
    turn.q_rope = static_cast<const uint16_t*>(params.q_rope) + rows * kHeadDim;
    turn.out = static_cast<uint16_t*>(params.out) + rows * kLatentDim;
    return launch(turn, stream);
  };
  check(time_in_graph(enqueue, launches, replays, microseconds));
  return microseconds;
}

}  // namespace

void bind_benchmarks(nb::module_& module) {
  using namespace nb::literals;
  module.def("time_plan", &time_plan, "cache_seqlens"_a, nb::kw_only(), "num_parts"_a,
             "overhead_blocks"_a, "min_split_blocks"_a, "split_cost_blocks"_a, "launches"_a,
             "replays"_a,
             "Microseconds per launch of the planner, one sample per replay of a CUDA graph.");
  module.def("time_decode", &time_decode, "operands"_a, nb::kw_only(), "batch"_a, "s_q"_a, "h_q"_a,
             "h_kv"_a, "num_blocks"_a, "max_blocks"_a, "num_parts"_a, "slots"_a, "causal"_a,
             "dtype"_a = "bfloat16", "what"_a, "launches"_a, "replays"_a, "copies"_a = 1,
             "page_tokens"_a = 64, "key_stride"_a = 576, "sliding_window"_a = 0,
             "logits_soft_cap"_a = 0.0f, "key_format"_a = "plain",
             nb::call_guard<nb::gil_scoped_release>(),
             "Microseconds per decode, one sample per replay of a CUDA graph.");
}

}  // namespace jax_flashmla
