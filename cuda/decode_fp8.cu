// The split kernel for FP8 caches: 16, 32 or 64 query rows a CTA. Keys stay e4m3: queries are split
// into e4m3 pieces, and values are widened on their way into registers. Drawn in cuda/README.md.
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>

#include "cuda/decode_empty.cuh"
#include "cuda/decode_fp8.h"
#include "cuda/decode_fp8_load.cuh"
#include "cuda/decode_fp8_scores.cuh"
#include "cuda/decode_fp8_turned.cuh"
#include "cuda/decode_fp8_values.cuh"
#include "cuda/decode_prefetch.cuh"
#include "cuda/launch.cuh"

namespace jax_flashmla {
namespace {

inline constexpr int kPrefetchThread = 96;  // of the loader: the first of a warp that has time
inline constexpr int kReady = 2;            // the named barrier for: memory is set up

template <Source kSource, int kRows, KeyFormat kFormat>
__device__ __forceinline__ void init_barriers(Fp8Memory<kRows, kFormat>& smem) {
  for (FullBarrier& barrier : smem.full) barrier.init(kFullArrivals<kSource>);
  for (EmptyBarrier& barrier : smem.empty) barrier.init(2 * kWarpgroup);
  for (EmptyBarrier& barrier : smem.scales_full) barrier.init(kScaleWarps * 32);
  for (EmptyBarrier& barrier : smem.weights_full) barrier.init(kWarpgroup);
  for (EmptyBarrier& barrier : smem.weights_empty) barrier.init(2 * kWarpgroup);
  smem.work_known.init(1);
  smem.waited.init(1);
  cutlass::arch::fence_barrier_init();
}

// Of a thread, by its role.
template <int kRows, KeyFormat kFormat>
struct Registers {
  static constexpr bool kMany = kRows == kRowTile;
  static constexpr int kValues = kMany ? 168 : kRows == kNarrowRows ? 128 : 136;
  static constexpr int kLoader = kMany && kFormat != KeyFormat::kFp8Block ? 24 : kMany ? 40 : 48;
  static constexpr int kScores = 512 - 2 * kValues - kLoader;
};

template <Source kSource, int kRows, KeyFormat kFormat, typename Element>
__global__ void __launch_bounds__(kThreads, 1)
    fp8_kernel(const __grid_constant__ KernelParams p, const __grid_constant__ Fp8TensorMaps maps) {
  extern __shared__ __align__(1024) char raw[];
  auto& smem = *reinterpret_cast<Fp8Memory<kRows, kFormat>*>(raw);
  const int role = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  const int thread = threadIdx.x % kWarpgroup;
  if (role == kLoader) {
    cutlass::arch::warpgroup_reg_dealloc<Registers<kRows, kFormat>::kLoader>();
    if (thread == 0) init_barriers<kSource>(smem);
    __syncwarp();
    sync_loader();
    cutlass::arch::NamedBarrier::arrive(kThreads, kReady);
    if (kSource == Source::kPages && thread == kPrefetchThread) prefetch_keys(p, smem.waited);
    __syncwarp();
    wait_for_kernel_before();
    if (kSource == Source::kPages && thread == 0) smem.waited.arrive();
    smem.work_known.wait(0);
    if constexpr (kSource == Source::kPages) {
      load(p, maps, smem);
    } else {
      gather(p, smem);
    }
    __syncwarp();
    write_empty<kWarpgroup>(p, smem.work, smem.work.tile * kRows, kRows, thread);
  } else {
    const Place place = find_place(p);
    wait_for_kernel_before(place.plan);
    if (threadIdx.x == 0) smem.work = check_plan(p, read_plan(place));
    cutlass::arch::NamedBarrier::sync(kThreads, kReady);
    if (threadIdx.x == 0) smem.work_known.arrive();
    if (role == kScores) {
      cutlass::arch::warpgroup_reg_alloc<Registers<kRows, kFormat>::kScores>();
      if constexpr (kTurned<kRows>) {
        run_turned_scores<kFormat, Element>(p, smem, thread);
      } else {
        run_fp8_scores<kSource, kRows, kFormat, Element>(p, smem, thread);
      }
    } else {
      cutlass::arch::warpgroup_reg_alloc<Registers<kRows, kFormat>::kValues>();
      run_fp8_values<kRows, kFormat, Element>(p, smem, role, thread);
    }
  }
  __syncthreads();  // barriers of part of the CTA want all of it to be there
}

template <Source kSource, int kRows, KeyFormat kFormat, typename Element>
cudaError_t launch(const DecodeParams& p, cudaStream_t stream) {
  Fp8TensorMaps maps = {};
  if (kSource == Source::kPages) {
    const cudaError_t error = make_fp8_tensor_maps(p, &maps);
    if (error != cudaSuccess) return error;
  }
  const LaunchShape shape = {.ctas = int64_t{p.groups} * p.num_parts * p.h_kv * p.row_tiles(),
                             .threads = kThreads,
                             .shared_bytes = sizeof(Fp8Memory<kRows, kFormat>)};
  return launch_dependent<fp8_kernel<kSource, kRows, kFormat, Element>>(shape, stream, p, maps);
}

template <KeyFormat kFormat, typename Element>
cudaError_t launch_for_keys(const DecodeParams& p, cudaStream_t stream) {
  if (comes_by_rows(p)) return launch<Source::kRows, kFp8FewRows, kFormat, Element>(p, stream);
  if (is_narrow(p)) return launch<Source::kPages, kNarrowRows, kFormat, Element>(p, stream);
  return p.has_few_rows() ? launch<Source::kPages, kFp8FewRows, kFormat, Element>(p, stream)
                          : launch<Source::kPages, kRowTile, kFormat, Element>(p, stream);
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
