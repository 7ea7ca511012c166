// The value warpgroups of the split kernel for FP8 caches: O^T = V^T P^T, each its half of the
// columns. So the values, which lie key by key, are an operand of registers, where bytes can be put
// in order; in shared memory e4m3 operands lie with the keys side by side.
#pragma once

#include "cuda/decode_fp8_shared.cuh"

namespace jax_flashmla {

using Fp8ValuesMma =
    decltype(make_tiled_mma(GMMA::rs_op_selector<E4M3, E4M3, float, Shape<_64, _64, _32>,
                                                 GMMA::Major::K, GMMA::Major::K>()));
using PieceLayout = decltype(tile_to_shape(GMMA::Layout_K_SW64_Atom<E4M3>{}, Shape<_64, _64>{}));

inline constexpr int kColumnTiles = kHalfTiles;   // of 64 value columns, of a warpgroup
inline constexpr int kThreadRows = kFp8Rows / 4;  // every fourth query row

// What a warp has of an output: of each tile of 64 columns 16, a thread two neighbours of them.
using Fp8Output = float2[kColumnTiles][kThreadRows];

// 16 columns of a warp and all keys of a block as the operand A of two steps. Transposed as 16-bit
// pairs, a thread has two columns of two keys: the even columns are its first row, the odd ones its
// second. Keys come in the order of `write_pieces`.
template <typename Fragment>
__device__ __forceinline__ void read_values(uint8_t* tile, int vector, int lane, Fragment& a) {
  Tensor words = recast<uint32_t>(a);
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t pairs[4];
    SM75_U16x8_LDSM_T::copy(fp8_vector(tile, step * 32 + lane, vector), pairs[0], pairs[1],
                            pairs[2], pairs[3]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words(step * 4 + 2 * i) = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x6420);
      words(step * 4 + 2 * i + 1) = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x7531);
    }
  }
}

// Of the numbers that every query row has, those of a thread's rows 4 `quad` to 4 `quad` + 3.
__device__ __forceinline__ float4 read_four(const float (&of_rows)[kFp8Rows], int quad, int lane) {
  return reinterpret_cast<const float4*>(of_rows)[lane % 4 * (kThreadRows / 4) + quad];
}

__device__ __forceinline__ void scale_output(Fp8Output& out, const float (&of_rows)[kFp8Rows],
                                             int lane) {
#pragma unroll
  for (int quad = 0; quad < kThreadRows / 4; ++quad) {
    const float4 by = read_four(of_rows, quad, lane);
    if (__all_sync(0xffffffffu, by.x == 1 && by.y == 1 && by.z == 1 && by.w == 1)) continue;
#pragma unroll
    for (auto& tile : out) {
      float2* const rows = tile + quad * 4;
      rows[0].x *= by.x, rows[0].y *= by.x, rows[1].x *= by.y, rows[1].y *= by.y;
      rows[2].x *= by.z, rows[2].y *= by.z, rows[3].x *= by.w, rows[3].y *= by.w;
    }
  }
}

// Adds a block's sums of 64 columns: of every row the high pieces', and the low ones' beside it.
template <typename Sums>
__device__ __forceinline__ void add_sums(const Sums& sums, const float (&factor)[kFp8Rows],
                                         int lane, float2 (&out)[kThreadRows]) {
#pragma unroll
  for (int quad = 0; quad < kThreadRows / 4; ++quad) {
    const float4 four = read_four(factor, quad, lane);
    const float by[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = quad * 4 + i;
      const float even = fmaf(sums(4 * j + 1), kLowWeight, sums(4 * j));
      const float odd = fmaf(sums(4 * j + 3), kLowWeight, sums(4 * j + 2));
      out[j].x = fmaf(even, by[i], out[j].x);
      out[j].y = fmaf(odd, by[i], out[j].y);
    }
  }
}

