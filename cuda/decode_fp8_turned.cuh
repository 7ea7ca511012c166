// The scores warpgroup of the split kernel for FP8 caches, of up to 16 query rows: S^T = K Q^T.
// Both pieces of a query are columns of one product, none is padding, and a thread has few keys to
// look scales up of. Keys of fp8_block come through registers (see RowsBlock).
#pragma once

#include "cuda/decode_fp8_scores.cuh"

namespace jax_flashmla {

inline constexpr int kTurnedColumns = kPieces * kNarrowRows;
using TurnedMma = SharedMma<E4M3, kTurnedColumns>;

// Which of the threads that compute scores this is. Of a block it has two keys, eight apart, of two
// query rows of every eight.
inline constexpr int kTurnedRows = kNarrowRows / 4;
using TurnedBlockScores = float[kTurnedRows][2];
struct TurnedThread : ThreadNow {
  __device__ __forceinline__ int key(int i) const { return warp * 16 + i * 8 + lane / 4; }
  __device__ __forceinline__ int row(int i) const { return i / 2 * 8 + lane % 4 * 2 + i % 2; }
  // Of numbers in the order of `row_slot`, those of its rows.
  __device__ __forceinline__ float4& of_rows(float (&numbers)[kNarrowRows]) const {
    return reinterpret_cast<float4*>(numbers)[lane % 4];
  }
  // Whether it writes what all threads know of its rows.
  __device__ __forceinline__ bool writes() const { return warp == 0 && lane < 4; }
};
static_assert(kTurnedRows == 4, "a vector");

// The products of a block, a batch for each tile's columns: the tensor cores add e4m3 products up
// with some 14 bits, so that not many should come together before they are added to a float32. All
// of the next block, or the last two batches, are under way while the softmax of the one before
// runs.
template <KeyFormat kFormat>
struct TurnedScores {
  static constexpr bool kBlocks = kFormat == KeyFormat::kFp8Block;
  using Memory = Fp8Memory<kNarrowRows, kFormat>;
  using Block = typename Memory::Block;

  Memory& smem;
  decltype(partition_fragment_C(TurnedMma{}, Shape<_64, Int<kTurnedColumns>>{})) sums[kFp8Tiles];
  // The rotary columns of fp8_block have no scale and another type.
  using RopeMma = RegisterMma<bfloat16_t, kNarrowRows>;
  decltype(partition_fragment_C(RopeMma{}, Shape<_64, Int<kNarrowRows>>{})) rope;

  __device__ __forceinline__ explicit TurnedScores(Memory& smem) : smem(smem) {}

  __device__ __forceinline__ void issue(Block& block) {
    fence();
    if constexpr (kBlocks) {
      issue_registers(block);
    } else {
      issue_shared(block);
    }
  }

  // Waits for all products and adds them up. `q_scale`: of pieces; `of_keys`: the keys' scales.
  __device__ __forceinline__ void finish(const float (&q_scale)[kTurnedRows],
                                         const float (&of_keys)[2][kFp8Tiles],
                                         TurnedBlockScores& scores) {
    warpgroup_wait<0>();
    fence();
#pragma unroll
    for (int row = 0; row < kTurnedRows; ++row) {
#pragma unroll
      for (int key = 0; key < 2; ++key) {
        const int high = row / 2 * 4 + key * 2 + row % 2, low = high + kNarrowRows / 2;
        float score = 0;
#pragma unroll
        for (int tile = 0; tile < kFp8Tiles; ++tile) {
          if (kBlocks) {
            const float sum = fmaf(sums[tile](low), kLowPiece, sums[tile](high));
            score = fmaf(sum, of_keys[key][tile], score);
          } else {
            score = fmaf(sums[tile](low), kLowPiece, score) + sums[tile](high);
          }
        }
        if (kBlocks) score = fmaf(score, q_scale[row], rope(high));
        scores[row][key] = score;
      }
    }
  }

