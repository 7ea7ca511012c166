// The warps of the split kernel for FP8 caches that multiply. A block goes the way of the narrow
// kernel; see decode_narrow_attend.cuh.
#pragma once

#include "cuda/decode_fp8_products.cuh"
#include "cuda/decode_softmax.cuh"
#include "cuda/decode_store.cuh"

namespace jax_flashmla {

// Writes a warp's 64 columns: see `write_output`, whose order of partial results it keeps. `row`:
// the first of all of the KV head.
template <typename Element>
__device__ __forceinline__ void write_fp8_output(const KernelParams& p, const Work& work,
                                                 const Item& item, int row, int warp, int lane,
                                                 const float4 (&out)[8]) {
  keep_nothing_of(lane);
  if (item.slot == Item::kEmpty) return;
  const int column = warp * 64 + lane % 4 * 4;
  if (item.slot >= 0) {
    // Lane, then the next one, of the tile of eight columns that the first of the four is in.
    float4* const partial =
        reinterpret_cast<float4*>(p.partial_out) +
        (partial_tile(p, work, item, work.tile) * (kLatentDim / kPartialColumns) +
         column / kPartialColumns) *
            32 +
        lane / 4 * 4 + column % kPartialColumns / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 even = out[2 * i], odd = out[2 * i + 1];
      partial[i * 64] = make_float4(even.x, odd.x, even.z, odd.z);
      partial[i * 64 + 1] = make_float4(even.y, odd.y, even.w, odd.w);
    }
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int my_row = row + lane / 4 + 8 * half;
    if (my_row >= p.num_rows()) return;
    Element* const target =
        static_cast<Element*>(p.out) + query_index(p, work, item.seq, my_row) * kLatentDim + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 even = out[2 * i], odd = out[2 * i + 1];
      const Element four[4] = {
          Element(half == 0 ? even.x : even.z), Element(half == 0 ? odd.x : odd.z),
          Element(half == 0 ? even.y : even.w), Element(half == 0 ? odd.y : odd.w)};
      *reinterpret_cast<uint2*>(target + i * 16) = *reinterpret_cast<const uint2*>(four);
    }
  }
}

// Writes the weights of a row and of two neighbouring keys of a block; of fp8_block for each tile
// of the values, times its scale of the key.
template <KeyFormat kFormat, typename Element>
__device__ __forceinline__ void write_weights(Fp8Memory<kFormat, Element>& smem,
                                              const float4* scales, int row, int warp, int column,
                                              const float (&weights)[2]) {
#pragma unroll
  for (int tile = 0; tile < smem.kWeights; ++tile) {
    float scaled[2] = {weights[0], weights[1]};
    if constexpr (kFormat == KeyFormat::kFp8Block) {
      const float4* of_keys = &scales[warp * kWarpKeys + column];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        scaled[k] *= reinterpret_cast<const float*>(of_keys + k)[tile] * kWeightScale;
      }
    }
    const Weight<kFormat> pair[2] = {Weight<kFormat>(scaled[0]), Weight<kFormat>(scaled[1])};
    auto* target = reinterpret_cast<Weight<kFormat>*>(&vector_at(smem.weights[tile], row, warp));
    *reinterpret_cast<uint32_t*>(target + column) = *reinterpret_cast<const uint32_t*>(pair);
  }
}

__device__ __forceinline__ void write_fp8_lse(const KernelParams& p, const Work& work,
                                              const Item& item, int first_row, int lane,
                                              const float (&max)[2], const float (&sum)[2]) {
  keep_nothing_of(lane);
  if (item.slot == Item::kEmpty || lane % 4 != 0) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + lane / 4 + 8 * i;
    if (row >= p.num_rows()) return;
    const float value = sum[i] == 0 ? -INFINITY : max[i] + __log2f(sum[i]);
    *lse_target(p, work, item, row) = stored_lse(item, value);
  }
}

