// What the consumer warpgroups of the split kernel compute: scores, weights, products.
#pragma once

#include "cuda/decode_shared.cuh"

namespace jax_flashmla {

inline constexpr float kLog2E = 1.4426950408889634f;

template <typename Element>
using ScoresMma =
    decltype(make_tiled_mma(GMMA::ss_op_selector<Element, Element, float, Shape<_64, _64, _16>,
                                                 GMMA::Major::K, GMMA::Major::K>()));
// O += P V with P from registers (own block) or from shared memory (the other's).
template <typename Element>
using OwnMma =
    decltype(make_tiled_mma(GMMA::rs_op_selector<Element, Element, float, Shape<_64, _256, _16>,
                                                 GMMA::Major::K, GMMA::Major::MN>()));
template <typename Element>
using OtherMma =
    decltype(make_tiled_mma(GMMA::ss_op_selector<Element, Element, float, Shape<_64, _256, _16>,
                                                 GMMA::Major::K, GMMA::Major::MN>()));

// Zeroes the values of keys past the end, which may be NaN: 0 * NaN would reach the output.
template <typename Element>
__device__ __forceinline__ void clear_past_end(SharedMemory<Element>& smem, int stage, int valid,
                                               int thread) {
  constexpr int kVectors = kTiles * 8;  // of 16 bytes in a row
#pragma unroll 1
  for (int i = thread; i < (kBlock - valid) * kVectors; i += kWarpgroup) {
    const int row = valid + i / kVectors;
    const int vector = i % kVectors;
    // Swizzling permutes vectors inside a row of a tile: all of them are cleared.
    uint4* tile = reinterpret_cast<uint4*>(smem.k[stage][vector / 8]);
    tile[row * 8 + vector % 8] = make_uint4(0, 0, 0, 0);
  }
  cutlass::arch::fence_view_async_shared();
}

// Zero, in a way that the compiler cannot move out of a loop: descriptors built from an address
// that it can hoist are all kept in registers, and something else is spilled.
__device__ __forceinline__ int opaque_zero() {
  int zero;
  asm volatile("mov.u32 %0, 0;" : "=r"(zero));
  return zero;
}

// Issues S = Q K^T for the block in buffer `kStage`, tile by tile as they land.
template <int kStage, typename Element, typename Scores>
__device__ __forceinline__ void issue_scores(SharedMemory<Element>& smem, uint32_t parity,
                                             int thread, Scores& scores) {
  ScoresMma<Element> mma;
  const auto slice = mma.get_slice(thread);
  const int zero = opaque_zero();
  Tensor q = make_tensor(make_smem_ptr(&smem.q[0][zero]), BlockLayout<Element>{});
  Tensor k = make_tensor(make_smem_ptr(&smem.k[kStage][0][zero]), BlockLayout<Element>{});
  Tensor a = slice.partition_fragment_A(q);
  Tensor b = slice.partition_fragment_B(k);
  warpgroup_fence_operand(scores);
  mma.accumulate_ = GMMA::ScaleOut::Zero;
  // The order in which the loader fills the buffer.
  constexpr int kOrder[2][kTiles] = {{0, 1, 2, 3, 4, 5, 6, 7, 8}, {4, 5, 6, 7, 8, 0, 1, 2, 3}};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int tile = kOrder[kStage][i];
    smem.full[kStage][tile].wait(parity);
    warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      cute::gemm(mma, a(_, _, tile * 4 + step), b(_, _, tile * 4 + step), scores);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
  }
  warpgroup_commit_batch();
}

// Scales the scores to base 2 and masks those past what each row may see.
template <typename Scores>
__device__ __forceinline__ void scale_and_mask(const DecodeParams& p, const Work& work,
                                               const Item& item, int block, const Rows& rows,
                                               Scores& scores) {
  const float scale = p.softmax_scale * kLog2E;
#pragma unroll
  for (int i = 0; i < size(scores); ++i) scores(i) *= scale;
  const int first_hidden = item.length - (p.causal ? p.s_q - 1 : 0);
  if ((block + 1) * kBlock <= first_hidden) return;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int token = (work.tile * kRowTile + rows.row(row)) / p.heads_per_kv();
    const int visible = (p.causal ? item.length - p.s_q + 1 + token : item.length) - block * kBlock;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int key = i / 2 * 8 + rows.column + i % 2;
      if (key >= min(visible, item.length - block * kBlock)) {
        scores(i / 2 * 4 + row * 2 + i % 2) = -INFINITY;
      }
    }
  }
}

