// The value warpgroups of the split kernel for FP8 caches: O^T = V^T P^T, each its half of the
// columns. So the values are an operand of registers, and are widened on their way there.
#pragma once

#include "cuda/decode_fp8_shared.cuh"

namespace jax_flashmla {

template <int kRows>
using Fp8ValuesMma =
    decltype(make_tiled_mma(GMMA::rs_op_selector<half_t, half_t, float, Shape<_64, Int<kRows>, _16>,
                                                 GMMA::Major::K, GMMA::Major::K>()));
template <int kRows>
using WeightsLayout =
    decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<half_t>{}, Shape<Int<kRows>, Int<kBlock>>{}));

inline constexpr int kColumnTiles = kHalfTiles;  // of 64 value columns, of a warpgroup

// Of 16 columns of each tile a thread has two neighbours, for two of every eight query rows: of its
// row i of a tile the even column is at `even(tile, i)`, the odd one two further.
template <int kRows>
using Fp8Output = decltype(partition_fragment_C(Fp8ValuesMma<kRows>{},
                                                Shape<Int<kColumnTiles * 64>, Int<kRows>>{}));
template <int kRows>
__device__ __forceinline__ constexpr int even(int tile, int row) {
  return tile * (kRows / 2) + row / 2 * 4 + row % 2;
}

// Values become an operand so many keys at a time.
template <int kRows>
inline constexpr int kChunk = kRows == kRowTile ? kBlock / 2 : kBlock;

// Of fp8_block: what a thread multiplies values of a tile with, two keys of every eight.
template <int kKeys>
struct KeyScales {
  uint32_t pairs[kKeys / 8];
};

template <int kKeys>
__device__ __forceinline__ KeyScales<kKeys> read_scales(const uint32_t (&pairs)[kBlock / 2],
                                                        int first_key, int lane) {
  KeyScales<kKeys> scales;
#pragma unroll
  for (int i = 0; i < kKeys / 32; ++i) {
    const uint4 four = reinterpret_cast<const uint4*>(pairs)[lane % 4 * 2 + first_key / 32 + i];
    scales.pairs[4 * i] = four.x, scales.pairs[4 * i + 1] = four.y;
    scales.pairs[4 * i + 2] = four.z, scales.pairs[4 * i + 3] = four.w;
  }
  return scales;
}

// Two e4m3 values each of the lower and the upper half of a register, as 16-bit floats: exact.
__device__ __forceinline__ void widen(uint32_t x, uint32_t& lower, uint32_t& upper) {
  asm("{\n.reg .b16 l, u;\nmov.b32 {l, u}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, u;\n}"
      : "=r"(lower), "=r"(upper)
      : "r"(x));
}

// 16 columns of a warp and `kKeys` keys, transposed as 16-bit pairs: a thread has two columns of
// two keys of every eight.
template <int kKeys, typename Block>
__device__ __forceinline__ void load_values(Block& block, int tile, int vector, int first_key,
                                            int lane, uint32_t (&raw)[kKeys / 8]) {
#pragma unroll
  for (int i = 0; i < kKeys / 8; i += 4) {
    SM75_U16x8_LDSM_T::copy(block.vector(tile, first_key + i * 8 + lane, vector), raw[i],
                            raw[i + 1], raw[i + 2], raw[i + 3]);
  }
}

// The same as the operand A: the even columns are a thread's first row, the odd ones its second.
template <bool kScaled, int kKeys, typename Fragment>
__device__ __forceinline__ void widen_values(const uint32_t (&raw)[kKeys / 8],
                                             const KeyScales<kKeys>& scales, Fragment& a) {
  Tensor words = recast<uint32_t>(a);
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i) {
    uint32_t columns[2];
    widen(__byte_perm(raw[i], 0, 0x3120), columns[0], columns[1]);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if constexpr (kScaled) {
        asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(columns[k]) : "r"(scales.pairs[i]));
      }
      words(i * 2 + k) = columns[k];
    }
  }
}

// Multiplies a thread's rows by numbers that every query row has.
template <int kRows>
__device__ __forceinline__ void scale_output(Fp8Output<kRows>& out, const float (&of_rows)[kRows],
                                             int lane) {
#pragma unroll
  for (int quad = 0; quad < kRows / 16; ++quad) {
    const float4 four = reinterpret_cast<const float4*>(of_rows)[lane % 4 * (kRows / 16) + quad];
    const float by[4] = {four.x, four.y, four.z, four.w};
    const bool one = by[0] == 1 && by[1] == 1 && by[2] == 1 && by[3] == 1;
    if (__all_sync(0xffffffffu, one)) continue;
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out(even<kRows>(tile, quad * 4 + i)) *= by[i];
        out(even<kRows>(tile, quad * 4 + i) + 2) *= by[i];
      }
    }
  }
}

