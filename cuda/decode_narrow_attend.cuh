// The warps of the split kernel for few query rows that multiply, and what each does with a block.
#pragma once

#include "cuda/decode_gather.cuh"
#include "cuda/decode_narrow_shared.cuh"
#include "cuda/decode_softmax.cuh"
#include "cuda/decode_store.cuh"

namespace jax_flashmla {

// The scores of all rows with the warp's eight keys, column after column as they land. An item's
// first block, with `kRead`, also brings the queries, each tile when it is needed.
template <bool kRead, Source kSource, typename Element>
__device__ __forceinline__ float4 compute_scores(NarrowMemory<kSource, Element>& smem,
                                                 Ring<kChunkSlots<kSource>> chunk,
                                                 const Ring<kRopeSlots>& rope, int warp, int lane,
                                                 Queries& q) {
  float4 sums[4] = {};  // products that do not wait for each other
  const auto add_tile = [&](int tile, Element* keys) __attribute__((always_inline)) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t b[2][2];
      read_keys(keys, warp * kWarpKeys, pair, lane, b);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int step = pair * 2 + i;
        multiply_add<Element>(sums[step], q.a[tile * 4 + step], b[i]);
      }
    }
  };
  const auto read_queries = [&](int tile) __attribute__((always_inline)) {
    if constexpr (kRead) {
#pragma unroll
      for (int i = 0; i < 4; ++i) read_rows(smem.q[tile], i, lane, q.a[tile * 4 + i]);
    }
  };
  read_queries(kRopeTile);
  smem.rope_full[rope.slot].wait(rope.parity);
  add_tile(kRopeTile, smem.rope[rope.slot]);
#pragma unroll
  for (int tile = 0; tile < kValueTiles; ++tile) {
    read_queries(tile);
    if (tile % kKeyBoxTiles == 0) {
      if (tile > 0) chunk.advance();
      smem.chunk_full[chunk.slot].wait(chunk.parity);
    }
    add_tile(tile, smem.chunks[chunk.slot][tile % kKeyBoxTiles]);
  }
  const auto add = [](const float4& x, const float4& y) {
    return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
  };
  return add(add(sums[0], sums[1]), add(sums[2], sums[3]));
}

// Zeroes keys that no row sees, since they may be NaN: as values, 0 * NaN would reach the output.
// Each warp in the tile that it multiplies.
template <typename Element>
__device__ __forceinline__ void clear_keys(Element (&tile)[kTileElements], int begin, int end,
                                           int lane) {
  uint4* vectors = reinterpret_cast<uint4*>(tile);
#pragma unroll 1
  for (int v = begin * 8 + lane; v < end * 8; v += 32) vectors[v] = make_uint4(0, 0, 0, 0);
  __syncwarp();
}

// O += P V for the warp's tile of the value columns.
template <typename Element>
__device__ __forceinline__ void multiply_values(Element (&values)[kTileElements],
                                                Element (&weights)[kNarrowRows * 64], int lane,
                                                float4 (&out)[8]) {
#pragma unroll
  for (int step = 0; step < kBlock / 16; ++step) {
    uint32_t a[4];
    read_rows(weights, step, lane, a);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t b[2][2];
      read_values(values, step, pair, lane, b);
#pragma unroll
      for (int i = 0; i < 2; ++i) multiply_add<Element>(out[pair * 2 + i], a, b[i]);
    }
  }
}

template <Source kSource, bool kWindowed, typename Element>
__device__ __forceinline__ void attend(const KernelParams& p, NarrowMemory<kSource, Element>& smem,
                                       int warp, int lane) {
  const auto larger = [](float x, float y) { return fmaxf(x, y); };
  const auto add = [](float x, float y) { return x + y; };
  const Work& work = smem.work;
  const Quad quad(lane);
  const auto find_hidden = [&](int row) { return hidden_keys(p, p.by_heads_per_kv.div(row)); };
  const int hidden[2] = {find_hidden(quad.row), find_hidden(quad.row + 8)};
  Ring<kChunkSlots<kSource>> chunk;
  Ring<kRopeSlots> rope;
  uint32_t q_parity = 0;
  // Of memory that the copy engine writes next. Without a fence, an arrival overtakes reads before
  // it.
  const auto release_after_reads = [&](const EmptyBarrier& barrier) {
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    release<1>(barrier, lane);
  };
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<kWindowed>(p, work, seq);
    const int64_t tile = partial_tile(p, work, item, 0);
    float* lse[2] = {};  // found while the keys are on their way
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = quad.row + 8 * i;
      const bool mine = warp == 0 && lane % 4 == 0 && row < p.num_rows();
      if (mine && item.slot != Item::kEmpty) lse[i] = lse_target(p, work, item, row);
    }
    float max[2] = {-FLT_MAX, -FLT_MAX};
    float sum[2] = {0, 0};
    float inverse[2] = {0, 0};
    float4 out[8] = {};
    Queries q;
    if (item.blocks() > 0 || seq == work.begin_seq) {
      smem.q_full.wait(q_parity);
      q_parity ^= 1;
      if (item.blocks() == 0) release_after_reads(smem.q_empty);
    }
