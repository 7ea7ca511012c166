// What the roles of the split kernel for FP8 caches share: the shared memory plan, and how numbers
// become two e4m3 pieces. The formats are drawn in docs/fp8.md, the schedule in cuda/README.md.
#pragma once

#include <cutlass/numeric_types.h>

#include "cuda/decode_gather.cuh"
#include "cuda/decode_store.cuh"

namespace jax_flashmla {

using E4M3 = cutlass::float_e4m3_t;

inline constexpr int kFp8Tiles = kLatentDim / 128;  // of 128 bytes a row: a scale's columns each
inline constexpr int kScaleBytes = kFp8Tiles * 4;   // of a row of fp8_block
inline constexpr int kScaleWarps = 2;               // of the loader, that prepare scales

// Whether scores are computed transposed, keys as rows and query rows as columns
// (decode_fp8_turned.cuh).
template <int kRows>
inline constexpr bool kTurned = kRows == kNarrowRows;

// Where they are not, a thread of the scores has two keys of every eight: of a tile's scales, its
// 16 lie side by side. The stride lets four such threads read vectors of them from different banks.
inline constexpr int kScaleStride = kBlock / 4 + 4;
__device__ __forceinline__ int scale_slot(int key) {
  return key % 8 / 2 * kScaleStride + key / 8 * 2 + key % 2;
}

// Queries meet e4m3 keys as e4m3, so that the tensor cores need no wider copy of them: two pieces,
// of which the second is what the first leaves over, times 32. Together they have eight bits, as
// bfloat16 has. A product has 64 rows: of up to 32 query rows both pieces, which is two for each;
// else one, and there are twice as many products. Of the fewest query rows both are its columns.
inline constexpr int kPieces = 2;
inline constexpr float kLowPiece = 1.0f / 32;
static_assert(kPieces * kFp8FewRows == 64 && kRowTile == 64, "the rows of a warpgroup's product");

// The scales of a block of fp8_block, tile by tile as they are used. Those of a key that no query
// sees, and of rows of zeros where they are far from others, become zero.
struct alignas(128) BlockScales {
  // Values and weights are 16-bit floats, which have no room for what scales can be: they meet them
  // over a power of two that follows the largest.
  float base[kFp8Tiles];
  float inverse[kFp8Tiles];  // of that
  float rebase[kFp8Tiles];   // what the output so far is to be multiplied with
};
struct StraightScales : BlockScales {
  alignas(128) float raw[kBlock][kFp8Tiles];   // as they come
  float of_keys[kFp8Tiles][4 * kScaleStride];  // in the order of `scale_slot`
  // For the values, of two neighbouring keys over `base`, in the order of `pair_slot`.
  uint32_t pairs[kFp8Tiles][kBlock / 2];
};
struct TurnedScales : BlockScales {
  alignas(16) float of_keys[kBlock][kFp8Tiles];
};
struct NoScales {};

// A block of keys in tiles of 128 bytes a row, swizzled, as operands of the tensor cores.
template <bool kBlocks>
struct alignas(1024) TiledBlock {
  uint8_t latent[kFp8Tiles][kTileBytes];
  uint8_t rope[kBlocks ? kTileBytes : kTileBytes / 2];  // 64 e4m3 or bfloat16 values a row

  // Of a tile's columns, 16 bytes of a row.
  __device__ __forceinline__ uint128_t& vector(int tile, int row, int vector) {
    return vector_at(latent[tile], row, vector);
  }
  // The 128 of a row, in some order.
  __device__ __forceinline__ const uint8_t* line(int tile, int row) const {
    return latent[tile] + row * 128;
  }
};
// The same of fp8_block as it is in memory, for keys that reach the tensor cores through registers.
// The copy engine has less to do: of tiles, rows of 656 bytes share sectors of memory, 32 bytes,
// that it brings twice. Matrices of eight rows do not meet in banks: 656 is 16 more than whole
// lines of them.
struct alignas(128) RowsBlock {
  uint8_t rows[kBlock][kFp8BlockBytes];

