// The scores warpgroup of the split kernel for FP8 caches: S = Q K^T, and from it the weights P.
#pragma once

#include "cuda/decode_fp8_shared.cuh"
#include "cuda/decode_softmax.cuh"

namespace jax_flashmla {

// Queries of registers with 64 keys of 128 bytes, and with the bfloat16 columns of fp8_block.
using Fp8ScoresMma =
    decltype(make_tiled_mma(GMMA::rs_op_selector<E4M3, E4M3, float, Shape<_64, _64, _32>,
                                                 GMMA::Major::K, GMMA::Major::K>()));
using RopeScoresMma = decltype(make_tiled_mma(
    GMMA::rs_op_selector<bfloat16_t, bfloat16_t, float, Shape<_64, _64, _16>, GMMA::Major::K,
                         GMMA::Major::K>()));
using Fp8KeyLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<E4M3>{}, Shape<_64, _128>{}));
using Fp8RopeLayout = decltype(tile_to_shape(GMMA::Layout_K_SW64_Atom<E4M3>{}, Shape<_64, _64>{}));

// A warp has eight query rows: a thread the pieces of one in the two rows of its operand A.
template <KeyFormat kFormat>
struct Fp8Queries {
  static constexpr bool kBlocks = kFormat == KeyFormat::kFp8Block;
  static constexpr int kSteps = (kBlocks ? kLatentDim : kHeadDim) / 32;
  decltype(make_tensor<E4M3>(Layout<Shape<Shape<_4, _2, _2>, _1, Int<kSteps>>>{})) pieces;
  // The rotary columns of fp8_block: bfloat16, and what is left of a 16-bit float.
  decltype(make_tensor<bfloat16_t>(Layout<Shape<Shape<_2, _2, _2>, _1, _4>>{})) rope;
  float scale;  // of the pieces
};

template <typename Element>
__device__ __forceinline__ float as_float(uint32_t bits) {
  if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
    return __uint_as_float(bits << 16);
  } else {
    return static_cast<float>(Element::bitcast(static_cast<uint16_t>(bits)));
  }
}

// Of a row of queries, four neighbouring columns.
struct QueryRow {
  const uint16_t* nope = nullptr;
  const uint16_t* rope = nullptr;
  __device__ __forceinline__ uint2 four(int column) const {
    if (nope == nullptr) return {0, 0};
    const uint16_t* at = column < kLatentDim ? nope + column : rope + (column - kLatentDim);
    return *reinterpret_cast<const uint2*>(at);
  }
};

__device__ __forceinline__ uint32_t largest_of(uint32_t largest, uint2 four) {
  const uint32_t top = __vmaxu2(four.x & 0x7fff7fffu, four.y & 0x7fff7fffu);
  return __vmaxu2(largest, top);
}

// Reads a row, twice: for its largest value, of which a power of two makes one of e4m3, and then
// for its pieces.
template <KeyFormat kFormat, typename Element>
__device__ __forceinline__ void read_queries(const KernelParams& p, const Work& work, int seq,
                                             int row, int lane, Fp8Queries<kFormat>& q) {
  using Q = Fp8Queries<kFormat>;
  QueryRow from;
  if (row < p.num_rows()) {
    const int64_t index = query_index(p, work, seq, row);
    from.nope = static_cast<const uint16_t*>(p.q_nope) + index * p.q_nope_stride + lane % 4 * 4;
    from.rope = static_cast<const uint16_t*>(p.q_rope) + index * p.q_rope_stride + lane % 4 * 4;
  }
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < Q::kSteps * 2; ++i) largest = largest_of(largest, from.four(i * 16));
  largest = max(largest & 0xffff, largest >> 16);
  largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
  largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
  const Scaling scaling(as_float<Element>(largest));
  q.scale = scaling.inverse;
  Tensor words = recast<uint32_t>(q.pieces);
  const auto scaled = [&](uint32_t bits) {
    const float x = as_float<Element>(bits) * scaling.factor;
    return x + (x - x);  // infinity, which no piece can be, becomes NaN
  };
#pragma unroll
  for (int i = 0; i < Q::kSteps * 2; ++i) {
    const uint2 four = from.four(i * 16);
    const Pieces pieces = split(scaled(four.x & 0xffff), scaled(four.x >> 16),
                                scaled(four.y & 0xffff), scaled(four.y >> 16));
    words(2 * i) = pieces.high;
    words(2 * i + 1) = pieces.low;
  }
  if constexpr (Q::kBlocks) {
    Tensor rope = recast<uint32_t>(q.rope);
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // of two columns
      uint32_t pair = 0;
      if (from.rope != nullptr) {
        pair = *reinterpret_cast<const uint32_t*>(from.rope - lane % 4 * 2 + i * 8);
      }
      rope(2 * i) = pair;
      rope(2 * i + 1) = 0;
      if constexpr (!std::is_same_v<Element, cutlass::bfloat16_t>) {
        const float x[2] = {as_float<Element>(pair & 0xffff), as_float<Element>(pair >> 16)};
        const bfloat16_t high[2] = {bfloat16_t(x[0]), bfloat16_t(x[1])};
        const bfloat16_t low[2] = {bfloat16_t(x[0] - float(high[0])),
                                   bfloat16_t(x[1] - float(high[1]))};
        rope(2 * i) = reinterpret_cast<const uint32_t&>(high);
        rope(2 * i + 1) = reinterpret_cast<const uint32_t&>(low);
      }
    }
  }
}

