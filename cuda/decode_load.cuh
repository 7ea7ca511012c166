// The loader warpgroup of the split kernel: keys by the copy engine, queries by three warps.
#pragma once

#include "cuda/decode_shared.cuh"

namespace jax_flashmla {

// One warp: walks the same blocks as the consumers, pair by pair, in the order of release. A lane
// issues the copy of one tile.
template <typename Element>
__device__ void run_loader(const DecodeParams& p, const CUtensorMap* map,
                           SharedMemory<Element>& smem, const Work& work, int lane) {
  Phases phases;
  const auto load = [&](int page, int stage, int half, int first_tile, int count) {
    smem.empty[stage][half].wait(phases.parity(stage) ^ 1);
    const int tile = first_tile + lane;
    if (lane < count) {
      FullBarrier& barrier = smem.full[stage][tile];
      barrier.arrive_and_expect_tx(kTileBytes);
      SM90_TMA_LOAD_5D::copy(map, reinterpret_cast<uint64_t*>(&barrier),
                             static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_FIRST),
                             smem.k[stage][tile], tile * 64, 0, work.head, page, work.group);
    }
    __syncwarp();
  };
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item(p, work, seq);
    const int32_t* table =
        p.block_table + (static_cast<int64_t>(work.group) * p.batch + seq) * p.max_blocks;
#pragma unroll 1
    for (int block = item.first; block < item.last; block += 2) {
      const bool pair = block + 1 < item.last;
      const int left_page = table[block];
      const int right_page = pair ? table[block + 1] : 0;
      load(left_page, 0, kLeft, 0, kHalfTiles);
      load(left_page, 0, kRight, kHalfTiles, kHalfTiles + 1);
      ++phases.uses[0];
      if (pair) {
        load(right_page, 1, kRight, kHalfTiles, kHalfTiles);
        load(right_page, 1, kLeft, kRopeTile, 1);
        load(right_page, 1, kLeft, 0, kHalfTiles);
        ++phases.uses[1];
      }
    }
  }
}

__device__ __forceinline__ void copy_16_bytes(uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source));
}

// All threads, once: zeroes the rows of q that do not exist; no sequence writes them.
template <typename Element>
__device__ __forceinline__ void clear_missing_rows(const DecodeParams& p,
                                                   SharedMemory<Element>& smem, const Work& work) {
  const int rows = min(p.num_rows() - work.tile * kRowTile, kRowTile);
#pragma unroll 1
  for (int tile = 0; tile < kTiles; ++tile) {
    uint4* vectors = reinterpret_cast<uint4*>(smem.q[tile]);
#pragma unroll 1
    for (int i = rows * 8 + threadIdx.x; i < kRowTile * 8; i += kThreads) {
      vectors[i] = make_uint4(0, 0, 0, 0);
    }
  }
  cutlass::arch::fence_view_async_shared();
}

// Three warps: copy the row tile's queries of each sequence into the tiles that wgmma reads.
template <typename Element>
__device__ void run_query_loader(const DecodeParams& p, SharedMemory<Element>& smem,
                                 const Work& work, int thread) {
  constexpr int kWarps = kQueryLoaders / 32;
  const int lane = thread % 32;
  const int rows = min(p.num_rows() - work.tile * kRowTile, kRowTile);
  const uint32_t q = cast_smem_ptr_to_uint(&smem.q[0][0]);
  // A row is 72 vectors of 16 bytes, 8 in each tile, swizzled. A warp takes a row, a thread its
  // vectors lane, lane + 32 and, for the rotary tile, lane + 64.
  const auto target = [&](int row, int tile) {
    return q + tile * kTileBytes + row * 128 + ((lane % 8 ^ row % 8) * 16);
  };
  uint32_t parity = 1;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    smem.q_empty.wait(parity);
    parity ^= 1;
    const int first_row = work.tile * kRowTile + thread / 32;
    const char* nope = static_cast<const char*>(p.q_nope) + lane * 16;
    const char* rope = static_cast<const char*>(p.q_rope) + lane * 16;
    const int64_t nope_bytes = p.q_nope_stride * 2;
    const int64_t rope_bytes = p.q_rope_stride * 2;
    int64_t index = query_index(p, work, seq, first_row);
#pragma unroll 1
    for (int row = thread / 32; row < rows; row += kWarps) {
      const char* source = nope + index * nope_bytes;
      copy_16_bytes(target(row, lane / 8), source);
      copy_16_bytes(target(row, lane / 8 + 4), source + 512);
      if (lane < 8) copy_16_bytes(target(row, kRopeTile), rope + index * rope_bytes);
      index = p.h_kv == 1 ? index + kWarps
                          : query_index(p, work, seq, work.tile * kRowTile + row + kWarps);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    cutlass::arch::fence_view_async_shared();
    smem.q_full.arrive();
  }
}

}  // namespace jax_flashmla