template <KeyFormat kFormat, typename Element>
__device__ __forceinline__ void attend_fp8(const KernelParams& p, Fp8Memory<kFormat, Element>& smem,
                                           int warp, int lane) {
  const auto larger = [](float x, float y) { return fmaxf(x, y); };
  const auto add = [](float x, float y) { return x + y; };
  const Work& work = smem.work;
  const Quad quad(lane);
  const int first_row = work.tile * kNarrowRows;
  Ring<kFp8Slots> slot;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    float max[2] = {-FLT_MAX, -FLT_MAX};
    float sum[2] = {0, 0};
    float4 out[8] = {};
    if (item.blocks() > 0) {
      Queries q;
      float q_scale[2];
      write_queries(p, smem, work, seq, warp, lane);
      sync_math();
      read_queries(smem, lane, q);
      const float scale = kFormat == KeyFormat::kFp8PerTensor ? p.k_scale[work.group] : 1;
#pragma unroll
      for (int i = 0; i < 2; ++i) q_scale[i] = smem.q_scale[quad.row + 8 * i] * scale;
      int before = 0;
#pragma unroll 1
      for (int number = item.first; number < item.last; ++number) {
        smem.full[slot.slot].wait(slot.parity);
        Products<kFormat, Element> products;
        if (number == item.first) {
          multiply<true, false>(smem, slot.slot, 0, warp, lane, q, products, out);
        } else {
          multiply<true, true>(smem, slot.slot, before, warp, lane, q, products, out);
          __syncwarp();
          release<1>(smem.empty[before], lane);
        }
        before = slot.slot;
        slot.advance();
        float4 raw = products.total(q_scale);
        if (p.cap_scale != 0)
          raw = {capped(p, raw.x), capped(p, raw.y), capped(p, raw.z), capped(p, raw.w)};
        float scores[2][2] = {{raw.x, raw.y}, {raw.z, raw.w}};
        const BlockView<true> view(p, item, number);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int key = warp * kWarpKeys + quad.column + j;
            bool seen = view.whole;
            if (!seen) {
              const int token = p.by_heads_per_kv.div(first_row + quad.row + 8 * i);
              seen = view.seen(p, key, hidden_keys(p, token));
            }
            scores[i][j] = seen ? scores[i][j] * p.score_scale : -INFINITY;
          }
          const float top = reduce_quad(fmaxf(scores[i][0], scores[i][1]), larger);
          if (lane % 4 == 0) smem.maxima[quad.row + 8 * i][warp] = top;
        }
        sync_math();  // so the weights of the block before have been read, too
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = quad.row + 8 * i;
          const float top = reduce_eight(smem.maxima[row], larger);
          const float base = top > max[i] + kMaxLag ? top : max[i];
          factor[i] = exp2_approx(max[i] - base);
          max[i] = base;
          const float weights[2] = {exp2_approx(scores[i][0] - base),
                                    exp2_approx(scores[i][1] - base)};
          sum[i] = sum[i] * factor[i] + weights[0] + weights[1];
          write_weights(smem, smem.blocks[before].scales, row, warp, quad.column, weights);
          smem.sums[row][warp * 4 + lane % 4] = sum[i];
        }
        // The output is still zero before the first block.
        const bool rescale = factor[0] != 1 || factor[1] != 1;
        if (number > item.first && __any_sync(0xffffffffu, rescale)) scale_rows(out, factor);
        sync_math();
      }
      Products<kFormat, Element> none;
      multiply<false, true>(smem, 0, before, warp, lane, q, none, out);
      __syncwarp();
      release<1>(smem.empty[before], lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sum[i] = reduce_quad(reduce_eight(smem.sums[quad.row + 8 * i] + lane % 4 * 8, add), add);
      }
    }
    const float value_scale = kFormat == KeyFormat::kFp8Block ? kValueScale : p.k_scale[work.group];
    const auto inverse = [&](float x) { return x == 0 ? 0 : __fdividef(value_scale, x); };
    scale_rows(out, {inverse(sum[0]), inverse(sum[1])});
    write_fp8_output<Element>(p, work, item, first_row, warp, lane, out);
    if (warp == 0) write_fp8_lse(p, work, item, first_row, lane, max, sum);
  }
}

}  // namespace jax_flashmla
