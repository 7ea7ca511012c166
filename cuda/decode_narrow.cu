// The split kernel for up to 16 query rows: products of 16 rows by registers (mma.sync), which
// waste no rows, and a chain from the last key's arrival to the output that is as short as it can
// be. The schedule is drawn in cuda/README.md.
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>

#include "cuda/decode_copies.cuh"
#include "cuda/decode_empty.cuh"
#include "cuda/decode_gather.cuh"
#include "cuda/decode_narrow.h"
#include "cuda/decode_narrow_attend.cuh"
#include "cuda/decode_prefetch.cuh"
#include "cuda/launch.cuh"

namespace jax_flashmla {
namespace {

// Of the last warpgroup, two threads load, or all; a warp has keys brought into L2, and another one
// writes what empty sequences have.
inline constexpr int kKeyThread = kMathThreads;
inline constexpr int kQueryThread = kMathThreads + 32;
inline constexpr int kPrefetchThread = kMathThreads + 64;
inline constexpr int kEmptyThread = kMathThreads + 96;  // the first
// Named barriers for: memory is set up; it is, for the warps that copy row by row; the key thread's
// barriers are, for the one that prefetches.
inline constexpr int kReady = 2;
inline constexpr int kLoaderReady = 3;
inline constexpr int kKeysReady = 4;

template <Source kSource, typename Element>
__device__ __forceinline__ void load_item_queries(const KernelParams& p, const TensorMaps& maps,
                                                  NarrowMemory<kSource, Element>& smem,
                                                  const Work& work, int seq) {
  if (maps.q_box_tiles == kValueTiles) {  // all at once, with rows of neighbours
    smem.q_full.arrive_and_expect_tx(sizeof(smem.q));
    const int64_t first = query_index(p, work, seq, 0);
    load_query_box(maps, smem.q_full, smem.q[0], 0, first);
    load_query_box(maps, smem.q_full, smem.q[kRopeTile], kRopeTile, first);
    return;
  }
  smem.q_full.arrive_and_expect_tx(kTiles * p.num_rows() * 128);
#pragma unroll 1
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll 1
    for (int row = 0; row < p.num_rows(); row += maps.q_box_rows) {
      load_query_box(maps, smem.q_full, smem.q[tile] + row * 64, tile,
                     query_index(p, work, seq, row));
    }
  }
}

// The first queries are loaded even if they will see no key: their sequence's length has not come.
template <bool kWindowed, typename Element>
__device__ __forceinline__ void load_queries(const KernelParams& p, const TensorMaps& maps,
                                             NarrowMemory<Source::kPages, Element>& smem,
                                             const Work& work) {
  uint32_t parity = 0;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    if (seq > work.begin_seq) {
      if (find_item<kWindowed>(p, work, seq).blocks() == 0) continue;
      smem.q_empty.wait(parity);
      parity ^= 1;
    }
    load_item_queries(p, maps, smem, work, seq);
  }
}

// In the order of their use. Each page is looked up before it is needed: the first before its
// sequence's length has come, unless a window begins where only that tells.
template <bool kWindowed, typename Element>
__device__ __forceinline__ void load_keys(const KernelParams& p, const TensorMaps& maps,
                                          NarrowMemory<Source::kPages, Element>& smem,
                                          const Work& work) {
  Ring<kChunkSlots<Source::kPages>> chunk;
  Ring<kRopeSlots> rope;
  int next = load_page<1>(p, work, work.begin_seq, work.begin_block);
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<kWindowed>(p, work, seq);
    if constexpr (kWindowed) next = load_page<1>(p, work, seq, item.first);
#pragma unroll 1
    for (int block = item.first; block < item.last; ++block) {
      const bool last = block + 1 == item.last;
      const int page = check_page(p, work.group, next);
      next = load_page<1>(p, work, last ? seq + 1 : seq, last ? 0 : block + 1);
      const int quarters = count_quarters(item, block);
      smem.rope_empty[rope.slot].wait(rope.parity ^ 1);
      smem.rope_full[rope.slot].arrive_and_expect_tx(quarters * kQuarterBytes);
      load_quarters<1>(p, maps, work, smem.rope_full[rope.slot], &smem.rope[rope.slot], kRopeTile,
                       block, page, quarters);
      rope.advance();
#pragma unroll 1
      for (int i = 0; i < kChunks; ++i, chunk.advance()) {
        smem.chunk_empty[chunk.slot].wait(chunk.parity ^ 1);
        smem.chunk_full[chunk.slot].arrive_and_expect_tx(kKeyBoxTiles * quarters * kQuarterBytes);
        load_quarters<kKeyBoxTiles>(p, maps, work, smem.chunk_full[chunk.slot],
                                    smem.chunks[chunk.slot], i * kKeyBoxTiles, block, page,
                                    quarters);
      }
    }
    if (item.blocks() == 0) next = load_page<1>(p, work, seq + 1, 0);
  }
}

