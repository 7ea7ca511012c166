// The loader of the wide split kernel: three threads, for the keys and for either half of the
// queries.
#pragma once

#include "cuda/decode_copies.cuh"
#include "cuda/decode_gather.cuh"

namespace jax_flashmla {

// Copies a half of an item's queries, in boxes of rows that are neighbours in memory: the left one
// into the ring of halves.
template <Source kSource, typename Element>
__device__ __forceinline__ void load_item_queries(const KernelParams& p, const TensorMaps& maps,
                                                  SharedMemory<Element>& smem, const Work& work,
                                                  int seq, int side, const Ring<kHalfSlots>& half) {
  const bool left = side == kLeft;
  const int box = maps.q_box_rows;
  const int boxes = (min(p.num_rows() - work.tile * kRowTile, kRowTile) + box - 1) / box;
  const int tile_bytes = boxes * box * 128;
  if (!left) smem.q_full.arrive_and_expect_tx((kTiles - kHalfTiles) * tile_bytes);
#pragma unroll 1
  for (int tile = left ? 0 : kHalfTiles; tile < (left ? kHalfTiles : kTiles); ++tile) {
    const int part = tile / kPartTiles;
    FullBarrier& barrier = left ? smem.half_full[half.slot][part] : smem.q_full;
    if (left && tile % kPartTiles == 0) {
      smem.half_empty[half.slot][part].wait(half.parity ^ 1);
      barrier.arrive_and_expect_tx(kPartTiles * tile_bytes);
      arrive_for_others<kSource>(barrier);
    }
    Element* const target = left ? smem.halves[half.slot][tile] : smem.q[tile - kHalfTiles];
#pragma unroll 1
    for (int i = 0; i < boxes; ++i) {
      load_query_box(maps, barrier, target + i * box * 64, tile,
                     query_index(p, work, seq, work.tile * kRowTile + i * box));
    }
  }
}

// A thread copies the left half of the queries of every item, another one the rest.
template <typename Element>
__device__ __forceinline__ void load_queries(const KernelParams& p, const TensorMaps& maps,
                                             SharedMemory<Element>& smem, const Work& work,
                                             int side) {
  Ring<kHalfSlots> half;
  uint32_t q_parity = 0;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    if (item.blocks() == 0) continue;
    // The left half, too, waits for all scores of the item before: it is then no more than one turn
    // of the ring ahead, which is what a parity can tell.
    smem.q_empty.wait(q_parity ^ 1);
    load_item_queries<Source::kPages>(p, maps, smem, work, seq, side, half);
    half.advance(1 + 2 * item.blocks());
    q_parity ^= 1;
  }
}

// Where a block's keys are: in one page, or in up to kMaxParts small ones. As the first slice of
// each (kSliceTokens).
struct BlockPages {
  int of_part[kMaxParts];

  // `first`: what the table has for the first page. The others are by then in the SM's cache, and
  // all on their way before one of them is looked at.
  __device__ BlockPages(const KernelParams& p, const Work& work, int seq, int block, int first) {
    // Of a page that does not exist no slice does.
    const int slices = p.page_tokens / kSliceTokens;
    if (p.parts > 1) {  // one test for all, where pages are no smaller than blocks
#pragma unroll
      for (int i = 1; i < kMaxParts; ++i) {
        if (i < p.parts) of_part[i] = load_page<kMaxParts>(p, work, seq, block, i);
      }
#pragma unroll
      for (int i = 1; i < kMaxParts; ++i) {
        if (i < p.parts) of_part[i] = check_page(p, work.group, of_part[i]) * slices;
      }
    }
    of_part[0] = check_page(p, work.group, first) * slices +
                 block_in_page(p, block) * (kBlock / kSliceTokens);
  }
};

// Copies `kTiles` tiles of a block's keys, from `tile` on.
template <int kCtas, int kTiles, typename Element>
__device__ __forceinline__ void load_key_tiles(const KernelParams& p, const TensorMaps& maps,
                                               const Work& work, FullBarrier& barrier,
                                               Element (*target)[kTileElements], int tile,
                                               const BlockPages& pages) {
  static_assert(kTiles == 1 || kTiles == kKeyBoxTiles);
  const CUtensorMap* const map = kTiles == 1 ? &maps.key_tiles[kKeyQuarters - 1] : &maps.keys;
#pragma unroll
  for (int part = 0; part < kMaxParts; ++part) {
    if (part >= p.parts) break;
    load_box<kCtas>(map, barrier, *target + part * p.page_tokens * (kTiles * 64), tile, work.head,
                    pages.of_part[part], 0);
  }
}

