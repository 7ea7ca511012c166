// The wide split kernel, and which of both runs. Schedule, barriers and budgets are drawn in
// cuda/README.md.
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>

#include "cuda/decode_empty.cuh"
#include "cuda/decode_fp8.h"
#include "cuda/decode_load.cuh"
#include "cuda/decode_narrow.h"
#include "cuda/decode_scores.cuh"
#include "cuda/decode_values.cuh"
#include "cuda/launch.cuh"

namespace jax_flashmla {
namespace {

// Threads of the loader: those that load, and the first of a warp that has time.
inline constexpr int kKeyThread = 0;
inline constexpr int kLeftThread = 32;
inline constexpr int kRightThread = 64;
inline constexpr int kEmptyThread = 96;

// Named barriers of a CTA without a cluster, for: shared memory is set up; its barriers are.
inline constexpr int kSetUp = 1;
inline constexpr int kBarriersSetUp = 2;

template <int kCtas, Source kSource, typename Element>
__device__ __forceinline__ void init_barriers(SharedMemory<Element>& smem) {
  for (int slot = 0; slot < kHalfSlots; ++slot) {
    for (int part = 0; part < kParts; ++part) {
      smem.half_full[slot][part].init(kFullArrivals<kSource>);
      smem.half_empty[slot][part].init(kWarps * kReleases<kSource> * kCtas);
    }
  }
  for (int slot = 0; slot < kRopeSlots; ++slot) {
    smem.rope_full[slot].init(kFullArrivals<kSource>);
    smem.rope_empty[slot].init(2 * kWarps * kCtas);
    smem.weights[slot].first.init(kWarpgroup);
    smem.weights[slot].rest.init(kWarpgroup);
    smem.factors_read[slot].init(2 * kWarpgroup);
  }
  smem.q_full.init(1);
  smem.q_empty.init(kWarps);
  smem.work_known.init(1);
  cutlass::arch::fence_barrier_init();
}

// All meet when shared memory is set up. The loader has set up barriers, and need not wait for the
// rest, but in a cluster for the others' barriers.
template <int kCtas>
__device__ __forceinline__ void arrive_as_loader() {
  if constexpr (kCtas == 1) {
    cutlass::arch::NamedBarrier::sync(kWarpgroup, kBarriersSetUp);
    cutlass::arch::NamedBarrier::arrive(kThreads, kSetUp);
  } else {
    cluster_arrive_relaxed();  // what others are to see, `fence_barrier_init` has released
  }
}
template <int kCtas>
__device__ __forceinline__ void wait_as_loader() {
  if constexpr (kCtas > 1) cluster_wait();
}

template <int kCtas>
__device__ __forceinline__ void meet_loader() {
  if constexpr (kCtas == 1) {
    cutlass::arch::NamedBarrier::sync(kThreads, kSetUp);
  } else {
    cluster_sync();
  }
}

// A cluster of `kCtas` CTAs works on as many row tiles of the same sequence.
template <int kCtas, Source kSource, typename Element>
__global__ void __launch_bounds__(kThreads, 1)
    split_kernel(const __grid_constant__ KernelParams p, const __grid_constant__ TensorMaps maps) {
  extern __shared__ __align__(1024) char raw[];
  auto& smem = *reinterpret_cast<SharedMemory<Element>*>(raw);
  const int role = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  const int thread = threadIdx.x % kWarpgroup;
  if (role == kLoader) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (thread == kKeyThread) init_barriers<kCtas, kSource>(smem);
    if (thread == kEmptyThread) {
      if constexpr (kSource == Source::kPages) prefetch_key_maps(maps);
      prefetch_query_maps(maps);
    }
    __syncwarp();
    arrive_as_loader<kCtas>();
    const Place place = find_place(p, zero_of_lane());
    wait_for_kernel_before(place.plan);
    const Work found = read_plan(place);  // on its way while a cluster meets
    wait_as_loader<kCtas>();
    const Work work = check_plan(p, found);
    if (thread == kRightThread) {
      smem.work = work;
      smem.work_known.arrive();
    }
    if constexpr (kSource == Source::kRows) {
      __syncwarp();
      smem.work_known.wait(0);
      gather(p, maps, smem);
      // Last: keys are waited for, and the others still have the last of them to multiply.
      write_empty<kWarpgroup>(p, smem.work, smem.work.tile * kRowTile, kRowTile, thread);
    } else {
      if (thread == kKeyThread) load_keys<kCtas>(p, maps, smem, work);
      if (thread == kLeftThread) load_queries(p, maps, smem, work, kLeft);
      if (thread == kRightThread) load_queries(p, maps, smem, work, kRight);
      if (thread >= kEmptyThread) {
        write_empty<32>(p, work, work.tile * kRowTile, kRowTile, thread % 32);
      }
    }
  } else {
    clear_missing_rows(p, smem.q, threadIdx.x);
    meet_loader<kCtas>();
    wait_for_kernel_before();
    smem.work_known.wait(0);
    if (role == kScores) {
      cutlass::arch::warpgroup_reg_alloc<152>();
      run_scores<kCtas, kSource>(p, smem, thread);
    } else {
      cutlass::arch::warpgroup_reg_alloc<160>();
      run_values<kCtas, kSource>(p, smem, role, thread);
    }
  }
  if constexpr (kCtas == 1) {
    __syncthreads();  // barriers of part of the CTA want all of it to be there
  } else {
    // The others may still write into this CTA's shared memory, or tell it what they have read.
    cluster_sync();
  }
}

template <int kCtas, Source kSource, typename Element>
cudaError_t launch(const DecodeParams& p, const TensorMaps& maps, cudaStream_t stream) {
  const LaunchShape shape = {.ctas = int64_t{p.groups} * p.num_parts * p.h_kv * p.row_tiles(),
                             .threads = kThreads,
                             .shared_bytes = sizeof(SharedMemory<Element>),
                             .cluster = kCtas};
  return launch_dependent<split_kernel<kCtas, kSource, Element>>(shape, stream, p, maps);
}

template <typename Element>
cudaError_t launch_for_tiles(const DecodeParams& p, const TensorMaps& maps, cudaStream_t stream) {
  if (comes_by_rows(p)) return launch<1, Source::kRows, Element>(p, maps, stream);
  return p.row_tiles() % 2 == 0 ? launch<2, Source::kPages, Element>(p, maps, stream)
                                : launch<1, Source::kPages, Element>(p, maps, stream);
}

}  // namespace

cudaError_t launch_split(const DecodeParams& p, cudaStream_t stream) {
  if (p.is_fp8()) return launch_fp8_split(p, stream);
  TensorMaps maps;
  const cudaError_t error = make_tensor_maps(p, &maps);
  if (error != cudaSuccess) return error;
  if (is_narrow(p)) return launch_narrow_split(p, maps, stream);
  return p.dtype == DType::kBFloat16 ? launch_for_tiles<cutlass::bfloat16_t>(p, maps, stream)
                                     : launch_for_tiles<cutlass::half_t>(p, maps, stream);
}

cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream) {
  if (params.groups == 0 || params.batch == 0) return cudaSuccess;
  const cudaError_t error = launch_split(params, stream);
  return error == cudaSuccess ? launch_combine(params, stream) : error;
}

}  // namespace jax_flashmla
