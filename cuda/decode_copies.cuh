// The copies that loaders of both split kernels issue: queries and keys, by the copy engine. One
// thread each, since the issue of a copy by several lanes of a warp is slow.
#pragma once

#include "cuda/decode_shared.cuh"

namespace jax_flashmla {

// Copies a box of keys that begins with tile `tile`, into every CTA of the cluster: they work on
// the same keys.
template <int kCtas>
__device__ __forceinline__ void load_box(const CUtensorMap* map, FullBarrier& barrier, void* target,
                                         int tile, int head, int page, int row) {
  constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_FIRST);
  auto* const full = reinterpret_cast<uint64_t*>(&barrier);
  if constexpr (kCtas == 1) {
    SM90_TMA_LOAD_5D::copy(map, full, kHint, target, 0, row, tile, head, page);
  } else {
    SM90_TMA_LOAD_MULTICAST_5D::copy(map, full, (1 << kCtas) - 1, kHint, target, 0, row, tile, head,
                                     page);
  }
}

// What pages hold: blocks, or parts of one. Either is known where code is short for it.
enum class Pages { kOfBlocks, kOfParts, kEither };

// What the table has for a block of a sequence, or, where pages are small, for the `piece`-th page
// of it; for `check_page`, since it has not arrived when this returns.
template <Pages kPages>
__device__ __forceinline__ int load_page(const KernelParams& p, const Work& work, int seq,
                                         int block, int piece = 0) {
  int entry = block;
  if constexpr (kPages != Pages::kOfParts) entry >>= p.page_shift;
  if constexpr (kPages != Pages::kOfBlocks) entry = entry * p.pieces + piece;
  if (seq >= p.batch || entry >= p.max_blocks) return -1;
  return p.block_table[work.first_entry + static_cast<int64_t>(seq) * p.max_blocks + entry];
}

// As a page of all groups' pages; -1: a page that does not exist.
__device__ __forceinline__ int check_page(const KernelParams& p, const Work& work, int page) {
  return page < 0 || page >= p.num_blocks ? -1 : work.group * p.num_blocks + page;
}

// Copies `kTiles` tiles of a block's keys, from `tile` on. `page` is what the table has for the
// block: where pages are small, for the first page of it, and the others are looked up again for
// every copy. They are then in the SM's cache.
template <int kCtas, int kTiles, Pages kPages, typename Element>
__device__ __forceinline__ void load_key_tiles(const KernelParams& p, const TensorMaps& maps,
                                               const Work& work, FullBarrier& barrier,
                                               Element (*target)[kTileElements], int tile, int seq,
                                               int block, int page) {
  static_assert(kTiles == 1 || kTiles == kKeyBoxTiles);
  const auto load_whole = [&] {
    const int row = (block & ((1 << p.page_shift) - 1)) * kBlock;
    load_box<kCtas>(kTiles == 1 ? &maps.key_tile : &maps.keys, barrier, target, tile, work.head,
                    page, row);
  };
  const auto load_parts = [&] {
#pragma unroll 1
    for (int piece = 0; piece < p.pieces; ++piece) {
      if (piece > 0) page = check_page(p, work, load_page<kPages>(p, work, seq, block, piece));
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        load_box<kCtas>(&maps.key_tile, barrier, target[i] + piece * p.page_tokens * 64, tile + i,
                        work.head, page, 0);
      }
    }
  };
  if constexpr (kPages == Pages::kOfBlocks) {
    load_whole();
  } else if constexpr (kPages == Pages::kOfParts) {
    load_parts();
  } else if (p.pieces == 1) {
    load_whole();
  } else {
    load_parts();
  }
}

// Copies a box of the queries that begins with tile `tile` and row `row` of all.
template <typename Element>
__device__ __forceinline__ void load_query_box(const TensorMaps& maps, FullBarrier& barrier,
                                               Element* target, int tile, int64_t row) {
  constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
  auto* const full = reinterpret_cast<uint64_t*>(&barrier);
  // Not one call with the map chosen: nvcc 13.0 does not survive that.
  if (tile == kRopeTile) {
    SM90_TMA_LOAD_3D::copy(&maps.q_rope, full, kHint, target, 0, static_cast<int32_t>(row), 0);
  } else {
    SM90_TMA_LOAD_3D::copy(&maps.q_nope, full, kHint, target, 0, static_cast<int32_t>(row), tile);
  }
}

__device__ __forceinline__ void prefetch_maps(const TensorMaps& maps) {
  for (const CUtensorMap* map : {&maps.keys, &maps.key_tile, &maps.q_nope, &maps.q_rope}) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const TmaDescriptor*>(map));
  }
}

}  // namespace jax_flashmla