 private:
  __device__ __forceinline__ void issue_shared(Block& block) {
    warpgroup_arrive();
#pragma unroll
    for (int tile = 0; tile < kFp8Tiles; ++tile) {
      TurnedMma mma;
      mma.accumulate_ = GMMA::ScaleOut::Zero;
      multiply_shared<WideRows<E4M3>>(mma, block.latent[tile], smem.q.latent[tile], sums[tile]);
      if (tile + 1 == kFp8Tiles) {
        multiply_shared<ShortRows>(mma, block.rope, smem.q.rope, sums[tile]);
      }
    }
    warpgroup_commit_batch();
  }

  __device__ __forceinline__ void issue_registers(Block& block) {
    const TurnedThread now;
    uint8_t* const line = block.rows[now.warp * 16 + now.lane % 16] + now.lane / 16 * 16;
    uint32_t keys[2][16];  // of a batch: 128 bytes of a warp's 16 keys
    const auto read = [&](int batch) __attribute__((always_inline)) {
      // The rotary columns are behind the scales.
      uint8_t* const from = line + batch * 128 + (batch == kFp8Tiles ? kScaleBytes : 0);
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        auto& four = keys[batch % 2];
        SM75_U32x4_LDSM_N::copy(*reinterpret_cast<uint128_t*>(from + i * 8), four[i], four[i + 1],
                                four[i + 2], four[i + 3]);
      }
    };
    read(0);
#pragma unroll
    for (int batch = 0; batch <= kFp8Tiles; ++batch) {
      auto& mine = keys[batch % 2];
      warpgroup_arrive();
      if (batch < kFp8Tiles) {
        multiply<RegisterMma<E4M3, kTurnedColumns>>(mine, smem.q.latent[batch], sums[batch]);
      } else {
        multiply<RopeMma>(mine, smem.q.rope, rope);
      }
      warpgroup_commit_batch();
      if (batch == kFp8Tiles) break;
      if (batch > 0) warpgroup_wait<1>();
      read(batch + 1);
    }
  }

  // Of 128 bytes of keys in registers.
  template <typename Mma, typename Sums>
  __device__ __forceinline__ void multiply(uint32_t (&keys)[16], uint8_t* queries, Sums& to) {
    using Element = typename Mma::ValTypeA;
    Mma mma;
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    Tensor a = make_tensor(reinterpret_cast<Element*>(keys),
                           Layout<Shape<Int<16 / sizeof(Element)>, _1, _4>>{});
    multiply_registers<WideRows<Element>>(mma, a, 0, queries, to);
  }

  __device__ __forceinline__ void fence() {
#pragma unroll
    for (auto& of_tile : sums) warpgroup_fence_operand(of_tile);
    if constexpr (kBlocks) warpgroup_fence_operand(rope);
  }
};

// Whether it holds for any thread of the warpgroup.
__device__ __forceinline__ bool any_of_scores(bool mine) {
  int any;
  asm volatile(
      "{\n.reg .pred mine, any;\nsetp.ne.b32 mine, %1, 0;\n"
      "barrier.cta.red.or.pred any, %2, %3, mine;\nselp.b32 %0, 1, 0, any;\n}"
      : "=r"(any)
      : "r"(int{mine}),
        "n"(kScoresBarrier +
            static_cast<int>(cutlass::arch::NamedBarrier::ReservedNamedBarrierCount)),
        "n"(kWarpgroup)
      : "memory");
  return any != 0;
}

// Combines what threads have of each row over all keys. `buffer`: nobody reads it any more.
template <typename Combine>
__device__ __forceinline__ void over_keys(float (&of_rows)[kTurnedRows],
                                          float (&buffer)[kWarps][kNarrowRows],
                                          const Combine& combine) {
#pragma unroll
  for (float& x : of_rows) {
#pragma unroll
    for (int by = 4; by < 32; by *= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, by));
  }
  const TurnedThread now;
  auto& vector = reinterpret_cast<float4&>(of_rows);
  if (now.lane < 4) now.of_rows(buffer[now.warp]) = vector;
  sync_scores();
  vector = now.of_rows(buffer[0]);
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) {
    const float4 other = now.of_rows(buffer[warp]);
    vector = {combine(vector.x, other.x), combine(vector.y, other.y), combine(vector.z, other.z),
              combine(vector.w, other.w)};
  }
}

