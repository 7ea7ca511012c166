#include <string>

#include "cuda/decode.h"
#include "cuda/ffi/handlers.h"
#include "cuda/plan.h"
#include "xla/ffi/api/ffi.h"

namespace jax_flashmla {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kLimit = 1 << 30;
constexpr int64_t kLargestPage = 1024;  // tokens

// Bytes of a row that the kernels read, and of a value.
struct Row {
  int64_t bytes, value_bytes;
};
constexpr Row row_of(KeyFormat format) {
  switch (format) {
    case KeyFormat::kFp8PerTensor:
      return {kHeadDim, 1};
    case KeyFormat::kFp8Block:
      return {kFp8BlockBytes, 1};
    case KeyFormat::kPlain:
      return {2 * kHeadDim, 2};
  }
  return {0, 0};
}

bool has_shape(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> expected) {
  const auto dimensions = buffer.dimensions();
  return std::equal(dimensions.begin(), dimensions.end(), expected.begin(), expected.end());
}

// A whole query comes twice, as q_nope and q_rope; a pair as it is.
// Shapes were checked in Python; here again what keeps the kernels inside their buffers.
ffi::Error decode(cudaStream_t stream, ffi::AnyBuffer q_nope, ffi::AnyBuffer q_rope,
                  ffi::AnyBuffer k_cache, ffi::AnyBuffer k_scale, ffi::AnyBuffer block_table,
                  ffi::AnyBuffer cache_seqlens, ffi::AnyBuffer tile_scheduler_metadata,
                  ffi::AnyBuffer num_splits, float softmax_scale, float logits_soft_cap,
                  int32_t sliding_window, bool causal, ffi::Result<ffi::AnyBuffer> out,
                  ffi::Result<ffi::AnyBuffer> lse, ffi::Result<ffi::AnyBuffer> partial_out,
                  ffi::Result<ffi::AnyBuffer> partial_stats) {
  const auto misfit = [](const char* what) {
    return ffi::Error::InvalidArgument(std::string("jax_flashmla_decode: ") + what);
  };
  const auto q = q_nope.dimensions();
  const auto cache = k_cache.dimensions();
  const auto table = block_table.dimensions();
  const auto metadata = tile_scheduler_metadata.dimensions();
  const auto partial = partial_stats->dimensions();
  if (q.size() != 5 || cache.size() != 5 || table.size() != 3 || metadata.size() != 3 ||
      partial.size() != 5) {
    return misfit("ranks do not fit");
  }
  const int64_t groups = q[0], batch = q[1], s_q = q[2], h_q = q[3], width = q[4];
  const int64_t h_kv = cache[3], slots = partial[1];
  for (const auto& dimensions : {q, cache, table, metadata, partial}) {
    for (const int64_t extent : dimensions) {
      if (extent < 0 || extent >= kLimit) return misfit("an extent is too large");
    }
  }
  if (h_kv == 0 || s_q == 0 || h_q == 0 || h_q % h_kv != 0 || cache[1] == 0 || metadata[1] == 0) {
    return misfit("an extent is zero, or h_q no multiple of h_kv");
  }
  const auto dtype = q_nope.element_type(), key_type = k_cache.element_type();
  const KeyFormat format = key_type == ffi::F8E4M3FN ? KeyFormat::kFp8PerTensor
                           : key_type == ffi::U8     ? KeyFormat::kFp8Block
                                                     : KeyFormat::kPlain;
  const Row row = row_of(format);
  const int64_t page = cache[2], key_bytes = cache[4] * row.value_bytes;
  const bool page_fits = page >= 1 && page <= kLargestPage && (page & (page - 1)) == 0 &&
                         groups * cache[1] < 2 * kLimit / page;  // rows, of 31 bits
  const bool whole = width == kHeadDim;
  const int64_t tiles = (s_q * (h_q / h_kv) + kPartialRows - 1) / kPartialRows;
  const bool shapes_fit =
      (whole ? has_shape(q_rope, {groups, batch, s_q, h_q, kHeadDim})
             : width == kLatentDim &&
                   has_shape(q_rope, {groups, batch, s_q, h_q, kHeadDim - kLatentDim})) &&
      has_shape(k_cache, {groups, cache[1], page, h_kv, cache[4]}) && page_fits &&
      key_bytes >= row.bytes && key_bytes % 16 == 0 && h_kv * key_bytes < kLimit &&
      has_shape(k_scale, {format == KeyFormat::kFp8PerTensor ? groups : 0}) &&
      has_shape(block_table, {groups, batch, table[2]}) &&
      has_shape(cache_seqlens, {groups, batch}) &&
      has_shape(tile_scheduler_metadata, {groups, metadata[1], kMetadataColumns}) &&
      has_shape(num_splits, {groups, batch + 1}) &&
      has_shape(*out, {groups, batch, s_q, h_q, kLatentDim}) &&
      has_shape(*lse, {groups, batch, h_q, s_q}) &&
      has_shape(*partial_out, {groups, slots, h_kv, tiles, kPartialRows * kLatentDim}) &&
      has_shape(*partial_stats, {groups, slots, h_kv, tiles, kPartialStats}) &&
      slots >= batch + metadata[1] - 1 && table[2] < kLimit / page;
  if (!shapes_fit) return misfit("shapes do not fit");
  if (logits_soft_cap < 0 || sliding_window < 0) return misfit("a cap or window is negative");
  // With the keys that a causal mask hides it is to fit an int.
  if (sliding_window > kLimit) return misfit("a window is larger than any table");

  const bool types_fit =
      (dtype == ffi::BF16 || dtype == ffi::F16) && q_rope.element_type() == dtype &&
      (format != KeyFormat::kPlain || key_type == dtype) && k_scale.element_type() == ffi::F32 &&
      out->element_type() == dtype && block_table.element_type() == ffi::S32 &&
      cache_seqlens.element_type() == ffi::S32 &&
      tile_scheduler_metadata.element_type() == ffi::S32 && num_splits.element_type() == ffi::S32 &&
      lse->element_type() == ffi::F32 && partial_out->element_type() == ffi::F16 &&
      partial_stats->element_type() == ffi::F32;
  if (!types_fit) return misfit("dtypes do not fit");

  const auto* rope = static_cast<const uint16_t*>(q_rope.untyped_data());
  const DecodeParams params = {
      .dtype = dtype == ffi::BF16 ? DType::kBFloat16 : DType::kFloat16,
      .key_format = format,
      .q_nope = q_nope.untyped_data(),
      .q_rope = whole ? rope + kLatentDim : rope,
      .q_nope_stride = static_cast<int>(width),
      .q_rope_stride = whole ? kHeadDim : kHeadDim - kLatentDim,
      .k_cache = k_cache.untyped_data(),
      .k_scale = static_cast<const float*>(k_scale.untyped_data()),
      .block_table = static_cast<const int32_t*>(block_table.untyped_data()),
      .cache_seqlens = static_cast<const int32_t*>(cache_seqlens.untyped_data()),
      .tile_scheduler_metadata =
          static_cast<const int32_t*>(tile_scheduler_metadata.untyped_data()),
      .num_splits = static_cast<const int32_t*>(num_splits.untyped_data()),
      .out = out->untyped_data(),
      .lse = static_cast<float*>(lse->untyped_data()),
      .partial_out = partial_out->untyped_data(),
      .partial_stats = static_cast<float*>(partial_stats->untyped_data()),
      .groups = static_cast<int>(groups),
      .batch = static_cast<int>(batch),
      .s_q = static_cast<int>(s_q),
      .h_q = static_cast<int>(h_q),
      .h_kv = static_cast<int>(h_kv),
      .num_blocks = static_cast<int>(cache[1]),
      .page_tokens = static_cast<int>(page),
      .key_stride = static_cast<int>(cache[4]),
      .max_blocks = static_cast<int>(table[2]),
      .num_parts = static_cast<int>(metadata[1]),
      .slots = static_cast<int>(slots),
      .softmax_scale = softmax_scale,
      .logits_soft_cap = logits_soft_cap,
      .sliding_window = sliding_window,
      .causal = causal,
  };
  const cudaError_t error = launch_decode(params, stream);
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_flashmla_decode: ") + cudaGetErrorString(error));
}

}  // namespace
}  // namespace jax_flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flashmla_decode, jax_flashmla::decode,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // q_nope
                                  .Arg<xla::ffi::AnyBuffer>()  // q_rope
                                  .Arg<xla::ffi::AnyBuffer>()  // k_cache
                                  .Arg<xla::ffi::AnyBuffer>()  // k_scale
                                  .Arg<xla::ffi::AnyBuffer>()  // block_table
                                  .Arg<xla::ffi::AnyBuffer>()  // cache_seqlens
                                  .Arg<xla::ffi::AnyBuffer>()  // tile_scheduler_metadata
                                  .Arg<xla::ffi::AnyBuffer>()  // num_splits
                                  .Attr<float>("softmax_scale")
                                  .Attr<float>("logits_soft_cap")
                                  .Attr<int32_t>("sliding_window")
                                  .Attr<bool>("causal")
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Ret<xla::ffi::AnyBuffer>()  // lse
                                  .Ret<xla::ffi::AnyBuffer>()  // partial_out: workspace
                                  .Ret<xla::ffi::AnyBuffer>()  // partial_stats: workspace
                              ,
                              {xla::ffi::Traits::kCmdBufferCompatible});
