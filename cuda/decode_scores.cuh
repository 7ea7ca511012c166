// The scores warpgroup of the wide split kernel: S = Q K^T, and from it the weights P.
#pragma once

#include "cuda/decode_gather.cuh"
#include "cuda/decode_softmax.cuh"

namespace jax_flashmla {

template <typename Element>
using SharedScoresMma =
    decltype(make_tiled_mma(GMMA::ss_op_selector<Element, Element, float, Shape<_64, _64, _16>,
                                                 GMMA::Major::K, GMMA::Major::K>()));
// With the queries in registers.
template <typename Element>
using RegisterScoresMma =
    decltype(make_tiled_mma(GMMA::rs_op_selector<Element, Element, float, Shape<_64, _64, _16>,
                                                 GMMA::Major::K, GMMA::Major::K>()));

inline constexpr int kSteps = 4;  // of 16 columns in a tile

// Where lane `lane` of a warp finds its 16 bytes of step `step`, for ldmatrix and stmatrix: rows
// are of 128 bytes, of which 16-byte vector v is at v ^ row % 8 (the swizzle of TileLayout).
template <typename Element>
__device__ __forceinline__ uint128_t* matrix_vector(Element* tile, int thread, int step) {
  const int row = thread / 32 * 16 + thread % 16;
  const int vector = (step * 2 + thread % 32 / 16) ^ row % 8;
  return reinterpret_cast<uint128_t*>(tile) + row * 8 + vector;
}

// The left half of the queries, as the A operand of sixteen steps.
template <typename Element>
__device__ __forceinline__ auto read_queries(Element (&tiles)[kHalfTiles][kTileElements],
                                             const KernelParams& p, const Work& work,
                                             const Rows& rows, int thread) {
  Tensor q = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kHalfTiles * kSteps>>>{});
  Tensor words = recast<uint32_t>(q);
#pragma unroll
  for (int i = 0; i < kHalfTiles * kSteps; ++i) {
    SM75_U32x4_LDSM_N::copy(*matrix_vector(tiles[i / kSteps], thread, i % kSteps), words(4 * i),
                            words(4 * i + 1), words(4 * i + 2), words(4 * i + 3));
  }
  // The ring's slot holds old keys where there are no queries: perhaps NaN.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (work.tile * kRowTile + rows.row(half) < p.num_rows()) continue;
#pragma unroll
    for (int i = 0; i < kHalfTiles * kSteps * 2; ++i) words(2 * i + half) = 0;
  }
  return q;
}

// Issues S = Q K^T for the left half of the columns, part by part as they land: queries from
// registers.
template <Source kSource, typename Element, typename Queries, typename Scores>
__device__ __forceinline__ void issue_left(SharedMemory<Element>& smem, const Queries& q_left,
                                           Ring<kHalfSlots>& half, int thread, Scores& scores) {
  RegisterScoresMma<Element> mma;
  const auto slice = mma.get_slice(thread);
  warpgroup_fence_operand(scores);
  mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    wait_for_keys<kSource>(smem.half_full[half.slot][part], half.parity);
    warpgroup_arrive();
    Element* const keys = smem.halves[half.slot][part * kPartTiles];
    Tensor b = slice.partition_fragment_B(make_tensor(make_smem_ptr(keys), PartLayout<Element>{}));
    constexpr int kPartSteps = kPartTiles * kSteps;
#pragma unroll
    for (int step = 0; step < kPartSteps; ++step) {
      cute::gemm(mma, q_left(_, _, part * kPartSteps + step), b(_, _, step), scores);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
  }
  half.advance();
}

