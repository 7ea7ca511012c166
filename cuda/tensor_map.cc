#include "cuda/tensor_map.h"

namespace jax_flashmla {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function through the runtime, so that nothing links against libcuda.
EncodeTiled encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  const bool ok = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return ok ? reinterpret_cast<EncodeTiled>(function) : nullptr;
}

}  // namespace

cudaError_t make_pool_map(const DecodeParams& p, CUtensorMap* map) {
  static const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  constexpr cuuint32_t kRank = 5;
  constexpr cuuint64_t kRowBytes = kHeadDim * 2;
  const cuuint64_t h_kv = p.h_kv;
  const cuuint64_t page_bytes = 64 * h_kv * kRowBytes;
  const cuuint64_t extents[kRank] = {kHeadDim, 64, h_kv, static_cast<cuuint64_t>(p.num_blocks),
                                     static_cast<cuuint64_t>(p.groups)};
  const cuuint64_t strides[kRank - 1] = {h_kv * kRowBytes, kRowBytes, page_bytes,
                                         page_bytes * p.num_blocks};
  const cuuint32_t box[kRank] = {64, 64, 1, 1, 1};
  const cuuint32_t steps[kRank] = {1, 1, 1, 1, 1};
  const auto type = p.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(map, type, kRank, const_cast<void*>(p.k_cache), extents, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace jax_flashmla