// The 128 columns that share scales.
template <int kRows>
__device__ __forceinline__ void scale_tiles(Fp8Output<kRows>& out, int pair, float by) {
#pragma unroll
  for (int i = even<kRows>(pair * 2, 0); i < even<kRows>(pair * 2 + 2, 0); ++i) out(i) *= by;
}

// Registers are scarce: nothing that comes of the lane is to be in one from before.
__device__ __forceinline__ void keep_nothing_of(int& lane) { asm volatile("" : "+r"(lane)); }

// Writes what a thread has: partial results in the order of decode.h, or results.
template <int kRows, typename Element>
__device__ __forceinline__ void write_fp8_output(const KernelParams& p, const Work& work,
                                                 const Item& item, int first_column, int lane,
                                                 Fp8Output<kRows>& out) {
  keep_nothing_of(lane);
  if (item.slot == Item::kEmpty) return;
  if (item.slot >= 0) {
    const PartialScaling scaling([&](const auto& magnitude) __attribute__((always_inline)) {
      float sums[4] = {};
#pragma unroll
      for (int i = 0; i < size(out); ++i) sums[i % 4] += magnitude(out(i));
      return sums[0] + sums[1] + sums[2] + sums[3];
    });
#pragma unroll
    for (int i = 0; i < size(out); ++i) out(i) *= scaling.factor;
    const int column = first_column + lane / 4 * 2;
#pragma unroll
    for (int half = 0; half < kRows / kPartialRows; ++half) {
      const int row = work.tile * kRows + half * kPartialRows;
      if (row >= p.num_rows()) return;
      const int64_t tile = partial_tile(p, work, item, row / kPartialRows);
      uint2* const partial = partial_target(p, tile, column / kPartialColumns,
                                            lane % 4 * 8 + column % kPartialColumns / 2);
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {  // of two neighbouring rows
          const int at = even<kRows>(i, half * 4 + j);
          const int below = even<kRows>(i, half * 4 + j + 2);
          partial[i * (64 / kPartialColumns) * 32 + j * 4] = {as_half2(out(at), out(at + 2)),
                                                              as_half2(out(below), out(below + 2))};
        }
      }
      if (lane < kColumnTiles * 2) {  // two strips of each tile
        const int strip = first_column / kPartialColumns + lane / 2 * (64 / kPartialColumns);
        scaling.store(p, tile, strip + lane % 2);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRows / 4; ++i) {
    keep_nothing_of(lane);
    const int row = work.tile * kRows + i / 2 * 8 + lane % 4 * 2 + i % 2;
    if (row >= p.num_rows()) return;
    Element* const target = static_cast<Element*>(p.out) +
                            query_index(p, work, item.seq, row) * kLatentDim + first_column +
                            lane / 4 * 2;
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      const int at = even<kRows>(tile, i);
      const Element pair[2] = {Element(out(at)), Element(out(at + 2))};
      *reinterpret_cast<uint32_t*>(target + tile * 64) = *reinterpret_cast<const uint32_t*>(pair);
    }
  }
}

