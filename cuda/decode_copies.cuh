// The copies that loaders of the split kernels issue: queries and keys, by the copy engine. One
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

// Copies bytes that lie together, whole 16 of them.
__device__ __forceinline__ void copy_bytes(const void* from, FullBarrier& barrier, void* target,
                                           uint32_t bytes) {
  constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_FIRST);
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;"
      :
      : "r"(cast_smem_ptr_to_uint(target)), "l"(from), "r"(bytes),
        "r"(cast_smem_ptr_to_uint(&barrier)), "l"(kHint)
      : "memory");
}

// What the table has for a block of a sequence, or, where pages are small, for a part of it; for
// `check_page`, since it has not arrived when this returns.
template <int kParts>
__device__ __forceinline__ int load_page(const KernelParams& p, const Work& work, int seq,
                                         int block, int part = 0) {
  const int entry = kParts == 1 || p.parts == 1 ? block >> p.page_shift : block * p.parts + part;
  // Unsigned, since the first block is as the plan has it, and may be any number.
  if (seq >= p.batch || static_cast<uint32_t>(entry) >= p.max_blocks) return -1;
  return p.block_table[work.first_entry + static_cast<int64_t>(seq) * p.max_blocks + entry];
}

// As a page of all groups' pages; -1: a page that does not exist.
__device__ __forceinline__ int check_page(const KernelParams& p, int group, int page) {
  return page < 0 || page >= p.num_blocks ? -1 : group * p.num_blocks + page;
}

// Which block of its page a block is.
__device__ __forceinline__ int block_in_page(const KernelParams& p, int block) {
  return block & ((1 << p.page_shift) - 1);
}

// How many keys a block has, and in how many quarters: all, but for a sequence's last block.
__device__ __forceinline__ int count_keys(const Item& item, int block) {
  return min(item.length - block * kBlock, kBlock);
}
__device__ __forceinline__ int count_quarters(const Item& item, int block) {
  constexpr int kKeys = kBlock / kKeyQuarters;
  return (count_keys(item, block) + kKeys - 1) / kKeys;
}
inline constexpr int kQuarterBytes = kTileBytes / kKeyQuarters;  // of a tile

// Copies the first `quarters` of `kTiles` tiles of a block in a page, from `tile` on. Tile by tile
// if these are not all: in a box of fewer rows, its tiles would lie closer together.
template <int kTiles, typename Element>
__device__ __forceinline__ void load_quarters(const KernelParams& p, const TensorMaps& maps,
                                              const Work& work, FullBarrier& barrier,
                                              Element (*target)[kTileElements], int tile, int block,
                                              int page, int quarters) {
  static_assert(kTiles == 1 || kTiles == kKeyBoxTiles);
  const int row = block_in_page(p, block) * kBlock;
  const CUtensorMap* const of_tile = &maps.key_tiles[quarters - 1];
  const bool one_by_one = kTiles == 1 || quarters < kKeyQuarters;
  load_box<1>(one_by_one ? of_tile : &maps.keys, barrier, target, tile, work.head, page, row);
  if (kTiles > 1 && one_by_one) {
    load_box<1>(of_tile, barrier, target + 1, tile + 1, work.head, page, row);
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

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  cute::prefetch_tma_descriptor(reinterpret_cast<const TmaDescriptor*>(&map));
}

// Those that every sequence needs.
__device__ __forceinline__ void prefetch_key_maps(const TensorMaps& maps) {
  prefetch_map(maps.keys);
  prefetch_map(maps.key_tiles[kKeyQuarters - 1]);
}
__device__ __forceinline__ void prefetch_query_maps(const TensorMaps& maps) {
  prefetch_map(maps.q_nope);
  prefetch_map(maps.q_rope);
}

}  // namespace jax_flashmla