// A third thread copies the keys of every item, in the order of their use. Each CTA of a cluster
// copies its share.
template <int kCtas, typename Element>
__device__ __forceinline__ void load_keys(const KernelParams& p, const TensorMaps& maps,
                                          SharedMemory<Element>& smem, const Work& work) {
  const auto is_mine = [&](int number) { return kCtas == 1 || (number + work.tile) % kCtas == 0; };
  Ring<kHalfSlots> half;
  Ring<kRopeSlots> rope;
  const auto load_half = [&](int first_tile, const BlockPages& pages) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      FullBarrier& barrier = smem.half_full[half.slot][part];
      // What was in the slot has landed, since that may have been queries, which another thread
      // loads: until they have, the parity of `half_empty` is that of a turn too early.
      barrier.wait(half.parity ^ 1);
      smem.half_empty[half.slot][part].wait(half.parity ^ 1);
      barrier.arrive_and_expect_tx(kPartTiles * kTileBytes);
      if (!is_mine(part)) continue;
      load_key_tiles<kCtas, kPartTiles>(p, maps, work, barrier,
                                        &smem.halves[half.slot][part * kPartTiles],
                                        first_tile + part * kPartTiles, pages);
    }
    half.advance();
  };
  // Each page is looked up before it is needed: the first before its sequence's length has come,
  // unless a window begins where only that tells.
  int next = load_page<kMaxParts>(p, work, work.begin_seq, work.begin_block);
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    if (p.sliding_window > 0) next = load_page<kMaxParts>(p, work, seq, item.first);
    if (item.blocks() > 0) half.advance();  // the queries
#pragma unroll 1
    for (int block = item.first; block < item.last; ++block) {
      const bool last = block + 1 == item.last;
      const BlockPages pages(p, work, seq, block, next);
      // The first queries go before the second block: the copy engine takes its time for each.
      if (seq == work.begin_seq && block == item.first + 1) smem.q_full.wait(0);
      load_half(0, pages);
      next = load_page<kMaxParts>(p, work, last ? seq + 1 : seq, last ? 0 : block + 1);
      smem.rope_empty[rope.slot].wait(rope.parity ^ 1);
      FullBarrier& barrier = smem.rope_full[rope.slot];
      barrier.arrive_and_expect_tx(kTileBytes);
      if (is_mine(block)) {
        load_key_tiles<kCtas, 1>(p, maps, work, barrier, &smem.rope[rope.slot], kRopeTile, pages);
      }
      rope.advance();
      load_half(kHalfTiles, pages);
    }
    if (item.blocks() == 0) next = load_page<kMaxParts>(p, work, seq + 1, 0);
  }
}

// The same row by row, by all four warps, and for one CTA only; one of the threads copies the
// queries, too.
template <typename Element>
__device__ __forceinline__ void gather(const KernelParams& p, const TensorMaps& maps,
                                       SharedMemory<Element>& smem) {
  const Work& work = smem.work;  // registers are scarce
  Ring<kHalfSlots> half;
  Ring<kRopeSlots> rope;
  uint32_t q_parity = 0;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    if (item.blocks() == 0) continue;
    int next = load_row_page(p, work, item, item.first);
    if (threadIdx.x % kWarpgroup == 0) {
      smem.q_empty.wait(q_parity ^ 1);
      load_item_queries<Source::kRows>(p, maps, smem, work, seq, kLeft, half);
      load_item_queries<Source::kRows>(p, maps, smem, work, seq, kRight, half);
    }
    q_parity ^= 1;
    half.advance();
#pragma unroll 1
    for (int block = item.first; block < item.last; ++block) {
      find_rows(p, work, block, next, smem.rows);
      next = load_row_page(p, work, item, block + 1);
#pragma unroll 1
      for (int copy = 0; copy < 2 * kParts + 1; ++copy) {  // in the middle of them the rotary tile
        if (copy == kParts) {
          smem.rope_empty[rope.slot].wait(rope.parity ^ 1);
          gather_tiles(p, work, smem.rows, smem.rope[rope.slot], 1, kRopeTile * 128);
          arrive_after_copies(smem.rope_full[rope.slot]);
          rope.advance();
          continue;
        }
        const int tile = (copy - (copy > kParts)) * kPartTiles;
        const int part = tile % kHalfTiles / kPartTiles;
        FullBarrier& barrier = smem.half_full[half.slot][part];
        barrier.wait(half.parity ^ 1);  // as in load_keys
        smem.half_empty[half.slot][part].wait(half.parity ^ 1);
        gather_tiles<kPartTiles>(p, work, smem.rows, smem.halves[half.slot][tile % kHalfTiles],
                                 kPartTiles, tile * 128);
        arrive_after_copies(barrier);
        if (part == kParts - 1) half.advance();
      }
    }
  }
}

// By the threads that do not load, once: zeroes the rows of q that do not exist, since no box may
// cover them. (One that does brings neighbours' queries: rows do not mix.)
template <typename Element, int kCount>
__device__ __forceinline__ void clear_missing_rows(const KernelParams& p,
                                                   Element (&tiles)[kCount][kTileElements],
                                                   int thread) {
  int others, tile;
  p.by_row_tiles(others, tile, static_cast<int>(blockIdx.x));
  const int rows = p.num_rows() - tile * kRowTile;
  if (rows >= kRowTile) return;
#pragma unroll 1
  for (auto& q : tiles) {
    uint4* vectors = reinterpret_cast<uint4*>(q);
#pragma unroll 1
    for (int i = rows * 8 + thread; i < kTileElements / 8; i += kLoader * kWarpgroup) {
      vectors[i] = make_uint4(0, 0, 0, 0);
    }
  }
  cutlass::arch::fence_view_async_shared();
}

}  // namespace jax_flashmla