template <int kRows, KeyFormat kFormat, typename Element>
__device__ __forceinline__ void run_fp8_values(const KernelParams& p,
                                               Fp8Memory<kRows, kFormat>& smem, int side,
                                               int thread) {
  constexpr bool kBlocks = kFormat == KeyFormat::kFp8Block;
  constexpr bool kScaled = kBlocks && !kTurned<kRows>;  // else scales are in the weights
  constexpr int kKeys = kChunk<kRows>;
  constexpr int kOfTile = kBlock / kKeys;  // chunks
  constexpr int kChunks = kColumnTiles * kOfTile;
  constexpr int kSteps16 = kKeys / 16;
  const Work& work = smem.work;
  const int lane = thread % 32;
  const int warp = thread / 32;
  Ring<Fp8Memory<kRows, kFormat>::kSlots> slot;
  Ring<2> turn;
  Fp8ValuesMma<kRows> mma;
  mma.accumulate_ = GMMA::ScaleOut::One;
  const auto slice = mma.get_slice(0);
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    Fp8Output<kRows> out;
    clear(out);
#pragma unroll 1
    for (int number = item.first; number < item.last; ++number) {
      auto& block = smem.blocks[slot.slot];
      const auto& scales_of = smem.scales[slot.slot];
      const auto& factors = smem.factors[turn.slot];
      smem.ready(slot.slot).wait(slot.parity);
      smem.weights_full[turn.slot].wait(turn.parity);
      if constexpr (kReaderFences<kRows>) cutlass::arch::fence_view_async_shared();
      if constexpr (kBlocks) {
#pragma unroll
        for (int i = 0; i < kColumnTiles / 2; ++i) {
          const float rebase = scales_of.rebase[side * (kColumnTiles / 2) + i];
          if (rebase != 1) scale_tiles<kRows>(out, i, rebase);
        }
      }
      const int4 rescaled = reinterpret_cast<const int4&>(factors.rescaled);
      if ((rescaled.x | rescaled.y | rescaled.z | rescaled.w) != 0) {
        scale_output<kRows>(out, factors.rescale, lane);
      }
      warpgroup_fence_operand(out);
      // While the tensor cores work on one chunk, the next one is read, and up to 32 query rows
      // also widened: ptxas has no registers for more.
      constexpr int kUnderWay = kOfTile == 1 ? 2 : 1;
      auto a = make_tensor<half_t>(
          Layout<Shape<Shape<_2, _2, _2>, _1, Int<kSteps16>, Int<kUnderWay>>>{});
      uint32_t raw[kKeys / 8];
      const auto load = [&](int i) __attribute__((always_inline)) {
        const int column_tile = i / kOfTile;
        load_values<kKeys>(block, side * (kColumnTiles / 2) + column_tile / 2,
                           column_tile % 2 * 4 + warp, i % kOfTile * kKeys, lane, raw);
      };
      KeyScales<kKeys> scales;
      float base[kColumnTiles / 2];
      if (kUnderWay == 1) load(0);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int column_tile = i / kOfTile;
        const int tile = side * (kColumnTiles / 2) + column_tile / 2;
        const int first_key = i % kOfTile * kKeys;
        auto& weights = smem.weights[turn.slot][smem.kWeights > 1 ? tile : 0];
        Tensor b =
            slice.partition_fragment_B(make_tensor(make_smem_ptr(weights), WeightsLayout<kRows>{}));
        if constexpr (kScaled) {
          if (kOfTile > 1 || column_tile % 2 == 0) {
            scales = read_scales<kKeys>(scales_of.pairs[tile], first_key, lane);
          }
        }
        auto mine = a(_, _, _, i % kUnderWay);
        if (kUnderWay > 1) load(i);
        widen_values<kScaled, kKeys>(raw, scales, mine);
        if (i + 1 == kChunks) {
          if constexpr (kBlocks) {
#pragma unroll
            for (int j = 0; j < kColumnTiles / 2; ++j) {
              base[j] = scales_of.base[side * (kColumnTiles / 2) + j];
            }
          }
        }
        Tensor part = out(_, column_tile, _);
        Tensor sums = make_tensor(part.data(), append<3>(part.layout()));
        warpgroup_arrive();
#pragma unroll
        for (int step = 0; step < kSteps16; ++step) {
          cute::gemm(mma, mine(_, _, step), b(_, _, first_key / 16 + step), sums);
        }
        warpgroup_commit_batch();
        // Here, where all that was read of the block has arrived: the products have been given it.
        if (i + 1 == kChunks) smem.empty[slot.slot].arrive();
        if (kUnderWay == 1 && i + 1 < kChunks) load(i + 1);
        if (kUnderWay == 1) {
          warpgroup_wait<0>();
        } else if (i > 0) {
          warpgroup_wait<1>();
        }
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(out);
      if (number + 1 == item.last) {
        if constexpr (kBlocks) {
#pragma unroll
          for (int i = 0; i < kColumnTiles / 2; ++i) scale_tiles<kRows>(out, i, base[i]);
        }
        scale_output<kRows>(out, factors.inverse, lane);
      }
      smem.weights_empty[turn.slot].arrive();
      slot.advance();
      turn.advance();
    }
    write_fp8_output<kRows, Element>(p, work, item, side * (kLatentDim / 2) + warp * 16, lane, out);
  }
}

}  // namespace jax_flashmla
