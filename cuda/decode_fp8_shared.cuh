// What the roles of the split kernel for FP8 caches share: the shared memory plan, how e4m3 values
// become operands. The formats are drawn in docs/fp8.md.
#pragma once

#include "cuda/decode_narrow_shared.cuh"

namespace jax_flashmla {

inline constexpr int kFp8Tiles = kLatentDim / 128;  // of 128 bytes a row: a scale's columns each
inline constexpr int kFp8Slots = 4;                 // blocks in shared memory
inline constexpr int kScaleBytes = kFp8Tiles * 4;   // of a row of fp8_block
// Of a row of queries in shared memory: no two of its readers meet in a bank.
inline constexpr int kQueryStride = 592;

// What values are multiplied as. e4m3 is exact in 16-bit floats, in one instruction for two; in
// bfloat16, which the scales of fp8_block need for their range, it takes a few, and values are then
// 2^-120 times what they should be: half of that is made up for in the weights.
template <KeyFormat kFormat>
using Weight =
    std::conditional_t<kFormat == KeyFormat::kFp8Block, cutlass::bfloat16_t, cutlass::half_t>;
inline constexpr float kWeightScale = 0x1p60f;
inline constexpr float kValueScale = 0x1p60f;  // what is left of 2^120

template <KeyFormat kFormat, typename Element>
struct Fp8Memory {
  static constexpr int kWeights = kFormat == KeyFormat::kFp8Block ? kFp8Tiles : 1;
  struct Block {
    uint8_t latent[kFp8Tiles][kTileBytes];
    // 64 e4m3 or 64 bfloat16 values a row, the former with as many bytes behind them unused.
    uint8_t rope[kTileBytes];
    float4 scales[kBlock];  // of fp8_block
  };
  alignas(1024) Block blocks[kFp8Slots];
  alignas(1024) Weight<kFormat> weights[kWeights][kNarrowRows * 64];  // [query row, key]
  alignas(16) uint16_t q[kNarrowRows][kQueryStride];
  float q_scale[kNarrowRows];             // by which the latent columns of q were divided
  float maxima[kNarrowRows][kMathWarps];  // over the keys of each warp
  float sums[kNarrowRows][kMathWarps * 4 + 4];
  GatherRows rows;
  Work work;
  FullBarrier full[kFp8Slots];
  EmptyBarrier empty[kFp8Slots];
};
static_assert(sizeof(Fp8Memory<KeyFormat::kFp8Block, cutlass::half_t>) <= 232448, "227 KiB");
static_assert(sizeof(Fp8Memory<KeyFormat::kFp8Block, cutlass::half_t>::Block) % 1024 == 0);

// Before what is done once per item: nothing that comes of the lane is to be in a register before.
__device__ __forceinline__ void keep_nothing_of(int& lane) { asm volatile("" : "+r"(lane)); }

// Two e4m3 values each of the lower and the upper half of a register, as 16-bit floats.
__device__ __forceinline__ void widen(uint32_t x, uint32_t& lower, uint32_t& upper) {
  asm("{\n.reg .b16 l, u;\nmov.b32 {l, u}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, u;\n}"
      : "=r"(lower), "=r"(upper)
      : "r"(x));
}

// Of four e4m3 values, those in the even and in the odd bytes.
template <KeyFormat kFormat>
__device__ __forceinline__ void widen_bytes(uint32_t x, uint32_t& even, uint32_t& odd) {
  if constexpr (kFormat == KeyFormat::kFp8Block) {
    // As bfloat16, 2^-120 times their value: sign and seven bits in their places. A NaN, which has
    // made its key's scores NaN, becomes a number.
    even = (x << 8 & 0x80008000u) | (x << 4 & 0x07f007f0u);
    odd = (x & 0x80008000u) | (x >> 4 & 0x07f007f0u);
  } else {
    widen(__byte_perm(x, 0, 0x3120), even, odd);
  }
}

// Two bfloat16 values as the queries' type.
template <typename Element>
__device__ __forceinline__ uint32_t as_element(uint32_t x) {
  if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) return x;
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;"
      : "=r"(y)
      : "f"(__uint_as_float(x & 0xffff0000u)), "f"(__uint_as_float(x << 16)));
  return y;
}

}  // namespace jax_flashmla
