// The split kernel for FP8 caches: 32 query rows a CTA. Keys come row by row (decode_gather.cuh)
// and stay e4m3 all the way: queries and weights are split into e4m3 pieces instead.
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>

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

template <KeyFormat kFormat>
__device__ __forceinline__ void init_barriers(Fp8Memory<kFormat>& smem) {
  for (FullBarrier& barrier : smem.full) barrier.init(kGatherThreads);
  for (EmptyBarrier& barrier : smem.empty) barrier.init(2 * kWarpgroup);
  for (EmptyBarrier& barrier : smem.weights_full) barrier.init(kWarpgroup);
  for (EmptyBarrier& barrier : smem.weights_empty) barrier.init(2 * kWarpgroup);
  smem.work_known.init(1);
  cutlass::arch::fence_barrier_init();
}

// Four warps copy all blocks, in the order of their use.
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
        gather_tiles(p, work, smem.rows, block.rope, 1, kLatentDim, 4);
      }
      arrive_after_copies(smem.full[slot.slot]);
    }
  }
}

template <KeyFormat kFormat, typename Element>
__global__ void __launch_bounds__(kThreads, 1) fp8_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) char raw[];
  auto& smem = *reinterpret_cast<Fp8Memory<kFormat>*>(raw);
  const int role = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  const int thread = threadIdx.x % kWarpgroup;
  if (role == kLoader) {
    cutlass::arch::warpgroup_reg_dealloc<32>();
    if (thread == 0) init_barriers(smem);
    __syncwarp();
    wait_for_kernel_before();
    cutlass::arch::NamedBarrier::sync(kWarpgroup, kLoaderReady);
    cutlass::arch::NamedBarrier::arrive(kThreads, kReady);
    smem.work_known.wait(0);
    gather(p, smem);
    write_empty<kWarpgroup>(p, smem.work, smem.work.tile * kFp8Rows, kFp8Rows, thread);
  } else {
    wait_for_kernel_before();
    if (threadIdx.x == 0) smem.work = check_plan(p, find_work(p));
    cutlass::arch::NamedBarrier::sync(kThreads, kReady);
    if (threadIdx.x == 0) smem.work_known.arrive();
    if (role == kScores) {
      cutlass::arch::warpgroup_reg_alloc<192>();
      run_fp8_scores<kFormat, Element>(p, smem, thread);
    } else {
      cutlass::arch::warpgroup_reg_alloc<144>();
      run_fp8_values<kFormat, Element>(p, smem, role, thread);
    }
  }
  __syncthreads();  // barriers of part of the CTA want all of it to be there
}

template <KeyFormat kFormat, typename Element>
cudaError_t launch(const DecodeParams& p, cudaStream_t stream) {
  const LaunchShape shape = {.ctas = int64_t{p.groups} * p.num_parts * p.h_kv * p.row_tiles(),
                             .threads = kThreads,
                             .shared_bytes = sizeof(Fp8Memory<kFormat>)};
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
