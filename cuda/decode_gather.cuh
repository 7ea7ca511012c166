// Keys row by row, where pages hold less than a block or rows are FP8: the loader's four warps copy
// them 16 bytes a lane (cp.async). The copy engine would have to be told of every page of every
// tile.
#pragma once

#include "cuda/decode_shared.cuh"

namespace jax_flashmla {

// Arrivals that complete a full barrier: of the thread that expects bytes, or of all that copy.
template <Source kSource>
inline constexpr int kFullArrivals = kSource == Source::kPages ? 1 : kGatherThreads;

// The arrivals of a full barrier that a single thread owes when its copies are the copy engine's.
template <Source kSource>
__device__ __forceinline__ void arrive_for_others(FullBarrier& barrier) {
  if constexpr (kFullArrivals<kSource> > 1) {
    const uint32_t address = cast_smem_ptr_to_uint(&barrier);
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(address),
                 "n"(kFullArrivals<kSource> - 1)
                 : "memory");
  }
}

// Waits for keys. The copies of threads are not the copy engine's: wgmma sees them after a fence.
template <Source kSource>
__device__ __forceinline__ void wait_for_keys(EmptyBarrier& barrier, uint32_t parity) {
  barrier.wait(parity);
  if constexpr (kSource == Source::kRows) cutlass::arch::fence_view_async_shared();
}

// Which of the threads that gather this is.
struct GatherThread : ThreadNow {
  // The row of a block that a lane looks up, one of the 16 that its warp copies; those from 16 on
  // have the same as those below.
  __device__ __forceinline__ int looked_up() const {
    return lane % 16 / 4 * 16 + warp * 4 + lane % 4;
  }
};

// Of the rows that its lanes copy in turn, those of a place that the lane looks up.
__device__ __forceinline__ int* rows_of(GatherRows& rows, const GatherThread& thread) {
  return reinterpret_cast<int*>(&rows[thread.warp][thread.lane % 4]);
}

// What the table has for the row of a block that the lane looks up; -1: nothing, or no query sees
// the row. For `find_rows`, since it has not arrived when this returns.
__device__ __forceinline__ int load_row_page(const KernelParams& p, const Work& work,
                                             const Item& item, int block) {
  const GatherThread thread;
  const int token = block * kBlock + thread.looked_up();
  const int left = item.length - token;
  if (thread.lane >= 16 || left <= 0 || left > p.most_hidden + p.window) return -1;
  return p.block_table[work.first_entry + static_cast<int64_t>(item.seq) * p.max_blocks +
                       (token >> p.page_shift)];
}

// Writes where the rows are that the warp copies, among the rows of all groups' pages; -1: a row of
// zeros.
__device__ __forceinline__ void find_rows(const KernelParams& p, const Work& work, int block,
                                          int page, GatherRows& rows) {
  const GatherThread thread;
  const int token = block * kBlock + thread.looked_up();
  const int row =
      ((work.group * p.num_blocks + page) << p.page_shift) + (token & ((1 << p.page_shift) - 1));
  __syncwarp();  // the block before has been read
  if (thread.lane < 16) {
    const bool exists = page >= 0 && page < p.num_blocks;
    rows_of(rows, thread)[thread.lane / 4] = exists ? row : -1;
  }
  __syncwarp();
}

__device__ __forceinline__ void copy_vector(const KernelParams& p, const char* first_row, int row,
                                            uint128_t& target) {
  const char* const from = first_row + static_cast<int64_t>(row) * p.row_bytes;
  SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>::copy(*reinterpret_cast<const uint128_t*>(from),
                                                   target, row >= 0);
}

// Copies `count` swizzled tiles of rows of `kVectors` 16-byte vectors, from byte `column` of the
// rows on. With `kSliceTiles`, eight rows of each of so many tiles are followed by the next eight:
// the wide kernel's PartLayout.
template <int kSliceTiles = 1, int kVectors = 8>
__device__ __forceinline__ void gather_tiles(const KernelParams& p, const Work& work,
                                             const GatherRows& rows, void* target, int count,
                                             int column) {
  const auto [warp, lane] = GatherThread();
  const int vector = lane % 8;
  const int place = lane / 8;
  const int first = warp * 4 + place;
  if (vector >= kVectors) return;
  constexpr int kEightRows = 8 * kVectors;  // in vectors
  constexpr int kNextTile = kSliceTiles == 1 ? kBlock * kVectors : kEightRows;
  constexpr int kNextRow = 2 * kSliceTiles * kEightRows;  // that the lane copies
  const int swizzle = kVectors == 8 ? first % 8 : first / 2 % kVectors;
#pragma unroll 1
  for (int tile = 0; tile < count; ++tile) {
    const char* const first_row = static_cast<const char*>(p.k_cache) + work.head * p.head_bytes +
                                  column + tile * 128 + vector * 16;
    uint128_t* const to = static_cast<uint128_t*>(target) + tile * kNextTile + first * kVectors +
                          first / 8 * ((kSliceTiles - 1) * kEightRows) + (vector ^ swizzle);
    const int4 four = rows[warp][place];
    copy_vector(p, first_row, four.x, to[0]);
    copy_vector(p, first_row, four.y, to[1 * kNextRow]);
    copy_vector(p, first_row, four.z, to[2 * kNextRow]);
    copy_vector(p, first_row, four.w, to[3 * kNextRow]);
  }
}

// Arrives when all that this thread has copied has landed.
__device__ __forceinline__ void arrive_after_copies(FullBarrier& barrier) {
  cutlass::arch::cpasync_barrier_arrive_noinc(reinterpret_cast<uint64_t*>(&barrier));
}

}  // namespace jax_flashmla
