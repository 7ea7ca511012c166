#include <string>

#include "cuda/ffi/handlers.h"
#include "cuda/plan.h"
#include "xla/ffi/api/ffi.h"

namespace jax_flashmla {
namespace {

namespace ffi = xla::ffi;

// Shapes were checked in Python; here again what keeps the kernel inside its buffers.
ffi::Error plan(cudaStream_t stream, ffi::Buffer<ffi::S32> cache_seqlens, int32_t overhead_blocks,
                int32_t min_split_blocks, int32_t split_cost_blocks,
                ffi::ResultBuffer<ffi::S32> tile_scheduler_metadata,
                ffi::ResultBuffer<ffi::S32> num_splits) {
  const auto lengths = cache_seqlens.dimensions();
  const auto metadata = tile_scheduler_metadata->dimensions();
  const auto splits = num_splits->dimensions();
  constexpr int64_t kLimit = 1 << 30;
  const bool shapes_fit = lengths.size() == 2 && metadata.size() == 3 && splits.size() == 2 &&
                          metadata[0] == lengths[0] && splits[0] == lengths[0] &&
                          splits[1] == lengths[1] + 1 && metadata[1] > 0 &&
                          metadata[2] == kMetadataColumns && lengths[0] < kLimit &&
                          lengths[1] < kLimit && metadata[1] < kLimit;
  if (!shapes_fit) return ffi::Error::InvalidArgument("jax_flashmla_plan: shapes do not fit");
  if (overhead_blocks < 0 || min_split_blocks < 1 || split_cost_blocks < 0) {
    return ffi::Error::InvalidArgument("jax_flashmla_plan: attributes out of range");
  }

  const PlanParams params = {
      .cache_seqlens = cache_seqlens.typed_data(),
      .tile_scheduler_metadata = tile_scheduler_metadata->typed_data(),
      .num_splits = num_splits->typed_data(),
      .groups = static_cast<int>(lengths[0]),
      .batch = static_cast<int>(lengths[1]),
      .num_parts = static_cast<int>(metadata[1]),
      .overhead_blocks = overhead_blocks,
      .min_split_blocks = min_split_blocks,
      .split_cost_blocks = split_cost_blocks,
      .max_blocks = max_balanced_blocks(static_cast<int>(lengths[1]), overhead_blocks),
  };
  const cudaError_t error = launch_plan(params, stream);
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_flashmla_plan: ") + cudaGetErrorString(error));
}

}  // namespace
}  // namespace jax_flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flashmla_plan, jax_flashmla::plan,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // cache_seqlens
                                  .Attr<int32_t>("overhead_blocks")
                                  .Attr<int32_t>("min_split_blocks")
                                  .Attr<int32_t>("split_cost_blocks")
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()  // metadata
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()  // num_splits
                              ,
                              {xla::ffi::Traits::kCmdBufferCompatible});