  __device__ __forceinline__ uint128_t& vector(int tile, int row, int vector) {
    return reinterpret_cast<uint128_t*>(rows[row])[tile * 8 + vector];
  }
  __device__ __forceinline__ const uint8_t* line(int tile, int row) const {
    return rows[row] + tile * 128;
  }
};
static_assert(kFp8BlockBytes % 128 == 16);

// Queries as pieces, in the tiles of keys. The rotary columns of fp8_block are one.
template <bool kBlocks>
struct alignas(1024) ManyQueries {
  uint8_t latent[kPieces][kFp8Tiles][kTileBytes];
  uint8_t rope[kBlocks ? 1 : kPieces][kBlocks ? kTileBytes : kTileBytes / 2];
};
// Of turned products: the low pieces' rows behind those of the high ones.
template <bool kBlocks>
struct alignas(1024) TurnedQueries {
  uint8_t latent[kFp8Tiles][kPieces * kNarrowRows * 128];
  uint8_t rope[kBlocks ? kNarrowRows * 128 : kPieces * kNarrowRows * 64];
  // Of query rows, in the order of `row_slot`: what pieces are to be multiplied with; what every
  // warp has found of its keys.
  float scale[kNarrowRows];
  float tops[kWarps][kNarrowRows];
  float sums[kWarps][kNarrowRows];
};
struct NoQueries {};

// Threads write the weights, and wgmma reads them: who has more time puts the fence between.
template <int kRows>
inline constexpr bool kReaderFences = kRows != kRowTile;

template <int kRows, KeyFormat kFormat>
struct Fp8Memory {
  static constexpr bool kBlocks = kFormat == KeyFormat::kFp8Block;
  static constexpr bool kWholeRows = kTurned<kRows> && kBlocks;  // blocks are as in memory
  // Blocks of keys: as many as there is room for.
  static constexpr int kSlots = kRows == kRowTile ? 3 : kWholeRows ? 4 : 5;
  // Few weights have the scales of fp8_block multiplied in, each tile's, so that values need not.
  static constexpr int kWeights = kWholeRows ? kFp8Tiles : 1;
  using Queries =
      std::conditional_t<kTurned<kRows>, TurnedQueries<kBlocks>,
                         std::conditional_t<kRows == kRowTile, ManyQueries<kBlocks>, NoQueries>>;
  using Scales = std::conditional_t<!kBlocks, NoScales,
                                    std::conditional_t<kWholeRows, TurnedScales, StraightScales>>;
  using Block = std::conditional_t<kWholeRows, RowsBlock, TiledBlock<kBlocks>>;
  // Of a query row, in the order of `row_slot`.
  struct alignas(16) Factors {
    float rescale[kRows];  // of the output so far
    float inverse[kRows];  // of the sum, with an item's last block
    int rescaled[kWarps];  // whether `rescale` is not one for some row of a warp of the scores
  };
  Block blocks[kSlots];
  alignas(1024) half_t weights[2][kWeights][kRows * kBlock];  // [query row, key], swizzled
  Queries q;
  Scales scales[kSlots];
  Factors factors[2];
  GatherRows rows;
  Work work;
  FullBarrier full[kSlots];
  EmptyBarrier empty[kSlots];        // by the threads that multiply values
  EmptyBarrier scales_full[kSlots];  // of fp8_block, by the warps that prepare them
  EmptyBarrier weights_full[2];      // by those that compute scores
  EmptyBarrier weights_empty[2];
  EmptyBarrier work_known;  // `work` is there
  EmptyBarrier waited;      // the thread that copies keys has, for the kernel before

  // A key's scales, as they came.
  __device__ __forceinline__ const float* raw_scales(int slot, int key) const {
    if constexpr (kWholeRows) {
      return reinterpret_cast<const float*>(blocks[slot].rows[key] + kLatentDim);
    } else {
      return scales[slot].raw[key];
    }
  }
  // Says that a block is there, scales included.
  __device__ __forceinline__ auto& ready(int slot) {
    if constexpr (kBlocks) {
      return scales_full[slot];
    } else {
      return full[slot];
    }
  }
};
template <int kRows, KeyFormat kFormat>
inline constexpr bool kFits = sizeof(Fp8Memory<kRows, kFormat>) <= 232448;
static_assert(kFits<kNarrowRows, KeyFormat::kFp8PerTensor> &&
                  kFits<kNarrowRows, KeyFormat::kFp8Block> &&
                  kFits<kFp8FewRows, KeyFormat::kFp8PerTensor> &&
                  kFits<kFp8FewRows, KeyFormat::kFp8Block> &&
                  kFits<kRowTile, KeyFormat::kFp8PerTensor> &&
                  kFits<kRowTile, KeyFormat::kFp8Block>,
              "an SM has 227 KiB");

// A thread of the values has two of every eight query rows: they lie side by side.
template <int kOfAll>
__device__ __forceinline__ int row_slot(int row) {
  return row % 8 / 2 * (kOfAll / 4) + row / 8 * 2 + row % 2;
}

// A thread of the values has two keys of every eight.
__device__ __forceinline__ int pair_slot(int key) { return key % 8 / 2 * (kBlock / 8) + key / 8; }

// Two pairs of e4m3 values.
struct Pieces {
  uint32_t high;
  uint32_t low;
};

// Four numbers up to 256 as pieces, the second times 32 if `kTimes32`. NaN stays NaN.
template <bool kTimes32>
__device__ __forceinline__ Pieces split(float a, float b, float c, float d) {
  Pieces pieces;
  asm("{\n"
      ".reg .b32 x, y, u, v;\n"
      ".reg .b16 h, k, l, m;\n"
      "cvt.rn.f16x2.f32 x, %3, %2;\n"
      "cvt.rn.f16x2.f32 y, %5, %4;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 h, x;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 k, y;\n"
      "cvt.rn.f16x2.e4m3x2 u, h;\n"
      "cvt.rn.f16x2.e4m3x2 v, k;\n"
      "sub.rn.f16x2 u, x, u;\n"
      "sub.rn.f16x2 v, y, v;\n"
      "mul.rn.f16x2 u, u, %6;\n"
      "mul.rn.f16x2 v, v, %6;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 l, u;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 m, v;\n"
      "mov.b32 %0, {h, k};\n"
      "mov.b32 %1, {l, m};\n"
      "}"
      : "=r"(pieces.high), "=r"(pieces.low)
      : "f"(a), "f"(b), "f"(c), "f"(d), "r"(kTimes32 ? 0x50005000 : 0x3c003c00));  // 32 or 1, twice
  return pieces;
}

// A power of two that brings a positive number to 128 or more, below 256, and its inverse.
struct Scaling {
  float factor;
  float inverse;
  __device__ explicit Scaling(float largest) {
    // Within what both can be; NaN and infinity count as the largest number.
    const int exponent = min(max(__float_as_int(largest) >> 23, 8), 254);
    factor = __int_as_float((261 - exponent) << 23);
    inverse = __int_as_float((exponent - 7) << 23);
  }
  __device__ float apply(float number) const {
    const float x = number * factor;
    return x + (x - x);  // infinity, which no piece can be, becomes NaN
  }
  // Makes it one of numbers times `by`, whose sign goes to the pieces.
  __device__ void include(float by) {
    factor = copysignf(factor, by);
    inverse *= fabsf(by);
  }
};

}  // namespace jax_flashmla
