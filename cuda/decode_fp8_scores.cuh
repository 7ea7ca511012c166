// The scores warpgroup of the split kernel for FP8 caches: S = Q K^T, and from it the weights P; of
// more than 16 query rows.
#pragma once

#include "cuda/decode_fp8_products.cuh"
#include "cuda/decode_softmax.cuh"

namespace jax_flashmla {

// Writes the weights of a warp's rows. A thread's pairs are those of a matrix of 8 x 8 for every
// eight keys.
__device__ __forceinline__ void write_weights(half_t* p, int first_row, int lane,
                                              const float (&weights)[16]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      pairs[j] = as_half2(weights[i * 8 + j * 2], weights[i * 8 + j * 2 + 1]);
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
template <typename Block>
__device__ __forceinline__ void clear_unseen(Block& block, const BlockView<true>& view) {
  const ThreadNow now;
#pragma unroll 1
  for (int i = now.warp * 32 + now.lane; i < kBlock * (kLatentDim / 16); i += kWarpgroup) {
    const int row = i / (kLatentDim / 16);
    const bool seen = row >= view.unseen && row < view.left;
    if (!seen) block.vector(i / 8 % kFp8Tiles, row, i % 8) = uint128_t{};
  }
}

// Caps a row's scores, brings them to base 2 and masks those that it may not see. `key(i)`: which
// key of the block score `i` is of.
template <int kCount, typename Key>
__device__ __forceinline__ void finish_scores(const KernelParams& p, const BlockView<true>& view,
                                              int hidden, float scale, float (&scores)[kCount],
                                              const Key& key) {
  if (p.logits_soft_cap > 0) {
#pragma unroll
    for (float& score : scores) score = capped(p, score * scale);
    scale = 1;
  }
  scale *= p.score_scale;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    scores[i] *= scale;
    if (!view.seen(p, key(i), hidden)) scores[i] = -INFINITY;
  }
}

// Which of the threads that compute scores this is.
template <int kRows>
struct ScoresThread : ThreadNow {
  // The first of its query rows; others are eight further.
  __device__ __forceinline__ int row() const { return warp * kWarpRows + lane / 4; }
  // Of its keys.
  __device__ __forceinline__ int key(int i) const { return i / 2 * 8 + lane % 4 * 2 + i % 2; }
  static constexpr int kWarpRows = kThreadRows<kRows> * 8;
};

template <Source kSource, int kRows, KeyFormat kFormat, typename Element>
__device__ __forceinline__ void run_fp8_scores(const KernelParams& p,
                                               Fp8Memory<kRows, kFormat>& smem, int thread) {
  constexpr bool kBlocks = kFormat == KeyFormat::kFp8Block;
  constexpr int kOfThread = kThreadRows<kRows>;
  const auto larger = [](float x, float y) { return fmaxf(x, y); };
  const auto plus = [](float x, float y) { return x + y; };
  const Work& work = smem.work;
  Ring<Fp8Memory<kRows, kFormat>::kSlots> slot;
  uint32_t turn = 0;  // number of the block: its weights are in slot `turn % 2`
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    float base[kOfThread];  // what weights are relative to, base 2
    float sum[kOfThread];   // of them, this thread's part
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) base[i] = -FLT_MAX, sum[i] = 0;
    if (item.blocks() > 0) {
      Fp8Queries<kRows, kFormat> q;
      read_item_queries<kFormat, Element>(p, work, seq, work.tile * kRows, thread, q, smem);
      Fp8Scores<kRows, kFormat> products(q, smem);
      const auto attend = [&](int block, auto& keys, auto& scores,
                              bool last) __attribute__((always_inline)) {
        const BlockView<true> view(p, item, block);
        float to_base_2[kOfThread];
#pragma unroll
        for (int i = 0; i < kOfThread; ++i) {
          const float scale = kBlocks ? 1 : q.scale[i];
          to_base_2[i] = scale * p.score_scale;
          // Below, the largest score is taken for the largest of base 2.
          if (!view.whole || p.logits_soft_cap > 0 || !(p.score_scale > 0)) {
            const ScoresThread<kRows> now;
            const int row = work.tile * kRows + now.row() + i * 8;
            const int hidden = hidden_keys(p, p.by_heads_per_kv.div(row));
            finish_scores(p, view, hidden, scale, scores[i], [&](int j) { return now.key(j); });
            to_base_2[i] = 1;
          }
        }
        // Row by row they come as zeros.
        if (kSource == Source::kPages && !view.whole) clear_unseen(keys, view);
        bool rescaled = false;
        float rescale[kOfThread];
#pragma unroll
        for (int i = 0; i < kOfThread; ++i) {
          // Nearly always the maximum before is still good.
          float top = over_all(scores[i], larger) * to_base_2[i];
          rescale[i] = 1;
          if (__any_sync(0xffffffffu, top > base[i] + kMaxLag)) {
            top = reduce_quad(top, larger);
            const float before = base[i];
            base[i] = top > base[i] + kMaxLag ? top : base[i];
            const bool had_none = before == -FLT_MAX;  // nor has the output anything of the row
            rescale[i] = had_none ? 1 : exp2_approx(before - base[i]);
            sum[i] *= rescale[i];
            // By any of the warp's rows: lane 0, which says so, may have one that is all NaN.
            rescaled = __any_sync(0xffffffffu, !had_none) || rescaled;
          }
#pragma unroll
          for (float& score : scores[i]) score = exp2_approx(fmaf(score, to_base_2[i], -base[i]));
          sum[i] += over_all(scores[i], plus);
        }
        auto& factors = smem.factors[turn % 2];
        smem.weights_empty[turn % 2].wait(turn / 2 % 2 ^ 1);
        const ScoresThread<kRows> now;
        if (now.lane == 0) factors.rescaled[now.warp] = rescaled;
#pragma unroll
        for (int i = 0; i < kOfThread; ++i) {
          write_weights(smem.weights[turn % 2][0], now.warp * now.kWarpRows + i * 8, now.lane,
                        scores[i]);
          const float total = last ? reduce_quad(sum[i], plus) : 0;
          if (now.lane % 4 == 0) {
            const int at = row_slot<kRows>(now.row() + i * 8);
            factors.rescale[at] = rescale[i];
            if (last) {
              const float values = kBlocks ? 1 : p.k_scale[work.group];
              factors.inverse[at] = over_total(total, values);
            }
          }
        }
        if constexpr (!kReaderFences<kRows>) cutlass::arch::fence_view_async_shared();
        smem.weights_full[turn % 2].arrive();
        ++turn;
      };
      const auto finish = [&](auto& keys, auto& scores) __attribute__((always_inline)) {
        products.finish(keys, smem.scales[slot.slot], scores);
        slot.advance();
      };
      wait_for_keys<kSource>(smem.ready(slot.slot), slot.parity);
      products.issue_first(smem.blocks[slot.slot]);
#pragma unroll 1
      for (int block = item.first; block + 1 < item.last; ++block) {
        auto& keys = smem.blocks[slot.slot];
        float scores[kOfThread][16];
        finish(keys, scores);
        wait_for_keys<kSource>(smem.ready(slot.slot), slot.parity);
        products.issue_first(smem.blocks[slot.slot]);
        attend(block, keys, scores, false);
      }
      auto& keys = smem.blocks[slot.slot];
      float scores[kOfThread][16];
      finish(keys, scores);
      attend(item.last - 1, keys, scores, true);
    }
    const ScoresThread<kRows> writer;
    const Item done = find_item<true>(p, work, seq);  // anew: registers are scarce
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const float total = reduce_quad(sum[i], plus);
      const int row = work.tile * kRows + writer.row() + i * 8;
      if (writer.lane % 4 == 0 && row < p.num_rows() && done.slot != Item::kEmpty) {
        *lse_target(p, work, done, row) = stored_lse(done, log_sum_exp(base[i], total));
      }
    }
  }
}

}  // namespace jax_flashmla