// Adds the rotary tile, which lands before it, and the right half: queries from shared memory.
template <Source kSource, typename Element, typename Scores>
__device__ __forceinline__ void issue_right(SharedMemory<Element>& smem, Ring<kHalfSlots>& half,
                                            const Ring<kRopeSlots>& rope, int thread,
                                            Scores& scores) {
  SharedScoresMma<Element> mma;
  const auto slice = mma.get_slice(thread);
  const auto issue = [&](Element* queries, auto queries_layout, Element* keys,
                         auto keys_layout) __attribute__((always_inline)) {
    warpgroup_arrive();
    Tensor a = slice.partition_fragment_A(make_tensor(make_smem_ptr(queries), queries_layout));
    Tensor b = slice.partition_fragment_B(make_tensor(make_smem_ptr(keys), keys_layout));
#pragma unroll
    for (int step = 0; step < size<2>(a); ++step) {
      cute::gemm(mma, a(_, _, step), b(_, _, step), scores);
    }
  };
  wait_for_keys<kSource>(smem.rope_full[rope.slot], rope.parity);
  issue(smem.q[kHalfTiles], TileLayout<Element>{}, smem.rope[rope.slot], TileLayout<Element>{});
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    wait_for_keys<kSource>(smem.half_full[half.slot][part], half.parity);
    issue(smem.q[part * kPartTiles], QueriesLayout<Element>{},
          smem.halves[half.slot][part * kPartTiles], PartLayout<Element>{});
  }
  half.advance();
  warpgroup_commit_batch();
}

// Scales the scores to base 2 and masks those that a row may not see.
template <typename Scores>
__device__ __forceinline__ void scale_and_mask(const KernelParams& p, const Work& work,
                                               const BlockView<true>& view, const Rows& rows,
                                               Scores& scores) {
  if (p.logits_soft_cap > 0) {
#pragma unroll
    for (int i = 0; i < size(scores); ++i) scores(i) = capped(p, scores(i));
  }
#pragma unroll
  for (int i = 0; i < size(scores); ++i) scores(i) *= p.score_scale;
  if (view.whole) return;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int token = p.by_heads_per_kv.div(work.tile * kRowTile + rows.row(row));
    const int hidden = hidden_keys(p, token);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int key = i / 2 * 8 + rows.column + i % 2;
      if (!view.seen(p, key, hidden)) scores(i / 2 * 4 + row * 2 + i % 2) = -INFINITY;
    }
  }
}

// Zeroes keys that no row sees, since they may be NaN: as values, 0 * NaN would reach the output.
// `next`: the position in the ring after the block's two halves.
template <typename Element>
__device__ __forceinline__ void clear_keys(SharedMemory<Element>& smem,
                                           const Ring<kHalfSlots>& next, int begin, int end,
                                           int thread) {
  constexpr int kVectors = kHalfTiles * 8;  // of 16 bytes in a row of a half
#pragma unroll 1
  for (int back = 1; back <= 2; ++back) {
    const int slot = (next.slot + kHalfSlots - back) % kHalfSlots;
#pragma unroll 1
    for (int i = thread; i < (end - begin) * kVectors; i += kWarpgroup) {
      const int row = begin + i / kVectors;
      const int vector = i % kVectors;
      const int tile = vector / 8;
      uint4* part = reinterpret_cast<uint4*>(smem.halves[slot][tile / kPartTiles * kPartTiles]);
      // As in PartLayout. Swizzling permutes vectors inside a row of a tile: all are cleared.
      const int slice = row / 8 * kPartTiles + tile % kPartTiles;
      part[(slice * 8 + row % 8) * 8 + vector % 8] = make_uint4(0, 0, 0, 0);
    }
  }
}

// Of a thread's two rows, over the blocks so far.
struct Statistics {
  float max[2] = {-FLT_MAX, -FLT_MAX};  // base 2; may lag, see kMaxLag
  float sum[2] = {0, 0};                // this thread's part
};

// Scores become weights 2^(score - max). Returns the factors from the old maxima to the new ones.
template <typename Scores>
__device__ __forceinline__ void softmax(Scores& scores, Statistics& stats, float (&factor)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const auto score = [&](int i) -> float& { return scores(i / 2 * 4 + row * 2 + i % 2); };
    float top = score(0);
#pragma unroll
    for (int i = 1; i < 16; ++i) top = fmaxf(top, score(i));
    top = reduce_quad(top, [](float x, float y) { return fmaxf(x, y); });
    const float max = top > stats.max[row] + kMaxLag ? top : stats.max[row];
    factor[row] = exp2_approx(stats.max[row] - max);
    stats.max[row] = max;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      score(i) = exp2_approx(score(i) - max);
      sum += score(i);
    }
    stats.sum[row] = stats.sum[row] * factor[row] + sum;
  }
}