// Writes the weights of a thread's keys: matrices of eight keys and eight rows, transposed. Where
// they are written for each tile, they have its scales in them.
template <int kTiles>
__device__ __forceinline__ void write_turned_weights(half_t (&p)[kTiles][kNarrowRows * kBlock],
                                                     const float (&of_keys)[2][kFp8Tiles],
                                                     const TurnedBlockScores& weights) {
  const TurnedThread now;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = i % 2, row = i / 2 * 2;
      pairs[i] = as_half2(weights[row][key], weights[row + 1][key]);
      if constexpr (kTiles > 1) {
        const uint32_t scale = as_half2(of_keys[key][tile], of_keys[key][tile]);
        asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(pairs[i]) : "r"(scale));
      }
    }
    SM90_U16x8_STSM_T::copy(
        pairs[0], pairs[1], pairs[2], pairs[3],
        vector_at(p[tile], now.lane / 16 * 8 + now.lane % 8, now.warp * 2 + now.lane / 8 % 2));
  }
}

template <KeyFormat kFormat, typename Element>
__device__ __forceinline__ void run_turned_scores(const KernelParams& p,
                                                  Fp8Memory<kNarrowRows, kFormat>& smem,
                                                  int thread) {
  constexpr bool kBlocks = kFormat == KeyFormat::kFp8Block;
  const auto larger = [](float x, float y) { return fmaxf(x, y); };
  const auto plus = [](float x, float y) { return x + y; };
  const Work& work = smem.work;
  Ring<smem.kSlots> slot;
  Ring<2> turn;
  QueryVectors<kBlocks, Element> queries;
  if (has_item(work, work.begin_seq)) queries.load(p, work, work.begin_seq, thread);
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    float base[kTurnedRows];             // what weights are relative to, base 2
    alignas(16) float sum[kTurnedRows];  // of them, this thread's part; in the end, all
#pragma unroll
    for (int i = 0; i < kTurnedRows; ++i) base[i] = -FLT_MAX, sum[i] = 0;
    sync_scores();  // nobody needs the queries before
    queries.store(p, work, smem.q, thread);
    cutlass::arch::fence_view_async_shared();
    sync_scores();
    if (has_item(work, seq + 1)) queries.load(p, work, seq + 1, thread);
    if (item.blocks() > 0) {
      alignas(16) float q_scale[kTurnedRows];
      reinterpret_cast<float4&>(q_scale) = TurnedThread().of_rows(smem.q.scale);
      TurnedScores<kFormat> products(smem);
      const auto attend = [&](int block, auto& keys, auto& of_keys, auto& scores,
                              bool last) __attribute__((always_inline)) {
        const BlockView<true> view(p, item, block);
        const TurnedThread now;
        float to_base_2[kTurnedRows];
        bool above = false;
#pragma unroll
        for (int i = 0; i < kTurnedRows; ++i) {
          const float scale = kBlocks ? 1 : q_scale[i];
          to_base_2[i] = scale * p.score_scale;
          // Below, the largest score is taken for the largest of base 2.
          if (!view.whole || p.logits_soft_cap > 0 || !(p.score_scale > 0)) {
            const int row = work.tile * kNarrowRows + now.row(i);
            const int hidden = hidden_keys(p, p.by_heads_per_kv.div(row));
            finish_scores(p, view, hidden, scale, scores[i], [&](int key) { return now.key(key); });
            to_base_2[i] = 1;
          }
          above = above || fmaxf(scores[i][0], scores[i][1]) * to_base_2[i] > base[i] + kMaxLag;
        }
        bool rescaled = false;
        alignas(16) float rescale[kTurnedRows] = {1, 1, 1, 1};
        if (any_of_scores(above)) {  // nearly always the maximum before is still good
          alignas(16) float top[kTurnedRows];
#pragma unroll
          for (int i = 0; i < kTurnedRows; ++i) {
            top[i] = fmaxf(scores[i][0], scores[i][1]) * to_base_2[i];
          }
          over_keys(top, smem.q.tops, larger);
#pragma unroll
          for (int i = 0; i < kTurnedRows; ++i) {
            const float before = base[i];
            base[i] = top[i] > base[i] + kMaxLag ? top[i] : base[i];
            const bool had_none = before == -FLT_MAX;  // nor has the output anything of the row
            rescale[i] = had_none ? 1 : exp2_approx(before - base[i]);
            sum[i] *= rescale[i];
            rescaled = rescaled || !had_none;
          }
          // By any of the rows: lane 0, which says so, may have some that are all NaN.
          rescaled = __any_sync(0xffffffffu, rescaled);
        }
        if (!view.whole) clear_unseen(keys, view);  // all have met since they read keys
#pragma unroll
        for (int i = 0; i < kTurnedRows; ++i) {
#pragma unroll
          for (float& score : scores[i]) score = exp2_approx(fmaf(score, to_base_2[i], -base[i]));
          sum[i] += scores[i][0] + scores[i][1];
        }
        if (last) over_keys(sum, smem.q.sums, plus);
        auto& factors = smem.factors[turn.slot];
        smem.weights_empty[turn.slot].wait(turn.parity ^ 1);
        write_turned_weights(smem.weights[turn.slot], of_keys, scores);
        if (now.lane == 0) factors.rescaled[now.warp] = rescaled;
        if (now.writes()) {
          now.of_rows(factors.rescale) = reinterpret_cast<const float4&>(rescale);
          if (last) {
            const float values = kBlocks ? 1 : p.k_scale[work.group];
            alignas(16) float inverse[kTurnedRows];
#pragma unroll
            for (int i = 0; i < kTurnedRows; ++i) {
              inverse[i] = over_total(sum[i], values);
            }
            now.of_rows(factors.inverse) = reinterpret_cast<const float4&>(inverse);
          }
        }
        smem.weights_full[turn.slot].arrive();
        turn.advance();
      };
      // Waits for the products of a block, of which `of_keys` becomes what weights are multiplied
      // with.
      const auto finish = [&](auto& of_keys, auto& scores) __attribute__((always_inline)) {
        if constexpr (kBlocks) {
          auto& scales = smem.scales[slot.slot];
          const TurnedThread now;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            reinterpret_cast<float4&>(of_keys[i]) =
                reinterpret_cast<const float4&>(scales.of_keys[now.key(i)]);
          }
          products.finish(q_scale, of_keys, scores);
#pragma unroll
          for (int tile = 0; tile < kFp8Tiles; ++tile) {
            of_keys[0][tile] *= scales.inverse[tile], of_keys[1][tile] *= scales.inverse[tile];
          }
        } else {
          products.finish(q_scale, of_keys, scores);
        }
        slot.advance();
      };
      smem.ready(slot.slot).wait(slot.parity);
      products.issue(smem.blocks[slot.slot]);
#pragma unroll 1
      for (int block = item.first; block + 1 < item.last; ++block) {
        auto& keys = smem.blocks[slot.slot];
        alignas(16) float of_keys[2][kFp8Tiles];
        TurnedBlockScores scores;
        finish(of_keys, scores);
        smem.ready(slot.slot).wait(slot.parity);
        products.issue(smem.blocks[slot.slot]);
        attend(block, keys, of_keys, scores, false);
      }
      auto& keys = smem.blocks[slot.slot];
      alignas(16) float of_keys[2][kFp8Tiles];
      TurnedBlockScores scores;
      finish(of_keys, scores);
      attend(item.last - 1, keys, of_keys, scores, true);
    }
    const TurnedThread now;
    if (now.writes() && item.slot != Item::kEmpty) {
#pragma unroll
      for (int i = 0; i < kTurnedRows; ++i) {
        const int row = work.tile * kNarrowRows + now.row(i);
        if (row >= p.num_rows()) continue;
        *lse_target(p, work, item, row) = stored_lse(item, log_sum_exp(base[i], sum[i]));
      }
    }
  }
}

}  // namespace jax_flashmla
