// Keys on their way into L2 while the kernel before is still at work.
#pragma once

#include "cuda/decode_copies.cuh"

namespace jax_flashmla {

// Reads what the kernel before may still be writing, and leaves no copy in the SM's cache.
__device__ __forceinline__ int peek(const int32_t* at) {
  int x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
  return x;
}
__device__ __forceinline__ int4 peek(const int4* at) {
  int4 x;
  asm volatile("ld.relaxed.gpu.global.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(at)
               : "memory");
  return x;
}

// Has a block's keys brought into L2, if the partition that `range` says has that block.
__device__ __forceinline__ void prefetch_block(const KernelParams& p, const Work& work, int4 range,
                                               uint32_t block, const EmptyBarrier& waited) {
  const int seq = range.x;
  const uint32_t entry = block >> p.page_shift;
  const bool mine = seq < range.z || block < static_cast<uint32_t>(range.w);
  if (!mine || entry >= p.max_blocks) return;
  const int64_t first_entry = work.first_entry + static_cast<int64_t>(seq) * p.max_blocks;
  const int page = check_page(p, work.group, peek(p.block_table + first_entry + entry));
  if (page < 0 || waited.test_wait(0)) return;
  const int64_t token =
      wide(page) * p.page_tokens + block_in_page(p, static_cast<int>(block)) * kBlock;
  const char* const first = static_cast<const char*>(p.k_cache) + token * p.row_bytes;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first),
               "r"(kBlock * p.row_bytes));
}

// Has the keys of a CTA's first blocks brought into L2, by a thread that nobody waits for, before
// `wait_for_kernel_before`. If plan, table and length are not yet what they will be, these are
// other keys of the pool, or none: nothing but time depends on it. The same if keys are written
// meanwhile, since all that writes or reads them goes through L2. `waited`: the copies themselves
// have begun, and would only be held up.
__device__ __forceinline__ void prefetch_keys(const KernelParams& p, const EmptyBarrier& waited) {
  // With a window, only the length tells which block is the first.
  if (p.h_kv != 1 || p.sliding_window > 0) return;
  const Place place = find_place(p);
  const int4 range = peek(place.plan);
  const int seq = range.x;
  if (seq < 0 || seq >= p.batch || seq > range.z) return;
  // Row tiles share the keys: every other one takes the second block.
  const uint32_t first = static_cast<uint32_t>(range.y) + place.work.tile % 2;
  prefetch_block(p, place.work, range, first, waited);
  // Another one, if the sequence has many here. With few, copies would wait behind the prefetches.
  constexpr int kMany = 16;
  const int end =
      seq < range.z ? peek(p.cache_seqlens + place.work.first_seq + seq) / kBlock : range.w;
  if (first + kMany <= static_cast<uint32_t>(end)) {
    prefetch_block(p, place.work, range, first + 1, waited);
  }
}

}  // namespace jax_flashmla