// The same row by row, by all four warps; one of their threads copies the queries, too.
template <typename Element>
__device__ __forceinline__ void gather(const KernelParams& p, const TensorMaps& maps,
                                       NarrowMemory<Source::kRows, Element>& smem) {
  const Work& work = smem.work;  // registers are scarce
  Ring<kChunkSlots<Source::kRows>> chunk;
  Ring<kRopeSlots> rope;
  uint32_t q_parity = 1;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    int next = load_row_page(p, work, item, item.first);
    if (item.blocks() > 0 || seq == work.begin_seq) {
      if (threadIdx.x == kQueryThread) {
        smem.q_empty.wait(q_parity);
        load_item_queries(p, maps, smem, work, seq);
      }
      q_parity ^= 1;
    }
#pragma unroll 1
    for (int block = item.first; block < item.last; ++block) {
      find_rows(p, work, block, next, smem.rows);
      next = load_row_page(p, work, item, block + 1);
      smem.rope_empty[rope.slot].wait(rope.parity ^ 1);
      gather_tiles(p, work, smem.rows, smem.rope[rope.slot], 1, kRopeTile * 128);
      arrive_after_copies(smem.rope_full[rope.slot]);
      rope.advance();
#pragma unroll 1
      for (int i = 0; i < kChunks; ++i, chunk.advance()) {
        smem.chunk_empty[chunk.slot].wait(chunk.parity ^ 1);
        gather_tiles(p, work, smem.rows, smem.chunks[chunk.slot], kKeyBoxTiles,
                     i * kKeyBoxTiles * 128);
        arrive_after_copies(smem.chunk_full[chunk.slot]);
      }
    }
  }
}