// The products of a block, tile by tile: the tensor cores add e4m3 products up with some 14 bits,
// so that not many should come together before they are added to a float32. A thread has a query
// row and 16 keys: of every eight, two.
template <KeyFormat kFormat>
__device__ __forceinline__ void compute_scores(typename Fp8Memory<kFormat>::Block& block,
                                               const Fp8Queries<kFormat>& q, int lane,
                                               float (&scores)[16]) {
  constexpr bool kBlocks = kFormat == KeyFormat::kFp8Block;
  Fp8ScoresMma mma;
  RopeScoresMma rope_mma;
  const auto slice = mma.get_slice(0);
  Tensor even = partition_fragment_C(mma, Shape<_64, _64>{});
  Tensor odd = partition_fragment_C(mma, Shape<_64, _64>{});
  const auto issue = [&](int tile, auto& sums) __attribute__((always_inline)) {
    warpgroup_fence_operand(sums);
    warpgroup_arrive();
    if (kBlocks && tile == kFp8Tiles) {
      auto* const keys = reinterpret_cast<bfloat16_t*>(block.rope);
      Tensor b = rope_mma.get_slice(0).partition_fragment_B(
          make_tensor(make_smem_ptr(keys), TileLayout<bfloat16_t>{}));
      rope_mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        cute::gemm(rope_mma, q.rope(_, _, step), b(_, _, step), sums);
        rope_mma.accumulate_ = GMMA::ScaleOut::One;
      }
    } else {
      const auto multiply = [&](uint8_t* bytes, auto layout) __attribute__((always_inline)) {
        Tensor b = slice.partition_fragment_B(
            make_tensor(make_smem_ptr(reinterpret_cast<E4M3*>(bytes)), layout));
        mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
        for (int step = 0; step < size<2>(b); ++step) {
          cute::gemm(mma, q.pieces(_, _, tile * 4 + step), b(_, _, step), sums);
          mma.accumulate_ = GMMA::ScaleOut::One;
        }
      };
      if (tile == kFp8Tiles) {
        multiply(block.rope, Fp8RopeLayout{});
      } else {
        multiply(block.latent[tile], Fp8KeyLayout{});
      }
    }
    warpgroup_commit_batch();
  };
  const auto add = [&](int tile, auto& sums) __attribute__((always_inline)) {
    warpgroup_fence_operand(sums);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float2 scale = {1, 1};
      if constexpr (kBlocks) {
        if (tile < kFp8Tiles) {
          const float* of_keys = &block.scales.of_keys[tile][j * 8 + lane % 4 * 2];
          scale = *reinterpret_cast<const float2*>(of_keys);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[j * 2 + i];
        const float high = sums(j * 4 + i), low = sums(j * 4 + 2 + i);
        if (kBlocks && tile == kFp8Tiles) {
          score = fmaf(score, q.scale, high + low);
        } else if (kBlocks) {
          score = fmaf(fmaf(low, kLowPiece, high), i == 0 ? scale.x : scale.y, score);
        } else {
          score = fmaf(low, kLowPiece, score) + high;
        }
      }
    }
  };
#pragma unroll
  for (float& score : scores) score = 0;
  issue(0, even);
#pragma unroll
  for (int tile = 0; tile < kFp8Tiles; ++tile) {
    if (tile % 2 == 0) {
      issue(tile + 1, odd);
    } else {
      issue(tile + 1, even);
    }
    warpgroup_wait<1>();
    if (tile % 2 == 0) {
      add(tile, even);
    } else {
      add(tile, odd);
    }
  }
  warpgroup_wait<0>();
  add(kFp8Tiles, even);
  static_assert(kFp8Tiles % 2 == 0);
}

// Writes the weights of a warp's rows. A thread's pairs are those of a matrix of 8 x 8 for every
// eight keys.
__device__ __forceinline__ void write_weights(half_t* p, int first_row, int lane,
                                              const float (&weights)[16]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* pair = &weights[i * 8 + j * 2];
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pairs[j]) : "f"(pair[1]), "f"(pair[0]));
    }
    SM90_U32x4_STSM_N::copy(pairs[0], pairs[1], pairs[2], pairs[3],
                            vector_at(p, first_row + lane % 8, i * 4 + lane / 8));
  }
}