// Writes what a thread has: partial results in the order of decode.h, or results.
template <typename Element>
__device__ __forceinline__ void write_fp8_output(const KernelParams& p, const Work& work,
                                                 const Item& item, int first_column, int lane,
                                                 const Fp8Output& out) {
  keep_nothing_of(lane);
  if (item.slot == Item::kEmpty) return;
  if (item.slot >= 0) {
    const int column = first_column + lane / 4 * 2;
#pragma unroll
    for (int half = 0; half < kFp8Rows / kPartialRows; ++half) {
      const int row = work.tile * kFp8Rows + half * kPartialRows;
      if (row >= p.num_rows()) return;
      float4* const partial =
          reinterpret_cast<float4*>(p.partial_out) +
          (partial_tile(p, work, item, row / kPartialRows) * (kLatentDim / kPartialColumns) +
           column / kPartialColumns) *
              32 +
          lane % 4 * 4 + column % kPartialColumns / 2;
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float2 x = out[i][half * 4 + j], y = out[i][half * 4 + j + 2];
          partial[i * (64 / kPartialColumns) * 32 + j * 16] = make_float4(x.x, x.y, y.x, y.y);
        }
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kThreadRows; ++j) {
    keep_nothing_of(lane);
    const int row = work.tile * kFp8Rows + j * 4 + lane % 4;
    if (row >= p.num_rows()) return;
    Element* const target = static_cast<Element*>(p.out) +
                            query_index(p, work, item.seq, row) * kLatentDim + first_column +
                            lane / 4 * 2;
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) {
      const Element pair[2] = {Element(out[i][j].x), Element(out[i][j].y)};
      *reinterpret_cast<uint32_t*>(target + i * 64) = *reinterpret_cast<const uint32_t*>(pair);
    }
  }
}

template <KeyFormat kFormat, typename Element>
__device__ __forceinline__ void run_fp8_values(const KernelParams& p, Fp8Memory<kFormat>& smem,
                                               int side, int thread) {
  const Work& work = smem.work;
  const int lane = thread % 32;
  const int warp = thread / 32;
  Ring<Fp8Memory<kFormat>::kSlots> slot;
  Ring<2> turn;
  Fp8ValuesMma mma;
  const auto slice = mma.get_slice(0);
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    Fp8Output out = {};
#pragma unroll 1
    for (int number = item.first; number < item.last; ++number) {
      auto& block = smem.blocks[slot.slot];
      auto& weights = smem.weights[turn.slot];
      smem.full[slot.slot].wait(slot.parity);
      smem.weights_full[turn.slot].wait(turn.parity);
      scale_output(out, weights.rescale, lane);
      Tensor sums = partition_fragment_C(mma, Shape<_64, _64>{});
      auto a = make_tensor<E4M3>(Layout<Shape<Shape<_4, _2, _2>, _1, _2>>{});
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i) {
        const int tile = side * (kColumnTiles / 2) + i / 2;
        const int set = smem.kSets == 1 ? 0 : tile;
        read_values(block.latent[tile], i % 2 * 4 + warp, lane, a);
        if (i + 1 == kColumnTiles) smem.empty[slot.slot].arrive();
        Tensor b = slice.partition_fragment_B(make_tensor(
            make_smem_ptr(reinterpret_cast<E4M3*>(weights.pieces[set])), PieceLayout{}));
        warpgroup_fence_operand(sums);
        warpgroup_arrive();
        mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          cute::gemm(mma, a(_, _, step), b(_, _, step), sums);
          mma.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
        warpgroup_wait<0>();
        warpgroup_fence_operand(sums);
        // Once a block, for the tensor cores' sums have few bits.
        add_sums(sums, weights.factor[set], lane, out[i]);
      }
      if (number + 1 == item.last) scale_output(out, weights.inverse, lane);
      smem.weights_empty[turn.slot].arrive();
      slot.advance();
      turn.advance();
    }
    write_fp8_output<Element>(p, work, item, side * (kLatentDim / 2) + warp * 16, lane, out);
  }
}

}  // namespace jax_flashmla