// `kWindowed`: with a sliding window or a cap. Without, code is shorter, which shows in small work.
template <Source kSource, bool kWindowed, typename Element>
__global__ void __launch_bounds__(kNarrowThreads, 1)
    narrow_kernel(const __grid_constant__ KernelParams p, const __grid_constant__ TensorMaps maps) {
  extern __shared__ __align__(1024) char raw[];
  auto& smem = *reinterpret_cast<NarrowMemory<kSource, Element>*>(raw);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < kMathWarps) {
    cutlass::arch::warpgroup_reg_alloc<kMathRegisters>();
    const Place place = find_place(p);
    wait_for_kernel_before(place.plan);
    if constexpr (kSource == Source::kPages) {
      const Work work = check_plan(p, read_plan(place));
      if (threadIdx.x == 0) smem.work = work;
      cutlass::arch::NamedBarrier::sync(kNarrowThreads, kReady);
      if (has_item(work, work.begin_seq))
        attend<kSource, kWindowed>(p, smem, warp, threadIdx.x % 32);
    } else {
      cutlass::arch::NamedBarrier::sync(kNarrowThreads, kReady);
      attend<kSource, kWindowed>(p, smem, warp, threadIdx.x % 32);
    }
  } else {
    cutlass::arch::warpgroup_reg_dealloc<kLoaderRegisters>();
    // A thread that loads sets up the barriers itself that it needs, and waits for nobody.
    if (threadIdx.x == kKeyThread) {
      for (FullBarrier& barrier : smem.chunk_full) barrier.init(kFullArrivals<kSource>);
      for (EmptyBarrier& barrier : smem.chunk_empty) {
        barrier.init(kKeyBoxTiles * kReleases<kSource>);
      }
      for (FullBarrier& barrier : smem.rope_full) barrier.init(kFullArrivals<kSource>);
      for (EmptyBarrier& barrier : smem.rope_empty) {
        barrier.init(kSource == Source::kPages ? 1 : kMathThreads);
      }
      smem.waited.init(1);
      cutlass::arch::fence_barrier_init();
    } else if (threadIdx.x == kQueryThread) {
      smem.q_full.init(1);
      smem.q_empty.init(kMathWarps);
      cutlass::arch::fence_barrier_init();
    } else if (threadIdx.x == kPrefetchThread) {
      prefetch_key_maps(maps);
      prefetch_query_maps(maps);
      // Those of sequences' last blocks.
      for (int i = 0; i < kKeyQuarters - 1; ++i) prefetch_map(maps.key_tiles[i]);
    }
    __syncwarp();
    if constexpr (kSource == Source::kPages) {
      cutlass::arch::NamedBarrier::arrive(kNarrowThreads, kReady);
      if (warp == kKeyThread / 32) {
        cutlass::arch::NamedBarrier::arrive(2 * 32, kKeysReady);
      } else if (warp == kPrefetchThread / 32) {
        cutlass::arch::NamedBarrier::sync(2 * 32, kKeysReady);
        if (threadIdx.x == kPrefetchThread) prefetch_keys(p, smem.waited);
        __syncwarp();
      }
    }
    const Place place = find_place(p, zero_of_lane());
    wait_for_kernel_before(place.plan);
    if constexpr (kSource == Source::kRows) {
      if (threadIdx.x == kKeyThread) smem.work = check_plan(p, read_plan(place));
      cutlass::arch::NamedBarrier::sync(kGatherThreads, kLoaderReady);
      cutlass::arch::NamedBarrier::arrive(kNarrowThreads, kReady);
      gather(p, maps, smem);
      // Last: keys are waited for, and the others still have the last of them to multiply.
      write_empty<kWarpgroup>(p, smem.work, 0, kNarrowRows, threadIdx.x % kWarpgroup);
    } else {
      const Work found = read_plan(place);
      if (threadIdx.x == kKeyThread) smem.waited.arrive();
      const Work work = check_plan(p, found);
      if (threadIdx.x == kKeyThread) load_keys<kWindowed>(p, maps, smem, work);
      if (threadIdx.x == kQueryThread) load_queries<kWindowed>(p, maps, smem, work);
      if (threadIdx.x >= kEmptyThread) {
        write_empty<32>(p, work, 0, kNarrowRows, threadIdx.x % 32);
      }
    }
  }
  __syncthreads();  // barriers of part of the CTA want all of it to be there
}

template <Source kSource, bool kWindowed, typename Element>
cudaError_t launch(const DecodeParams& p, const TensorMaps& maps, cudaStream_t stream) {
  const LaunchShape shape = {.ctas = int64_t{p.groups} * p.num_parts * p.h_kv,
                             .threads = kNarrowThreads,
                             .shared_bytes = sizeof(NarrowMemory<kSource, Element>)};
  return launch_dependent<narrow_kernel<kSource, kWindowed, Element>>(shape, stream, p, maps);
}

template <typename Element>
cudaError_t launch_for_keys(const DecodeParams& p, const TensorMaps& maps, cudaStream_t stream) {
  if (comes_by_rows(p)) return launch<Source::kRows, true, Element>(p, maps, stream);
  const bool windowed = p.sliding_window > 0 || p.logits_soft_cap > 0;
  return windowed ? launch<Source::kPages, true, Element>(p, maps, stream)
                  : launch<Source::kPages, false, Element>(p, maps, stream);
}

}  // namespace

cudaError_t launch_narrow_split(const DecodeParams& p, const TensorMaps& maps,
                                cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? launch_for_keys<cutlass::bfloat16_t>(p, maps, stream)
                                     : launch_for_keys<cutlass::half_t>(p, maps, stream);
}

}  // namespace jax_flashmla
