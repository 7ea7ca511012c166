#include "cuda/tensor_map.h"

#include <algorithm>

namespace jax_flashmla {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function through the runtime, so that nothing links against libcuda.
EncodeTiled encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  const bool ok = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return ok ? reinterpret_cast<EncodeTiled>(function) : nullptr;
}

CUtensorMapDataType type_of(DType dtype) {
  return dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// Swizzled by as many bytes as a box's rows have, or not at all.
template <int kRank>
cudaError_t make_map(CUtensorMapDataType type, const void* data, const cuuint64_t (&extents)[kRank],
                     const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank],
                     CUtensorMap* map, CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  static const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint32_t steps[kRank];
  for (cuuint32_t& step : steps) step = 1;
  const CUresult result =
      encode(map, type, kRank, const_cast<void*>(data), extents, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// For boxes of so many tiles, and of so many of a block's tokens.
cudaError_t make_key_map(const DecodeParams& p, cuuint32_t tiles, cuuint32_t block_tokens,
                         CUtensorMap* map) {
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(p.key_stride) * 2;
  const cuuint32_t page_tokens = p.page_tokens;
  const cuuint32_t tokens = std::min(page_tokens, block_tokens);  // of a box
  // Of what the map takes for a page, and of as much of that as a box has.
  const cuuint32_t page =
      is_narrow(p) ? page_tokens : std::min<cuuint32_t>(page_tokens, kSliceTokens);
  const cuuint32_t rows = std::min(tokens, page);
  const cuuint64_t h_kv = p.h_kv;
  const cuuint64_t pages = static_cast<cuuint64_t>(p.groups) * p.num_blocks * (page_tokens / page);
  return make_map<5>(type_of(p.dtype), p.k_cache, {64, page, kHeadDim / 64, h_kv, pages},
                     {h_kv * row_bytes, 128, row_bytes, page * h_kv * row_bytes},
                     {64, rows, tiles, 1, tokens / rows}, map);
}

cudaError_t make_key_maps(const DecodeParams& p, TensorMaps* maps) {
  cudaError_t error = make_key_map(p, kKeyBoxTiles, kBlockTokens, &maps->keys);
  for (int i = is_narrow(p) ? 1 : kKeyQuarters; i <= kKeyQuarters && error == cudaSuccess; ++i) {
    error = make_key_map(p, 1, kBlockTokens / kKeyQuarters * i, &maps->key_tiles[i - 1]);
  }
  return error;
}

int query_box_rows(const DecodeParams& p) {
  if (p.h_kv == 1 || p.s_q == 1) {
    return is_narrow(p) ? kNarrowRows : p.num_rows() < kRowTile ? p.num_rows() : kRowTile;
  }
  int rows = kRowTile;  // the largest power of two that divides heads_per_kv
  while (p.heads_per_kv() % rows != 0) rows /= 2;
  return rows;
}

// `tiles`: how many there are, and in a box.
cudaError_t make_query_map(const DecodeParams& p, const void* data, int stride, int tiles,
                           int box_tiles, CUtensorMap* map) {
  const cuuint64_t rows = static_cast<cuuint64_t>(p.groups) * p.batch * p.s_q * p.h_q;
  return make_map<3>(
      type_of(p.dtype), data, {64, rows, static_cast<cuuint64_t>(tiles)},
      {static_cast<cuuint64_t>(stride) * 2, 128},
      {64, static_cast<cuuint32_t>(query_box_rows(p)), static_cast<cuuint32_t>(box_tiles)}, map);
}

}  // namespace

cudaError_t make_tensor_maps(const DecodeParams& p, TensorMaps* maps) {
  constexpr int kNopeTiles = kLatentDim / 64;
  maps->q_box_rows = query_box_rows(p);
  maps->q_box_tiles = is_narrow(p) && maps->q_box_rows == kNarrowRows ? kNopeTiles : 1;
  cudaError_t error = cudaSuccess;
  // The narrow kernel prefetches them wherever its keys come from.
  if (is_narrow(p) || !comes_by_rows(p)) error = make_key_maps(p, maps);
  if (error == cudaSuccess) {
    error =
        make_query_map(p, p.q_nope, p.q_nope_stride, kNopeTiles, maps->q_box_tiles, &maps->q_nope);
  }
  if (error == cudaSuccess) {
    error = make_query_map(p, p.q_rope, p.q_rope_stride, 1, 1, &maps->q_rope);
  }
  return error;
}

cudaError_t make_fp8_tensor_maps(const DecodeParams& p, Fp8TensorMaps* maps) {
  const bool blocks = p.key_format == KeyFormat::kFp8Block;
  const cuuint64_t row = p.key_stride;
  const cuuint64_t page = p.page_tokens;
  const cuuint64_t h_kv = p.h_kv;
  const cuuint64_t pages = static_cast<cuuint64_t>(p.groups) * p.num_blocks;
  // Of a block's tokens all columns from a byte of the row on: `tiles` of 128 bytes or, of one,
  // any.
  const auto make = [&](CUtensorMapDataType type, int first_byte, cuuint32_t columns,
                        cuuint32_t tiles, CUtensorMapSwizzle swizzle, CUtensorMap* map) {
    return make_map<5>(type, static_cast<const char*>(p.k_cache) + first_byte,
                       {columns, page, tiles, h_kv, pages},
                       {h_kv * row, 128, row, page * h_kv * row},
                       {columns, kBlockTokens, tiles, 1, 1}, map, swizzle);
  };
  constexpr auto kBytes = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  constexpr auto kWords = CU_TENSOR_MAP_DATA_TYPE_INT32;
  constexpr auto kAsTheyLie = CU_TENSOR_MAP_SWIZZLE_NONE;
  constexpr auto kSwizzled = CU_TENSOR_MAP_SWIZZLE_128B;
  if (blocks && is_narrow(p)) {
    return make(kWords, 0, kFp8BlockBytes / 4, 1, kAsTheyLie, &maps->rows);
  }
  cudaError_t error = make(kBytes, 0, 128, kLatentDim / 128, kSwizzled, &maps->latent);
  if (error != cudaSuccess) return error;
  if (!blocks) return make(kBytes, kLatentDim, 64, 1, CU_TENSOR_MAP_SWIZZLE_64B, &maps->rope);
  error = make(kBytes, kFp8BlockBytes - 128, 128, 1, kSwizzled, &maps->rope);
  if (error != cudaSuccess) return error;
  return make(kBytes, kLatentDim, 16, 1, kAsTheyLie, &maps->scales);
}

}  // namespace jax_flashmla
