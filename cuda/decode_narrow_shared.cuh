// What the roles of the split kernel for few query rows share: the shared memory plan, products by
// registers.
#pragma once

#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "cuda/decode_shared.cuh"

namespace jax_flashmla {

inline constexpr int kMathWarps = kValueTiles;  // each has a tile of the value columns
inline constexpr int kMathThreads = kMathWarps * 32;
inline constexpr int kNarrowThreads = kMathThreads + kWarpgroup;
// A warp that wants more registers than the CTA was launched with waits forever.
inline constexpr int kMathRegisters = 232, kLoaderRegisters = 40;
inline constexpr int kLaunchRegisters = 65536 / kNarrowThreads / 8 * 8;
static_assert(2 * kMathRegisters + kLoaderRegisters <= 3 * kLaunchRegisters);
inline constexpr int kWarpKeys = kBlock / kMathWarps;  // whose scores a warp computes
static_assert(kWarpKeys == 8, "the columns of a product");
inline constexpr int kChunks = kValueTiles / kKeyBoxTiles;  // copies of a block's latent columns

// As many as fit where keys come row by row. By the copy engine, two blocks: with more in flight
// decodes take 1 to 4 % longer (benchmarks/NOTES.md, attempt 78).
template <Source kSource>
inline constexpr int kChunkSlots = kSource == Source::kPages ? 2 * kChunks : 11;

template <Source kSource, typename Element>
struct NarrowMemory {
  alignas(1024) Element q[kTiles][kNarrowRows * 64];
  alignas(1024) Element chunks[kChunkSlots<kSource>][kKeyBoxTiles][kTileElements];
  alignas(1024) Element rope[kRopeSlots][kTileElements];
  alignas(1024) Element weights[kNarrowRows * 64];  // [query row, key]
  float maxima[kNarrowRows][kMathWarps];            // over the keys of each warp
  float sums[kNarrowRows][kMathWarps * 4 + 4];      // of each quad's four threads; 4: for banks
  GatherRows rows;
  Work work;  // for the warps that multiply, whose registers are full
  FullBarrier chunk_full[kChunkSlots<kSource>];
  EmptyBarrier chunk_empty[kChunkSlots<kSource>];
  FullBarrier rope_full[kRopeSlots];
  EmptyBarrier rope_empty[kRopeSlots];
  FullBarrier q_full;
  EmptyBarrier q_empty;
  EmptyBarrier waited;  // the key thread has, for the kernel before
};
static_assert(sizeof(NarrowMemory<Source::kRows, cutlass::bfloat16_t>) <= 232448,
              "an SM has 227 KiB");

// The operand A of a step of 16 columns: all rows of a tile of queries or of the weights.
template <typename Element>
__device__ __forceinline__ void read_rows(Element* tile, int step, int lane, uint32_t (&a)[4]) {
  SM75_U32x4_LDSM_N::copy(vector_at(tile, lane % 16, step * 2 + lane / 16), a[0], a[1], a[2], a[3]);
}
// The operands B of two steps: eight keys, which are columns of the product, with 32 columns of
// theirs.
template <typename Element>
__device__ __forceinline__ void read_keys(Element* tile, int key, int pair, int lane,
                                          uint32_t (&b)[2][2]) {
  SM75_U32x4_LDSM_N::copy(vector_at(tile, key + lane % 8, pair * 4 + lane / 8), b[0][0], b[0][1],
                          b[1][0], b[1][1]);
}
// Two operands B of a step of 16 keys: eight value columns each.
template <typename Element>
__device__ __forceinline__ void read_values(Element* tile, int step, int pair, int lane,
                                            uint32_t (&b)[2][2]) {
  SM75_U16x8_LDSM_T::copy(vector_at(tile, step * 16 + lane % 16, pair * 2 + lane / 16), b[0][0],
                          b[0][1], b[1][0], b[1][1]);
}

// An accumulator of 16 rows by eight columns. A thread has two rows, eight apart, and two
// neighbouring columns of each: x and y of the first, z and w of the second.
template <typename Element>
__device__ __forceinline__ void multiply_add(float4& c, const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  using Mma = std::conditional_t<std::is_same_v<Element, cutlass::half_t>,
                                 SM80_16x8x16_F32F16F16F32_TN, SM80_16x8x16_F32BF16BF16F32_TN>;
  Mma::fma(c.x, c.y, c.z, c.w, a[0], a[1], a[2], a[3], b[0], b[1], c.x, c.y, c.z, c.w);
}
struct Quad {
  int row;     // and row + 8
  int column;  // and column + 1
  __device__ explicit Quad(int lane) : row(lane / 4), column(lane % 4 * 2) {}
};

// All queries, as the operand A of 36 steps: what a warp keeps in its registers.
struct Queries {
  uint32_t a[kTiles * 4][4];
};

// Multiplies a thread's two rows.
__device__ __forceinline__ void scale_rows(float4 (&out)[8], const float (&factor)[2]) {
#pragma unroll
  for (float4& x : out) {
    x = {x.x * factor[0], x.y * factor[0], x.z * factor[1], x.w * factor[1]};
  }
}

__device__ __forceinline__ void sync_math() { cutlass::arch::NamedBarrier::sync(kMathThreads, 1); }

// Combines eight numbers.
template <typename Combine>
__device__ __forceinline__ float reduce_eight(const float* parts, const Combine& combine) {
  const float4 a = reinterpret_cast<const float4*>(parts)[0];
  const float4 b = reinterpret_cast<const float4*>(parts)[1];
  return combine(combine(combine(a.x, a.y), combine(a.z, a.w)),
                 combine(combine(b.x, b.y), combine(b.z, b.w)));
}

}  // namespace jax_flashmla
