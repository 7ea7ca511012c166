// What the roles of the split kernel for FP8 caches share: the shared memory plan, and how numbers
// become two e4m3 pieces. The formats are drawn in docs/fp8.md, the schedule in cuda/README.md.
#pragma once

#include <cutlass/numeric_types.h>

#include "cuda/decode_gather.cuh"

namespace jax_flashmla {

using E4M3 = cutlass::float_e4m3_t;

inline constexpr int kFp8Tiles = kLatentDim / 128;  // of 128 bytes a row: a scale's columns each
inline constexpr int kScaleBytes = kFp8Tiles * 4;   // of a row of fp8_block

// Queries meet e4m3 keys as e4m3, so that the tensor cores need no wider copy of them: two pieces,
// of which the second is what the first leaves over, times 32. Together they have eight bits, as
// bfloat16 has, and are two rows of a product, which has 64 of them.
inline constexpr int kPieces = 2;
inline constexpr float kLowPiece = 1.0f / 32;
static_assert(kPieces * kFp8Rows == 64, "the rows of a warpgroup's product");

// The scales of a block of fp8_block, tile by tile.
struct alignas(16) BlockScales {
  float of_keys[kFp8Tiles][kBlock];
  // For the values, of two neighbouring keys over `base`, a power of two that follows the largest
  // scale: 16-bit floats have no room for what scales can be. In the order of `pair_slot`.
  uint32_t pairs[kFp8Tiles][kBlock / 2];
  float base[kFp8Tiles];
  float rebase[kFp8Tiles];  // what the output so far is to be multiplied with
  // The bits of the largest and the smallest scale that each warp of the loader has.
  uint32_t most_of_warp[kFp8Tiles][kGatherWarps];
  uint32_t least_of_warp[kFp8Tiles][kGatherWarps];

  __device__ __forceinline__ uint32_t most(int tile) const {
    const uint4 x = reinterpret_cast<const uint4&>(most_of_warp[tile]);
    return max(max(x.x, x.y), max(x.z, x.w));
  }
  __device__ __forceinline__ uint32_t least(int tile) const {
    const uint4 x = reinterpret_cast<const uint4&>(least_of_warp[tile]);
    return min(min(x.x, x.y), min(x.z, x.w));
  }
};
struct NoScales {};

template <KeyFormat kFormat>
struct Fp8Memory {
  static constexpr bool kBlocks = kFormat == KeyFormat::kFp8Block;
  static constexpr int kRopeBytes = kBlocks ? kTileBytes : kTileBytes / 2;
  static constexpr int kSlots = kBlocks ? 4 : 5;  // blocks of keys
  struct alignas(1024) Block {
    uint8_t latent[kFp8Tiles][kTileBytes];
    uint8_t rope[kRopeBytes];  // 64 e4m3 or bfloat16 values a row
    std::conditional_t<kBlocks, BlockScales, NoScales> scales;
  };
  struct alignas(1024) Weights {
    half_t p[kFp8Rows * kBlock];  // [query row, key], swizzled
    // Of a query row, in the order of `row_slot`.
    float rescale[kFp8Rows];  // of the output so far
    float inverse[kFp8Rows];  // of the sum, with an item's last block
  };
  Block blocks[kSlots];
  Weights weights[2];
  GatherRows rows;
  Work work;
  FullBarrier full[kSlots];
  EmptyBarrier empty[kSlots];    // by the threads that multiply values
  EmptyBarrier weights_full[2];  // by those that compute scores
  EmptyBarrier weights_empty[2];
  EmptyBarrier work_known;  // `work` is there
};
static_assert(sizeof(Fp8Memory<KeyFormat::kFp8PerTensor>) <= 232448, "an SM has 227 KiB");
static_assert(sizeof(Fp8Memory<KeyFormat::kFp8Block>) <= 232448, "an SM has 227 KiB");

// A thread of the values has two of every eight query rows: its eight lie side by side.
__device__ __forceinline__ int row_slot(int row) {
  return row % 8 / 2 * (kFp8Rows / 4) + row / 8 * 2 + row % 2;
}

// A thread of the values has two keys of every eight.
__device__ __forceinline__ int pair_slot(int key) { return key % 8 / 2 * (kBlock / 8) + key / 8; }

// Two pairs of e4m3 values.
struct Pieces {
  uint32_t high;
  uint32_t low;
};

// Four numbers up to 256 as pieces. NaN stays NaN.
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
      : "f"(a), "f"(b), "f"(c), "f"(d), "r"(0x50005000));  // 32, twice
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
};

}  // namespace jax_flashmla
