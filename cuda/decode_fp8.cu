// The split kernel for FP8 caches: 16 query rows a CTA. Keys come row by row (decode_gather.cuh),
// stay e4m3 in shared memory, and are widened on their way into registers.
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>

#include "cuda/decode_fp8.h"
#include "cuda/decode_fp8_attend.cuh"
#include "cuda/decode_gather.cuh"
#include "cuda/launch.cuh"

namespace jax_flashmla {
namespace {

inline constexpr int kReady = 2;  // the named barrier for: memory is set up

// Four warps copy all blocks, in the order of their use.
template <KeyFormat kFormat, typename Element>
__device__ __forceinline__ void gather(const KernelParams& p, Fp8Memory<kFormat, Element>& smem) {
  constexpr bool kScales = kFormat == KeyFormat::kFp8Block;
  const Work& work = smem.work;
  Ring<kFp8Slots> slot;
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
      if constexpr (kScales) {
        gather_vectors(p, work, smem.rows, block.scales, kLatentDim);
        gather_tiles(p, work, smem.rows, block.rope, 1, kLatentDim + kScaleBytes);
      } else {
        gather_tiles(p, work, smem.rows, block.rope, 1, kLatentDim, 4);
      }
      arrive_after_copies(smem.full[slot.slot]);
    }
  }
}

template <KeyFormat kFormat, typename Element>
__global__ void __launch_bounds__(kNarrowThreads, 1)
    fp8_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) char raw[];
  auto& smem = *reinterpret_cast<Fp8Memory<kFormat, Element>*>(raw);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < kMathWarps) {
    cutlass::arch::warpgroup_reg_alloc<kMathRegisters>();
    if (threadIdx.x == 0) {
      for (FullBarrier& barrier : smem.full) barrier.init(kGatherThreads);
      for (EmptyBarrier& barrier : smem.empty) barrier.init(kMathWarps);
      cutlass::arch::fence_barrier_init();
    }
    wait_for_kernel_before();
    if (threadIdx.x == 0) smem.work = check_plan(p, find_work(p));
    cutlass::arch::NamedBarrier::sync(kNarrowThreads, kReady);
    attend_fp8(p, smem, warp, threadIdx.x % 32);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<kLoaderRegisters>();
    wait_for_kernel_before();
    cutlass::arch::NamedBarrier::sync(kNarrowThreads, kReady);
    gather(p, smem);
  }
  __syncthreads();  // barriers of part of the CTA want all of it to be there
}

template <KeyFormat kFormat, typename Element>
cudaError_t launch(const DecodeParams& p, cudaStream_t stream) {
  const LaunchShape shape = {.ctas = int64_t{p.groups} * p.num_parts * p.h_kv * p.row_tiles(),
                             .threads = kNarrowThreads,
                             .shared_bytes = sizeof(Fp8Memory<kFormat, Element>)};
  return launch_dependent<fp8_kernel<kFormat, Element>>(shape, stream, p);
}

template <KeyFormat kFormat>
cudaError_t launch_for_queries(const DecodeParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? launch<kFormat, cutlass::bfloat16_t>(p, stream)
                                     : launch<kFormat, cutlass::half_t>(p, stream);
}

}  // namespace

cudaError_t launch_fp8_split(const DecodeParams& p, cudaStream_t stream) {
  return p.key_format == KeyFormat::kFp8Block
             ? launch_for_queries<KeyFormat::kFp8Block>(p, stream)
             : launch_for_queries<KeyFormat::kFp8PerTensor>(p, stream);
}

}  // namespace jax_flashmla