// The larger of `start` and the row's scores, over the four threads that share a row.
template <typename Scores>
__device__ __forceinline__ float row_max(const Scores& scores, int row, float start) {
  float top = start;
#pragma unroll
  for (int i = 0; i < 16; ++i) top = fmaxf(top, scores(i / 2 * 4 + row * 2 + i % 2));
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
  return fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
}

// Scores become weights exp2(score - max); returns this thread's part of the row's sum.
template <typename Scores>
__device__ __forceinline__ float exponentiate(Scores& scores, int row, float max) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float& x = scores(i / 2 * 4 + row * 2 + i % 2);
    x = exp2f(x - max);
    sum += x;
  }
  return sum;
}

// Multiplies the rows of an accumulator by `factor`, unless nothing would change.
template <typename Accumulator>
__device__ __forceinline__ void rescale(Accumulator& acc, const float (&factor)[2]) {
  if (__all_sync(0xffffffffu, factor[0] == 1.0f && factor[1] == 1.0f)) return;
#pragma unroll
  for (int i = 0; i < size(acc); ++i) acc(i) *= factor[i / 2 % 2];
}

// The weights as the A operand of the second product: an accumulator's registers, packed in pairs,
// are the operand's, four steps of 16 keys.
template <typename Element, typename Weights>
__device__ __forceinline__ auto pack_weights(const Weights& weights) {
  Tensor packed = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, _4>>{});
#pragma unroll
  for (int i = 0; i < size(packed); ++i) packed(i) = Element(weights(i));
  return packed;
}

// Writes the weights of a block over its rotary tile, for the other warpgroup.
template <typename Element, typename Weights>
__device__ __forceinline__ void store_weights(SharedMemory<Element>& smem, int stage,
                                              const Rows& rows, const Weights& weights) {
  Tensor pairs = recast<uint32_t>(weights);
  // Row r, 16-byte vector v of the tile is at 128 r + 16 (v ^ r % 8): the swizzle of TileLayout.
  char* tile = reinterpret_cast<char*>(smem.k[stage][kRopeTile]);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int row = rows.row(i % 2);
    const int vector = i / 2 ^ rows.first % 8;
    *reinterpret_cast<uint32_t*>(tile + row * 128 + vector * 16 + rows.column * 2) = pairs(i);
  }
  cutlass::arch::fence_view_async_shared();
}

// Issues O += P V: the warpgroup's half of the values, P from its registers.
template <typename Element, typename Weights, typename Accumulator>
__device__ __forceinline__ void issue_own_values(SharedMemory<Element>& smem, int stage, int half,
                                                 int thread, const Weights& weights,
                                                 Accumulator& out) {
  OwnMma<Element> mma;
  const auto slice = mma.get_slice(thread);
  const int zero = opaque_zero();
  Tensor v =
      make_tensor(make_smem_ptr(&smem.k[stage][half * kHalfTiles][zero]), ValueLayout<Element>{});
  Tensor b = slice.partition_fragment_B(v);
  warpgroup_fence_operand(out);
  warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < 4; ++step) cute::gemm(mma, weights(_, _, step), b(_, _, step), out);
  warpgroup_commit_batch();
}

// The same with the other warpgroup's P, from shared memory.
template <typename Element, typename Accumulator>
__device__ __forceinline__ void issue_other_values(SharedMemory<Element>& smem, int stage, int half,
                                                   int thread, Accumulator& out) {
  OtherMma<Element> mma;
  const auto slice = mma.get_slice(thread);
  const int zero = opaque_zero();
  Tensor p = make_tensor(make_smem_ptr(&smem.k[stage][kRopeTile][zero]), TileLayout<Element>{});
  Tensor v =
      make_tensor(make_smem_ptr(&smem.k[stage][half * kHalfTiles][zero]), ValueLayout<Element>{});
  Tensor a = slice.partition_fragment_A(p);
  Tensor b = slice.partition_fragment_B(v);
  warpgroup_fence_operand(out);
  warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < 4; ++step) cute::gemm(mma, a(_, _, step), b(_, _, step), out);
  warpgroup_commit_batch();
}

// The tiles that a warpgroup multiplies without having computed their scores.
template <typename Element>
__device__ __forceinline__ void wait_values(SharedMemory<Element>& smem, int stage, int half,
                                            uint32_t parity) {
#pragma unroll
  for (int tile = 0; tile < kHalfTiles; ++tile) {
    smem.full[stage][half * kHalfTiles + tile].wait(parity);
  }
}

// A warp has read its half of a buffer for the last time.
template <typename Element>
__device__ void release(SharedMemory<Element>& smem, int stage, int half, int thread) {
  if (thread % 32 == 0) smem.empty[stage][half].arrive();
}

}  // namespace jax_flashmla
