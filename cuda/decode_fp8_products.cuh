// The products S = Q K^T of the split kernel for FP8 caches.
#pragma once

#include "cuda/decode_fp8_queries.cuh"

namespace jax_flashmla {

// 64 rows by so many columns, over 32 bytes of each; row operands in registers or shared memory.
template <typename Element, int kColumns>
using ProductShape = Shape<_64, Int<kColumns>, Int<32 / sizeof(Element)>>;
template <typename Element, int kColumns>
using RegisterMma = decltype(make_tiled_mma(
    GMMA::rs_op_selector<Element, Element, float, ProductShape<Element, kColumns>, GMMA::Major::K,
                         GMMA::Major::K>()));
template <typename Element, int kColumns>
using SharedMma = decltype(make_tiled_mma(
    GMMA::ss_op_selector<Element, Element, float, ProductShape<Element, kColumns>, GMMA::Major::K,
                         GMMA::Major::K>()));

// What a swizzled row has: 128 bytes, or, of the rotary columns of fp8_per_tensor, 64.
template <typename Element>
using WideRows = GMMA::Layout_K_SW128_Atom<Element>;
using ShortRows = GMMA::Layout_K_SW64_Atom<E4M3>;
template <typename Rows, typename Count>
using OperandLayout = decltype(tile_to_shape(Rows{}, Shape<Count, decltype(size<1>(Rows{}))>{}));

// Adds the products of two operands in shared memory to `to`, or begins with them: as `mma` says.
template <typename Rows, typename Mma, typename Sums>
__device__ __forceinline__ void multiply_shared(Mma& mma, uint8_t* rows, uint8_t* columns,
                                                Sums& to) {
  using Element = typename Mma::ValTypeA;
  const auto slice = mma.get_slice(0);
  Tensor a = slice.partition_fragment_A(
      make_tensor(make_smem_ptr(reinterpret_cast<Element*>(rows)), OperandLayout<Rows, _64>{}));
  Tensor b =
      slice.partition_fragment_B(make_tensor(make_smem_ptr(reinterpret_cast<Element*>(columns)),
                                             OperandLayout<Rows, decltype(tile_size<1>(Mma{}))>{}));
#pragma unroll
  for (int step = 0; step < size<2>(b); ++step) {
    cute::gemm(mma, a(_, _, step), b(_, _, step), to);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
}

// The same with row operands in registers, of which those from `first_step` on are meant.
template <typename Rows, typename Mma, typename Operands, typename Sums>
__device__ __forceinline__ void multiply_registers(Mma& mma, const Operands& rows, int first_step,
                                                   uint8_t* columns, Sums& to) {
  using Element = typename Mma::ValTypeA;
  Tensor b = mma.get_slice(0).partition_fragment_B(
      make_tensor(make_smem_ptr(reinterpret_cast<Element*>(columns)),
                  OperandLayout<Rows, decltype(tile_size<1>(Mma{}))>{}));
#pragma unroll
  for (int step = 0; step < size<2>(b); ++step) {
    cute::gemm(mma, rows(_, _, first_step + step), b(_, _, step), to);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
}

// The products of a block, batch by batch of a tile's columns: the tensor cores add e4m3 products
// up with some 14 bits, so that not many should come together before they are added to a float32.
// Two batches are in flight at most; the first of a block are, while the softmax of the one before
// runs.
template <int kRows, KeyFormat kFormat>
struct Fp8Scores {
  static constexpr bool kBlocks = kFormat == KeyFormat::kFp8Block;
  static constexpr int kOfThread = kThreadRows<kRows>;
  // The rotary columns of fp8_block have no scale and another type: a batch of their own.
  static constexpr int kBatches = kBlocks ? kFp8Tiles + 1 : kFp8Tiles;
  // So many of the next block are under way during the softmax. Of more rows it has no registers
  // for a second one.
  static constexpr int kAhead = kRows == kRowTile ? 1 : 2;
  using Memory = Fp8Memory<kRows, kFormat>;
  using Block = typename Memory::Block;
  using Sums = decltype(partition_fragment_C(RegisterMma<E4M3, 64>{}, Shape<_64, _64>{}));

  const Fp8Queries<kRows, kFormat>& q;
  Memory& smem;
  Sums sums[2];

  __device__ __forceinline__ Fp8Scores(const Fp8Queries<kRows, kFormat>& q, Memory& smem)
      : q(q), smem(smem) {}

  __device__ __forceinline__ void issue_first(Block& block) {
#pragma unroll
    for (int batch = 0; batch < kAhead; ++batch) issue(block, batch);
  }

  // Waits for all products of a block and adds them up; its scales are there. A thread has 16 keys
  // of its query rows: of every eight, two.
  template <typename Scales>
  __device__ __forceinline__ void finish(Block& block, const Scales& scales,
                                         float (&scores)[kOfThread][16]) {
#pragma unroll
    for (int i = 0; i < kOfThread * 16; ++i) scores[i / 16][i % 16] = 0;
    float4 of_keys[4];
    read_scales(scales, 0, of_keys);  // before their products are waited for
#pragma unroll
    for (int batch = 0; batch < kBatches; ++batch) {
      if (batch == 0 || batch + 1 == kBatches) {
        warpgroup_wait<0>();
      } else if (batch >= kAhead) {
        warpgroup_wait<1>();
      }
      if (batch == 0 && kAhead == 1) issue(block, 1);
      add(of_keys, batch, scores);
      read_scales(scales, batch + 1, of_keys);
      if (batch + 2 < kBatches) issue(block, batch + 2);
    }
  }

 private:
  __device__ __forceinline__ void issue(Block& block, int batch) {
    Sums& to = sums[batch % 2];
    warpgroup_fence_operand(to);
    warpgroup_arrive();
    if constexpr (kRows == kRowTile) {
      issue_shared(block, batch, to);
    } else {
      issue_registers(block, batch, to);
    }
    warpgroup_commit_batch();
  }

  __device__ __forceinline__ void issue_registers(Block& block, int batch, Sums& to) {
    if (kBlocks && batch == kFp8Tiles) {
      RegisterMma<bfloat16_t, 64> mma;
      mma.accumulate_ = GMMA::ScaleOut::Zero;
      multiply_registers<WideRows<bfloat16_t>>(mma, q.rope, 0, block.rope, to);
      return;
    }
    RegisterMma<E4M3, 64> mma;
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    multiply_registers<WideRows<E4M3>>(mma, q.pieces, batch * 4, block.latent[batch], to);
    if (!kBlocks && batch + 1 == kBatches) {
      multiply_registers<ShortRows>(mma, q.pieces, kFp8Tiles * 4, block.rope, to);
    }
  }

  // The low pieces go first: what is lost of sums is a share of what they are by then.
  __device__ __forceinline__ void issue_shared(Block& block, int batch, Sums& to) {
    if (kBlocks && batch == kFp8Tiles) {
      SharedMma<bfloat16_t, 64> mma;
      mma.accumulate_ = GMMA::ScaleOut::Zero;
      multiply_shared<WideRows<bfloat16_t>>(mma, smem.q.rope[0], block.rope, to);
      return;
    }
    SharedMma<E4M3, 64> mma;
    mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
    for (int piece = kPieces - 1; piece >= 0; --piece) {
      multiply_shared<WideRows<E4M3>>(mma, smem.q.latent[piece][batch], block.latent[batch], to);
      if (!kBlocks && batch + 1 == kBatches) {
        multiply_shared<ShortRows>(mma, smem.q.rope[piece], block.rope, to);
      }
    }
  }

  template <typename Scales>
  __device__ __forceinline__ void read_scales(const Scales& scales, int batch,
                                              float4 (&of_keys)[4]) {
    if constexpr (kBlocks) {
      if (batch >= kFp8Tiles) return;
      const float* const from = &scales.of_keys[batch][threadIdx.x % 4 * kScaleStride];
#pragma unroll
      for (int i = 0; i < 4; ++i) of_keys[i] = reinterpret_cast<const float4*>(from)[i];
    }
  }

  __device__ __forceinline__ void add(const float4 (&of_keys)[4], int batch,
                                      float (&scores)[kOfThread][16]) {
    Sums& from = sums[batch % 2];
    warpgroup_fence_operand(from);
#pragma unroll
    for (int j = 0; j < 16; j += 4) {
      const float4& four = of_keys[j / 4];
      const float scale[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int row = 0; row < kOfThread; ++row) {
          float& score = scores[row][j + i];
          const int at = j * 2 + i / 2 * 4 + i % 2;
          float sum = from(at + row * 2);
          const float low = from(at + 2);
          if (kBlocks && batch == kFp8Tiles) {
            score = fmaf(score, q.scale[row], sum);
          } else if (kBlocks) {
            if (kOfThread == 1) sum = fmaf(low, kLowPiece, sum);
            score = fmaf(sum, scale[i], score);
          } else {
            if (kOfThread == 1) score = fmaf(low, kLowPiece, score);
            score += sum;
          }
        }
      }
    }
  }
};

}  // namespace jax_flashmla