#pragma unroll 1
    for (int block = item.first; block < item.last; ++block) {
      float4 raw;
      if (block == item.first) {
        raw = compute_scores<true>(smem, chunk, rope, warp, lane, q);
        release_after_reads(smem.q_empty);
      } else {
        raw = compute_scores<false>(smem, chunk, rope, warp, lane, q);
      }
      if (kWindowed && p.logits_soft_cap > 0)
        raw = {capped(p, raw.x), capped(p, raw.y), capped(p, raw.z), capped(p, raw.w)};
      float scores[2][2] = {{raw.x, raw.y}, {raw.z, raw.w}};
      const BlockView<kWindowed> view(p, item, block);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = warp * kWarpKeys + quad.column + j;
          const bool seen = view.whole || view.seen(p, key, hidden[i]);
          scores[i][j] = seen ? scores[i][j] * p.score_scale : -INFINITY;
        }
        const float top = reduce_quad(fmaxf(scores[i][0], scores[i][1]), larger);
        if (lane % 4 == 0) smem.maxima[quad.row + 8 * i][warp] = top;
      }
      sync_math();  // so the rotary tile has been read, too
      if (kSource == Source::kRows || threadIdx.x == 0) smem.rope_empty[rope.slot].arrive();
      rope.advance();
      float factor[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float top = reduce_eight(smem.maxima[quad.row + 8 * i], larger);
        const float base = top > max[i] + kMaxLag ? top : max[i];
        factor[i] = exp2_approx(max[i] - base);
        max[i] = base;
        const float first = exp2_approx(scores[i][0] - base);
        const float second = exp2_approx(scores[i][1] - base);
        sum[i] = sum[i] * factor[i] + first + second;
        Element pair[2] = {Element(first), Element(second)};
        Element* row = reinterpret_cast<Element*>(&vector_at(smem.weights, quad.row + 8 * i, warp));
        *reinterpret_cast<uint32_t*>(row + quad.column) = *reinterpret_cast<uint32_t*>(pair);
        smem.sums[quad.row + 8 * i][warp * 4 + lane % 4] = sum[i];
      }
      auto mine = chunk;  // where the warp's tile of the values lies
      mine.advance(warp / kKeyBoxTiles);
      auto& values = smem.chunks[mine.slot][warp % kKeyBoxTiles];
      if (!view.whole) {
        if (view.unseen > 0) clear_keys(values, 0, view.unseen, lane);
        if (view.left < kBlock) clear_keys(values, view.left, kBlock, lane);
      }
      // The output is still zero before the first block.
      const bool rescale = factor[0] != 1 || factor[1] != 1;
      if (block > item.first && __any_sync(0xffffffffu, rescale)) scale_rows(out, factor);
      sync_math();
      const bool last = block + 1 == item.last;
      if (last) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sum[i] = reduce_eight(smem.sums[quad.row + 8 * i] + lane % 4 * 8, add);
        }
      }
      multiply_values(values, smem.weights, lane, out);
      if (last) {  // and while these are under way
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sum[i] = reduce_quad(sum[i], add);
          inverse[i] = over_total(sum[i]);
        }
      }
      if constexpr (kSource == Source::kPages) {
        release_after_reads(smem.chunk_empty[mine.slot]);
      } else {
        smem.chunk_empty[mine.slot].arrive();
      }
      chunk.advance(kChunks);
    }
    write_output<Element, 8>(p, work, item, tile, 0, warp * 8, lane, inverse,
                             [&](int i) { return out[i]; });
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (lse[i] != nullptr) *lse[i] = stored_lse(item, log_sum_exp(max[i], sum[i]));
    }
  }
}

}  // namespace jax_flashmla