// Writes the weights of a block over its rotary tile. An accumulator's registers, packed in pairs,
// are four matrices of 8 x 8 for each step.
template <typename Element, typename Weights>
__device__ __forceinline__ void store_weights(Element (&tile)[kTileElements], int thread,
                                              const Weights& weights) {
  Tensor packed = make_tensor<Element>(Shape<Int<size(Weights{})>>{});
#pragma unroll
  for (int i = 0; i < size(packed); ++i) packed(i) = Element(weights(i));
  Tensor words = recast<uint32_t>(packed);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    SM90_U32x4_STSM_N::copy(words(4 * step), words(4 * step + 1), words(4 * step + 2),
                            words(4 * step + 3), *matrix_vector(tile, thread, step));
  }
}

// Writes the log-sum-exp (base 2) of a row.
__device__ __forceinline__ void write_lse(const KernelParams& p, const Work& work, const Item& item,
                                          int row, float lse) {
  if (row < p.num_rows() && item.slot != Item::kEmpty)
    *lse_target(p, work, item, row) = stored_lse(item, lse);
}

template <int kCtas, Source kSource, typename Element>
__device__ __forceinline__ void run_scores(const KernelParams& p, SharedMemory<Element>& smem,
                                           int thread) {
  const Work& work = smem.work;
  const Rows rows(thread);
  const int lane = thread % 32;
  const bool writer = rows.column == 0;  // of its rows' statistics
  Ring<kHalfSlots> half;
  Ring<kRopeSlots> rope;
  uint32_t q_parity = 0;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    Statistics stats;
    // Rows that do not exist get no weights: products with zeros take less of the chip's power.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (work.tile * kRowTile + rows.row(i) >= p.num_rows()) stats.max[i] = FLT_MAX / 2;
    }
    float total[2] = {0, 0};
    if (item.blocks() > 0) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        smem.half_full[half.slot][part].wait(half.parity);
      }
      const Tensor q_left = read_queries(smem.halves[half.slot], p, work, rows, thread);
      // Without a fence, the arrival overtakes the reads, and keys land before they are done.
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        release<kCtas, kSource>(smem.half_empty[half.slot][part], lane);
      }
      half.advance();
      smem.q_full.wait(q_parity);
      q_parity ^= 1;
      Tensor scores = partition_fragment_C(SharedScoresMma<Element>{}, Shape<_64, _64>{});
      issue_left<kSource>(smem, q_left, half, thread, scores);
      issue_right<kSource>(smem, half, rope, thread, scores);
#pragma unroll 1
      for (int block = item.first;; ++block) {
        warpgroup_wait<0>();
        warpgroup_fence_operand(scores);
        const bool last = block + 1 == item.last;
        if (last) release<1>(smem.q_empty, lane);

        const BlockView<true> view(p, item, block);
        scale_and_mask(p, work, view, rows, scores);
        float factor[2];
        softmax(scores, stats, factor);
        store_weights(smem.rope[rope.slot], thread, scores);
        if (!view.whole) {
          if (view.unseen > 0) clear_keys(smem, half, 0, view.unseen, thread);
          if (view.left < kBlock) clear_keys(smem, half, view.left, kBlock, thread);
        }
        smem.factors_read[rope.slot].wait(rope.parity ^ 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // The output is still zero before the first block.
          if (writer) smem.factor[rope.slot][rows.row(i)] = block == item.first ? 1 : factor[i];
          if (last) {
            total[i] = reduce_quad(stats.sum[i], [](float x, float y) { return x + y; });
            if (writer) smem.inverse[rope.slot][rows.row(i)] = over_total(total[i]);
          }
        }
        cutlass::arch::fence_view_async_shared();
        auto& weights = smem.weights[rope.slot];
        rope.advance();
        if (last) {
          weights.first.arrive();
          weights.rest.arrive();
          break;
        }
        // Most values are multiplied during the next softmax. The first of them go earlier, which
        // makes room for keys.
        issue_left<kSource>(smem, q_left, half, thread, scores);
        weights.first.arrive();
        issue_right<kSource>(smem, half, rope, thread, scores);
        weights.rest.arrive();
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float lse = log_sum_exp(stats.max[i], total[i]);
      if (writer) write_lse(p, work, item, work.tile * kRowTile + rows.row(i), lse);
    }
  }
}

}  // namespace jax_flashmla
