// The split kernel for FP8 caches: 32 query rows a CTA. Keys come row by row (decode_gather.cuh)
// and stay e4m3 all the way: queries and weights are split into e4m3 pieces instead.
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>

#include "cuda/decode_copies.cuh"
#include "cuda/decode_empty.cuh"
#include "cuda/decode_fp8.h"
#include "cuda/decode_fp8_scores.cuh"
#include "cuda/decode_fp8_values.cuh"
#include "cuda/launch.cuh"

namespace jax_flashmla {
namespace {

// Named barriers for: memory is set up; it is, for the warps that copy.
inline constexpr int kReady = 2;
inline constexpr int kLoaderReady = 3;

// Arrivals that complete a full barrier: of all that copy; where the copy engine brings the rest,
// of the thread that tells it and of those that copy scales.
template <Source kSource, KeyFormat kFormat>
inline constexpr int kFp8FullArrivals =
    kSource == Source::kRows ? kGatherThreads
                             : 1 + (kFormat == KeyFormat::kFp8Block ? kGatherThreads : 0);

template <Source kSource, KeyFormat kFormat>
__device__ __forceinline__ void init_barriers(Fp8Memory<kFormat>& smem) {
  for (FullBarrier& barrier : smem.full) barrier.init(kFp8FullArrivals<kSource, kFormat>);
  for (EmptyBarrier& barrier : smem.empty) barrier.init(2 * kWarpgroup);
  for (EmptyBarrier& barrier : smem.weights_full) barrier.init(kWarpgroup);
  for (EmptyBarrier& barrier : smem.weights_empty) barrier.init(2 * kWarpgroup);
  smem.work_known.init(1);
  cutlass::arch::fence_barrier_init();
}

// The scales of a block in a page: two of a key to a thread, each to the list of its tile.
__device__ __forceinline__ void copy_scales(const KernelParams& p, const Work& work, int page,
                                            int row, float (*target)[kBlock]) {
  const int thread = threadIdx.x % kGatherThreads;
  const int key = thread / 2;
  const int first = thread % 2 * 2;
  const char* const from =
      static_cast<const char*>(p.k_cache) + work.head * p.head_bytes + kLatentDim +
      (static_cast<int64_t>(max(page, 0)) * p.page_tokens + row + key) * p.row_bytes;
#pragma unroll
  for (int i = first; i < first + 2; ++i) {
    SM80_CP_ASYNC_CACHEALWAYS_ZFILL<float>::copy(reinterpret_cast<const float*>(from)[i],
                                                 target[i][key], page >= 0);
  }
}

// A thread has the copy engine bring all blocks, in the order of their use; scales, which are to
// lie tile by tile, come by the others, too.
template <KeyFormat kFormat>
__device__ __forceinline__ void load(const KernelParams& p, const Fp8TensorMaps& maps,
                                     Fp8Memory<kFormat>& smem) {
  constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_FIRST);
  const Work& work = smem.work;
  const bool first_thread = threadIdx.x % kGatherThreads == 0;
  if (!smem.kBlocks && !first_thread) return;
  Ring<Fp8Memory<kFormat>::kSlots> slot;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    int next = load_page<1>(p, work, seq, item.first);
#pragma unroll 1
    for (int number = item.first; number < item.last; ++number, slot.advance()) {
      auto& block = smem.blocks[slot.slot];
      const int page = check_page(p, work, next);
      const int row = (number & ((1 << p.page_shift) - 1)) * kBlock;
      next = load_page<1>(p, work, seq, number + 1);
      FullBarrier& full = smem.full[slot.slot];
      smem.empty[slot.slot].wait(slot.parity ^ 1);
      if (first_thread) {
        auto* const barrier = reinterpret_cast<uint64_t*>(&full);
        full.arrive_and_expect_tx(sizeof(block.latent) + sizeof(block.rope));
        SM90_TMA_LOAD_5D::copy(&maps.latent, barrier, kHint, block.latent, 0, row, 0, work.head,
                               page);
        SM90_TMA_LOAD_5D::copy(&maps.rope, barrier, kHint, block.rope, 0, row, 0, work.head, page);
      }
      if constexpr (smem.kBlocks) {
        copy_scales(p, work, page, row, block.scales);
        arrive_after_copies(full);
      }
    }
  }
}

