// The loader of the split kernel: queries and keys, by the copy engine. One thread each, since the
// issue of a copy by several lanes of a warp is slow.
#pragma once

#include "cuda/decode_shared.cuh"

namespace jax_flashmla {

// Copies a box of keys that begins with tile `tile`, into every CTA of the cluster: they work on
// the same keys.
template <int kCtas>
__device__ __forceinline__ void load_box(const CUtensorMap* map, FullBarrier& barrier, void* target,
                                         int tile, int head, int page) {
  constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_FIRST);
  auto* const full = reinterpret_cast<uint64_t*>(&barrier);
  if constexpr (kCtas == 1) {
    SM90_TMA_LOAD_5D::copy(map, full, kHint, target, 0, 0, tile, head, page);
  } else {
    SM90_TMA_LOAD_MULTICAST_5D::copy(map, full, (1 << kCtas) - 1, kHint, target, 0, 0, tile, head,
                                     page);
  }
}

// Block `block` of a sequence as a page of all groups' pages; -1: a page that does not exist.
__device__ __forceinline__ int find_page(const DecodeParams& p, const Work& work, int seq,
                                         int block) {
  if (seq >= p.batch || block >= p.max_blocks) return -1;
  const int64_t group_seq = static_cast<int64_t>(work.group) * p.batch + seq;
  const int page = p.block_table[group_seq * p.max_blocks + block];
  return page < 0 || page >= p.num_blocks ? -1 : work.group * p.num_blocks + page;
}

// A thread copies the left half of the queries of every item, into the ring of halves, another one
// the rest: in boxes of rows that are neighbours in memory.
template <typename Element>
__device__ __forceinline__ void load_queries(const DecodeParams& p, const TensorMaps& maps,
                                             SharedMemory<Element>& smem, int side) {
  constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
  const Work& work = smem.work;
  const bool left = side == kLeft;
  const int box = maps.q_box_rows;
  const int boxes = (min(p.num_rows() - work.tile * kRowTile, kRowTile) + box - 1) / box;
  const int tile_bytes = boxes * box * 128;
  Ring<kHalfSlots> half;
  uint32_t q_parity = 0;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item(p, work, seq);
    if (item.blocks() == 0) continue;
    // The left half, too, waits for all scores of the item before: it is then no more than one turn
    // of the ring ahead, which is what a parity can tell.
    smem.q_empty.wait(q_parity ^ 1);
    if (!left) smem.q_full.arrive_and_expect_tx((kTiles - kHalfTiles) * tile_bytes);
#pragma unroll 1
    for (int tile = left ? 0 : kHalfTiles; tile < (left ? kHalfTiles : kTiles); ++tile) {
      const int part = tile / kPartTiles;
      FullBarrier& barrier = left ? smem.half_full[half.slot][part] : smem.q_full;
      if (left && tile % kPartTiles == 0) {
        smem.half_empty[half.slot][part].wait(half.parity ^ 1);
        barrier.arrive_and_expect_tx(kPartTiles * tile_bytes);
      }
      Element* const target = left ? smem.halves[half.slot][tile] : smem.q[tile - kHalfTiles];
      const CUtensorMap* const map = tile == kRopeTile ? &maps.q_rope : &maps.q_nope;
      const int column = tile == kRopeTile ? 0 : tile * 64;
#pragma unroll 1
      for (int i = 0; i < boxes; ++i) {
        const int64_t row = query_index(p, work, seq, work.tile * kRowTile + i * box);
        SM90_TMA_LOAD_2D::copy(map, reinterpret_cast<uint64_t*>(&barrier), kHint,
                               target + i * box * 64, column, static_cast<int32_t>(row));
      }
    }
    half.advance(1 + 2 * item.blocks());
    q_parity ^= 1;
  }
}

// A third thread copies the keys of every item, in the order of their use. Each CTA of a cluster
// copies its share.
template <int kCtas, typename Element>
__device__ __forceinline__ void load_keys(const DecodeParams& p, const TensorMaps& maps,
                                          SharedMemory<Element>& smem) {
  const Work& work = smem.work;
  const auto is_mine = [&](int number) { return kCtas == 1 || (number + work.tile) % kCtas == 0; };
  Ring<kHalfSlots> half;
  Ring<kRopeSlots> rope;
  const auto load_half = [&](int first_tile, int page) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      FullBarrier& barrier = smem.half_full[half.slot][part];
      // What was in the slot has landed, since that may have been queries, which another thread
      // loads: until they have, the parity of `half_empty` is that of a turn too early.
      barrier.wait(half.parity ^ 1);
      smem.half_empty[half.slot][part].wait(half.parity ^ 1);
      barrier.arrive_and_expect_tx(kPartTiles * kTileBytes);
      if (!is_mine(part)) continue;
      load_box<kCtas>(&maps.keys, barrier, smem.halves[half.slot][part * kPartTiles],
                      first_tile + part * kPartTiles, work.head, page);
    }
    half.advance();
  };
  // Each page is looked up before it is needed: the first before its sequence's length has come.
  int page = find_page(p, work, work.begin_seq, work.begin_block);
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item(p, work, seq);
    if (item.blocks() > 0) half.advance();  // the queries
#pragma unroll 1
    for (int block = item.first; block < item.last; ++block) {
      const bool last = block + 1 == item.last;
      const int next = find_page(p, work, last ? seq + 1 : seq, last ? 0 : block + 1);
      load_half(0, page);
      smem.rope_empty[rope.slot].wait(rope.parity ^ 1);
      FullBarrier& barrier = smem.rope_full[rope.slot];
      barrier.arrive_and_expect_tx(kTileBytes);
      if (is_mine(block)) {
        load_box<kCtas>(&maps.rope_keys, barrier, smem.rope[rope.slot], kRopeTile, work.head, page);
      }
      rope.advance();
      load_half(kHalfTiles, page);
      page = next;
    }
    if (item.blocks() == 0) page = find_page(p, work, seq + 1, 0);
  }
}

// All threads, once: zeroes the rows of q that do not exist; no sequence writes them.
template <typename Element>
__device__ __forceinline__ void clear_missing_rows(const DecodeParams& p,
                                                   SharedMemory<Element>& smem, int row_tile) {
  const int rows = min(p.num_rows() - row_tile * kRowTile, kRowTile);
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
