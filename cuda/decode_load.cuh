// The loader warp of the split kernel: queries and keys, by the copy engine.
#pragma once

#include "cuda/decode_shared.cuh"
#include "cuda/tensor_map.h"

namespace jax_flashmla {

// The CTAs of a cluster work on the same keys. Each loads its share of a block's tiles, for all.
template <int kCtas>
__device__ __forceinline__ void load_tile(const CUtensorMap* map, const FullBarrier& barrier,
                                          void* target, int tile, int head, int page, int group) {
  constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_FIRST);
  auto* const full = reinterpret_cast<uint64_t*>(const_cast<FullBarrier*>(&barrier));
  if constexpr (kCtas == 1) {
    SM90_TMA_LOAD_5D::copy(map, full, kHint, target, tile * 64, 0, head, page, group);
  } else {
    SM90_TMA_LOAD_MULTICAST_5D::copy(map, full, (1 << kCtas) - 1, kHint, target, tile * 64, 0, head,
                                     page, group);
  }
}

// One lane per tile issues the copies of a row tile's queries: boxes of rows that are neighbours in
// memory. The left half goes into the ring of halves.
template <typename Element>
__device__ void load_queries(const DecodeParams& p, const TensorMaps& maps,
                             SharedMemory<Element>& smem, const Work& work, int seq,
                             const Ring<kHalfSlots>& half, uint32_t q_parity, int lane) {
  constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
  const int box = maps.q_box_rows;
  const int boxes = (min(p.num_rows() - work.tile * kRowTile, kRowTile) + box - 1) / box;
  const auto load = [&](FullBarrier& barrier, Element* target, int tile) {
    const CUtensorMap* map = tile == kRopeTile ? &maps.q_rope : &maps.q_nope;
    const int column = tile == kRopeTile ? 0 : tile * 64;
#pragma unroll 1
    for (int i = 0; i < boxes; ++i) {
      const int64_t row = query_index(p, work, seq, work.tile * kRowTile + i * box);
      SM90_TMA_LOAD_2D::copy(map, reinterpret_cast<uint64_t*>(&barrier), kHint,
                             target + i * box * 64, column, static_cast<int32_t>(row));
    }
  };
  const int tile_bytes = boxes * box * 128;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    smem.half_empty[half.slot][part].wait(half.parity ^ 1);
  }
  if (lane < kHalfTiles) {
    FullBarrier& barrier = smem.half_full[half.slot][lane];
    barrier.arrive_and_expect_tx(tile_bytes);
    load(barrier, smem.halves[half.slot][lane], lane);
  }
  smem.q_empty.wait(q_parity ^ 1);
  if (lane == 0) smem.q_full.arrive_and_expect_tx((kTiles - kHalfTiles) * tile_bytes);
  __syncwarp();
  if (lane < kTiles - kHalfTiles) load(smem.q_full, smem.q[lane], kHalfTiles + lane);
  __syncwarp();
}

// One warp: walks the same items and blocks as the others, in order.
template <int kCtas, typename Element>
__device__ void run_loader(const DecodeParams& p, const TensorMaps& maps,
                           SharedMemory<Element>& smem, int lane) {
  const Work& work = smem.work;
  // Whether this CTA loads a tile with this number for its cluster.
  const auto loads = [&](int number) { return kCtas == 1 || (number + work.tile) % kCtas == 0; };
  Ring<kHalfSlots> half;
  Ring<kRopeSlots> rope;
  uint32_t q_parity = 0;
  const auto load_half = [&](int page, int first_tile) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      smem.half_empty[half.slot][part].wait(half.parity ^ 1);
      if (lane / kPartTiles == part) {
        FullBarrier& barrier = smem.half_full[half.slot][lane];
        barrier.arrive_and_expect_tx(kTileBytes);
        if (loads(lane)) {
          load_tile<kCtas>(&maps.keys, barrier, smem.halves[half.slot][lane], first_tile + lane,
                           work.head, page, work.group);
        }
      }
      __syncwarp();
    }
    half.advance();
  };
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item(p, work, seq);
    if (item.blocks() == 0) continue;
    const int32_t* table =
        p.block_table + (static_cast<int64_t>(work.group) * p.batch + seq) * p.max_blocks;
    const auto load_pages = [&](int first) {
      return first + lane < item.last ? table[first + lane] : 0;
    };
    int pages = load_pages(item.first);  // of 32 blocks, one in each lane
    load_queries(p, maps, smem, work, seq, half, q_parity, lane);
    half.advance();
    q_parity ^= 1;
#pragma unroll 1
    for (int i = 0; i < item.blocks(); ++i) {
      if (i > 0 && i % 32 == 0) pages = load_pages(item.first + i);
      const int page = __shfl_sync(0xffffffffu, pages, i % 32);
      load_half(page, 0);
      load_half(page, kHalfTiles);
      smem.rope_empty[rope.slot].wait(rope.parity ^ 1);
      if (lane == 0) {
        FullBarrier& barrier = smem.rope_full[rope.slot];
        barrier.arrive_and_expect_tx(kTileBytes);
        if (loads(i)) {
          load_tile<kCtas>(&maps.keys, barrier, smem.rope[rope.slot], kRopeTile, work.head, page,
                           work.group);
        }
      }
      __syncwarp();
      rope.advance();
    }
  }
}

// All threads, once: zeroes the rows of q that do not exist; no sequence writes them.
template <typename Element>
__device__ __forceinline__ void clear_missing_rows(const DecodeParams& p,
                                                   SharedMemory<Element>& smem, const Work& work) {
  const int rows = min(p.num_rows() - work.tile * kRowTile, kRowTile);
#pragma unroll 1
  for (int tile = 0; tile < kTiles - kHalfTiles; ++tile) {
    uint4* vectors = reinterpret_cast<uint4*>(smem.q[tile]);
#pragma unroll 1
    for (int i = rows * 8 + threadIdx.x; i < kRowTile * 8; i += kThreads) {
      vectors[i] = make_uint4(0, 0, 0, 0);
    }
  }
  cutlass::arch::fence_view_async_shared();
}

}  // namespace jax_flashmla
