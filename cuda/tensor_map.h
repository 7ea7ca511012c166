// Describes keys and queries to the bulk tensor copy engine (TMA).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/decode.h"

namespace jax_flashmla {

inline constexpr int kKeyBoxTiles = 2;  // of the larger box of keys
inline constexpr int kKeyQuarters = 4;  // of a block
inline constexpr int kSliceTokens = 8;  // of a slice: after so many rows the swizzle begins anew

// All boxes are of tiles 64 columns wide, swizzled by 128 bytes.
struct TensorMaps {
  // In the wide kernel only where keys come by the copy engine (see `comes_by_rows`).
  // k_cache, coordinates (column of a tile, token of the page, tile, KV head, page of all groups'),
  // boxes of a block's tokens, or a page's if that is smaller, and kKeyBoxTiles tiles, or one.
  // Other pages read as zeros. For the wide kernel, pages are cut into slices of kSliceTokens,
  // which take the place of pages: a box has as many as make up its tokens, and brings of each
  // slice the rows of the first tile, then those of the second.
  CUtensorMap keys;
  // The last has boxes of a block's tokens, too; those before, for the narrow kernel, of one to
  // three quarters of them.
  CUtensorMap key_tiles[kKeyQuarters];
  // All query rows, coordinates (column of a tile, row, tile), boxes of q_box_rows rows: as many of
  // a row tile as are always neighbours in memory; in the narrow kernel all 16 where they are, with
  // rows of others behind them. q_box_tiles: how many tiles a box of q_nope has.
  CUtensorMap q_nope;
  CUtensorMap q_rope;
  int q_box_rows;
  int q_box_tiles;
};

cudaError_t make_tensor_maps(const DecodeParams& params, TensorMaps* maps);

// Of an FP8 cache, coordinates (byte, token of the page, tile, KV head, page of all groups'), boxes
// of a block's tokens: all 512 latent bytes as four swizzled tiles of 128; the rotary columns as a
// tile of 128 bytes, or, of kFp8PerTensor, of 64; of kFp8Block also the 16 bytes of scales. Or, of
// kFp8Block with few query rows, whole rows (words for bytes).
struct Fp8TensorMaps {
  CUtensorMap rows;
  CUtensorMap latent;
  CUtensorMap rope;
  CUtensorMap scales;
};

cudaError_t make_fp8_tensor_maps(const DecodeParams& params, Fp8TensorMaps* maps);

}  // namespace jax_flashmla
