// The value warpgroups of the wide split kernel: O = P V, each its half of the columns.
#pragma once

#include "cuda/decode_shared.cuh"
#include "cuda/decode_store.cuh"

namespace jax_flashmla {

template <typename Element>
using ValuesMma =
    decltype(make_tiled_mma(GMMA::ss_op_selector<Element, Element, float, Shape<_64, _128, _16>,
                                                 GMMA::Major::K, GMMA::Major::MN>()));

// Multiplies the rows of an accumulator by `factor`, unless nothing would change.
template <typename Accumulator>
__device__ __forceinline__ void rescale(Accumulator& acc, const float (&factor)[2]) {
  if (__all_sync(0xffffffffu, factor[0] == 1.0f && factor[1] == 1.0f)) return;
#pragma unroll
  for (int i = 0; i < size(acc); ++i) acc(i) *= factor[i / 2 % 2];
}

// Issues O += P V for one part of the columns.
template <typename Element, typename Accumulator>
__device__ __forceinline__ void issue_values(Element (&weights)[kTileElements], Element* values,
                                             int thread, Accumulator&& slice_of_out) {
  ValuesMma<Element> mma;
  const auto slice = mma.get_slice(thread);
  Tensor p = make_tensor(make_smem_ptr(weights), TileLayout<Element>{});
  Tensor v = make_tensor(make_smem_ptr(values), ValueLayout<Element>{});
  Tensor a = slice.partition_fragment_A(p);
  Tensor b = slice.partition_fragment_B(v);
  Tensor out = make_tensor(slice_of_out.data(), append<3>(slice_of_out.layout()));
#pragma unroll
  for (int step = 0; step < size<2>(a); ++step) {
    cute::gemm(mma, a(_, _, step), b(_, _, step), out);
  }
  warpgroup_commit_batch();
}

template <int kCtas, Source kSource, typename Element>
__device__ __forceinline__ void run_values(const KernelParams& p, SharedMemory<Element>& smem,
                                           int side, int thread) {
  const Work& work = smem.work;
  const Rows rows(thread);
  const int lane = thread % 32;
  Ring<kHalfSlots> half;
  Ring<kRopeSlots> rope;
  Tensor out = partition_fragment_C(ValuesMma<Element>{}, Shape<_64, Int<kHalfTiles * 64>>{});
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    clear(out);
    float inverse[2] = {0, 0};
    const auto write = [&](int part) __attribute__((always_inline)) {
      const auto get = [&](int i) __attribute__((always_inline)) {
        const int at = part * (kPartTiles * 32) + 4 * i;
        return make_float4(out(at), out(at + 1), out(at + 2), out(at + 3));
      };
      constexpr int kCount = kPartTiles * 64 / kPartialColumns;
      const int row = work.tile * kRowTile + thread / 32 * 16;
      const int64_t tile = partial_tile(p, work, item, row / kPartialRows);
      write_output<Element, kCount>(p, work, item, tile, row, (side * kParts + part) * kCount, lane,
                                    inverse, get);
    };
    if (item.blocks() > 0) half.advance();  // the queries
#pragma unroll 1
    for (int block = item.first; block < item.last; ++block) {
      if (side == kRight) half.advance();
      const auto& weights = smem.weights[rope.slot];
      (side == kLeft ? weights.first : weights.rest).wait(rope.parity);
      float factor[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        factor[i] = smem.factor[rope.slot][rows.row(i)];
        if (block + 1 == item.last) inverse[i] = smem.inverse[rope.slot][rows.row(i)];
      }
      rescale(out, factor);
      // Published weights say that the block's tiles have landed, too.
      warpgroup_fence_operand(out);
      warpgroup_arrive();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (part == 1) weights.rest.wait(rope.parity);
        issue_values(smem.rope[rope.slot], smem.halves[half.slot][part * kPartTiles], thread,
                     out(_, _, part));
      }
      smem.factors_read[rope.slot].arrive();
      warpgroup_wait<1>();
      release<kCtas, kSource>(smem.half_empty[half.slot][0], lane);
      if (block + 1 == item.last) write(0);
      warpgroup_wait<0>();
      release<kCtas, kSource>(smem.half_empty[half.slot][1], lane);
      release<kCtas>(smem.rope_empty[rope.slot], lane);
      warpgroup_fence_operand(out);
      if (side == kLeft) half.advance();
      half.advance();
      rope.advance();
    }
    if (item.blocks() == 0) write(0);
    write(1);
  }
}

}  // namespace jax_flashmla