// Of 16 numbers.
template <typename Combine>
__device__ __forceinline__ float over_all(const float (&x)[16], const Combine& combine) {
  float parts[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    parts[i] = combine(combine(x[i], x[i + 4]), combine(x[i + 8], x[i + 12]));
  }
  return combine(combine(parts[0], parts[1]), combine(parts[2], parts[3]));
}

// Zeroes values that no row sees, since they may be NaN: 0 * NaN would reach the output.
template <KeyFormat kFormat>
__device__ __forceinline__ void clear_keys(typename Fp8Memory<kFormat>::Block& block, int begin,
                                           int end, int thread) {
#pragma unroll 1
  for (int i = thread; i < (end - begin) * (kLatentDim / 16); i += kWarpgroup) {
    const int row = begin + i / (kLatentDim / 16);
    // Swizzling permutes vectors inside a row of a tile: all of them are cleared.
    vector_at(block.latent[i / 8 % kFp8Tiles], row, i % 8) = uint128_t{};
  }
}

template <Source kSource, KeyFormat kFormat, typename Element>
__device__ __forceinline__ void run_fp8_scores(const KernelParams& p, Fp8Memory<kFormat>& smem,
                                               int thread) {
  constexpr bool kBlocks = kFormat == KeyFormat::kFp8Block;
  const auto larger = [](float x, float y) { return fmaxf(x, y); };
  const auto plus = [](float x, float y) { return x + y; };
  const Work& work = smem.work;
  const int lane = thread % 32;
  const int row = thread / 32 * 8 + lane / 4;
  const int row_of_all = work.tile * kFp8Rows + row;
  const bool writer = lane % 4 == 0;
  Ring<Fp8Memory<kFormat>::kSlots> slot;
  Ring<2> turn;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    float base = -FLT_MAX;  // what weights are relative to, base 2
    float sum = 0;          // of them, this thread's part
    float total = 0;
    if (item.blocks() > 0) {
      Fp8Queries<kFormat> q;
      read_queries<kFormat, Element>(p, work, seq, row_of_all, lane, q);
      const int hidden = hidden_keys(p, p.by_heads_per_kv.div(row_of_all));
      const float scale = kBlocks ? 1 : q.scale * p.k_scale[work.group];
#pragma unroll 1
      for (int block = item.first; block < item.last; ++block) {
        wait_for_keys<kSource>(smem.full[slot.slot], slot.parity);
        float scores[16];
        compute_scores<kFormat>(smem.blocks[slot.slot], q, lane, scores);
        const BlockView<true> view(p, item, block);
        if (p.cap_scale != 0) {
#pragma unroll
          for (int i = 0; i < 16; ++i) scores[i] = capped(p, scores[i] * scale);
        }
        const float to_base_2 = (p.cap_scale != 0 ? 1 : scale) * p.score_scale;
#pragma unroll
        for (int i = 0; i < 16; ++i) scores[i] *= to_base_2;
        if (!view.whole) {
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            const int key = i / 2 * 8 + lane % 4 * 2 + i % 2;
            if (!view.seen(p, key, hidden)) scores[i] = -INFINITY;
          }
          if constexpr (kSource == Source::kPages) {  // row by row they come as zeros
            auto& keys = smem.blocks[slot.slot];
            if (view.unseen > 0) clear_keys<kFormat>(keys, 0, view.unseen, thread);
            if (view.left < kBlock) clear_keys<kFormat>(keys, view.left, kBlock, thread);
          }
        }
        const float top = reduce_quad(over_all(scores, larger), larger);
        const float before = base;
        base = top > base + kMaxLag ? top : base;
        const float rescale = exp2_approx(before - base);
#pragma unroll
        for (int i = 0; i < 16; ++i) scores[i] = exp2_approx(scores[i] - base);
        sum = fmaf(sum, rescale, over_all(scores, plus));
        const bool last = block + 1 == item.last;
        auto& weights = smem.weights[turn.slot];
        smem.weights_empty[turn.slot].wait(turn.parity ^ 1);
        write_weights(weights.p, thread / 32 * 8, lane, scores);
        if (last) total = reduce_quad(sum, plus);
        if (writer) {
          weights.rescale[row_slot(row)] = block == item.first ? 1 : rescale;
          if (last) {
            const float values = kBlocks ? 1 : p.k_scale[work.group];
            weights.inverse[row_slot(row)] = total == 0 ? 0 : __fdividef(values, total);
          }
        }
        cutlass::arch::fence_view_async_shared();
        smem.weights_full[turn.slot].arrive();
        turn.advance();
        slot.advance();
      }
    }
    if (writer && row_of_all < p.num_rows() && item.slot != Item::kEmpty) {
      const float lse = total == 0 ? -INFINITY : base + __log2f(total);
      *lse_target(p, work, item, row_of_all) = stored_lse(item, lse);
    }
  }
}

}  // namespace jax_flashmla