// The same row by row, by all four warps.
template <KeyFormat kFormat>
__device__ __forceinline__ void gather(const KernelParams& p, Fp8Memory<kFormat>& smem) {
  const Work& work = smem.work;
  Ring<Fp8Memory<kFormat>::kSlots> slot;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    int next = load_row_page(p, work, item, item.first);
#pragma unroll 1
    for (int number = item.first; number < item.last; ++number, slot.advance()) {
      auto& block = smem.blocks[slot.slot];
      find_rows(p, work, number, next, smem.rows);
      next = load_row_page(p, work, item, number + 1);
      smem.empty[slot.slot].wait(slot.parity ^ 1);
      gather_tiles(p, work, smem.rows, block.latent[0], kFp8Tiles, 0);
      if constexpr (smem.kBlocks) {
        gather_scales(p, work, smem.rows, block.scales, kLatentDim);
        gather_tiles(p, work, smem.rows, block.rope, 1, kLatentDim + kScaleBytes);
      } else {
        gather_tiles<1, 4>(p, work, smem.rows, block.rope, 1, kLatentDim);
      }
      arrive_after_copies(smem.full[slot.slot]);
    }
  }
}

template <Source kSource, KeyFormat kFormat, typename Element>
__global__ void __launch_bounds__(kThreads, 1)
    fp8_kernel(const __grid_constant__ KernelParams p, const __grid_constant__ Fp8TensorMaps maps) {
  extern __shared__ __align__(1024) char raw[];
  auto& smem = *reinterpret_cast<Fp8Memory<kFormat>*>(raw);
  const int role = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  const int thread = threadIdx.x % kWarpgroup;
  if (role == kLoader) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (thread == 0) init_barriers<kSource>(smem);
    __syncwarp();
    wait_for_kernel_before();
    cutlass::arch::NamedBarrier::sync(kWarpgroup, kLoaderReady);
    cutlass::arch::NamedBarrier::arrive(kThreads, kReady);
    smem.work_known.wait(0);
    if constexpr (kSource == Source::kPages) {
      load(p, maps, smem);
      __syncwarp();
    } else {
      gather(p, smem);
    }
    write_empty<kWarpgroup>(p, smem.work, smem.work.tile * kFp8Rows, kFp8Rows, thread);
  } else {
    wait_for_kernel_before();
    if (threadIdx.x == 0) smem.work = check_plan(p, find_work(p));
    cutlass::arch::NamedBarrier::sync(kThreads, kReady);
    if (threadIdx.x == 0) smem.work_known.arrive();
    if (role == kScores) {
      cutlass::arch::warpgroup_reg_alloc<184>();
      run_fp8_scores<kSource, kFormat, Element>(p, smem, thread);
    } else {
      cutlass::arch::warpgroup_reg_alloc<144>();
      run_fp8_values<kFormat, Element>(p, smem, role, thread);
    }
  }
  __syncthreads();  // barriers of part of the CTA want all of it to be there
}

template <Source kSource, KeyFormat kFormat, typename Element>
cudaError_t launch(const DecodeParams& p, cudaStream_t stream) {
  Fp8TensorMaps maps = {};
  if (kSource == Source::kPages) {
    const cudaError_t error = make_fp8_tensor_maps(p, &maps);
    if (error != cudaSuccess) return error;
  }
  const LaunchShape shape = {.ctas = int64_t{p.groups} * p.num_parts * p.h_kv * p.row_tiles(),
                             .threads = kThreads,
                             .shared_bytes = sizeof(Fp8Memory<kFormat>)};
  return launch_dependent<fp8_kernel<kSource, kFormat, Element>>(shape, stream, p, maps);
}

template <KeyFormat kFormat, typename Element>
cudaError_t launch_for_keys(const DecodeParams& p, cudaStream_t stream) {
  return comes_by_rows(p) ? launch<Source::kRows, kFormat, Element>(p, stream)
                          : launch<Source::kPages, kFormat, Element>(p, stream);
}

template <KeyFormat kFormat>
cudaError_t launch_for_queries(const DecodeParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? launch_for_keys<kFormat, cutlass::bfloat16_t>(p, stream)
                                     : launch_for_keys<kFormat, cutlass::half_t>(p, stream);
}

}  // namespace

cudaError_t launch_fp8_split(const DecodeParams& p, cudaStream_t stream) {
  return p.key_format == KeyFormat::kFp8Block
             ? launch_for_queries<KeyFormat::kFp8Block>(p, stream)
             : launch_for_queries<KeyFormat::kFp8PerTensor>(p, stream);
}

}  // namespace jax_flashmla
