// The split kernel. Schedule, barriers and budgets are drawn in cuda/README.md.
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>

#include <cfloat>

#include "cuda/decode_load.cuh"
#include "cuda/decode_math.cuh"
#include "cuda/decode_store.cuh"
#include "cuda/tensor_map.h"

namespace jax_flashmla {
namespace {

// One of the two consumer warpgroups, `kRole`. It computes the scores of every second block, whose
// buffer has its number, and multiplies the weights of every block with its half of the values.
//
// It adds the other's last block either before it computes the scores of its own (its buffer is
// then refilled sooner) or, if its own block has already landed, after it has passed on its weights
// (the other then waits less).
template <int kRole, typename Element>
__device__ __forceinline__ void run_consumer(const DecodeParams& p, SharedMemory<Element>& smem,
                                             const Work& work, int thread) {
  constexpr int kOther = 1 - kRole;
  constexpr Sync kAlone = kRole == kLeft ? Sync::kLeftOnly : Sync::kRightOnly;
  constexpr int kLastTile = kRole == kLeft ? kRopeTile : kHalfTiles - 1;  // to be loaded

  const Rows rows(thread);
  Phases phases;
  Tensor out = partition_fragment_C(OtherMma<Element>{}, Shape<_64, _256>{});
  float max[2];           // of the two rows, over all blocks so far, base 2
  float sum[2];           // this thread's part, over the own blocks
  float other_factor[2];  // from the maximum before the other's last block to the one after it

  // Waits for the other's weights and takes over their maximum.
  const auto meet_other = [&]() __attribute__((always_inline)) {
    smem.weights[kOther].wait(phases.parity(kOther));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float new_max = smem.row_max[kOther][rows.row(i)];
      other_factor[i] = exp2f(max[i] - new_max);
      max[i] = new_max;
      sum[i] *= other_factor[i];
    }
  };
  const auto add_other = [&]() __attribute__((always_inline)) {
    rescale(out, other_factor);
    wait_values(smem, kOther, kRole, phases.parity(kOther));
    issue_other_values(smem, kOther, kRole, thread, out);
    warpgroup_wait<0>();
    warpgroup_fence_operand(out);
    release(smem, kOther, kRole, thread);
    ++phases.uses[kOther];
  };

  // The own block number `block`; `pending`: the other's block before it is still to be added.
  const auto process_own = [&](const Item& item, int block,
                               bool pending) __attribute__((always_inline)) {
    if (thread == 0) {
      // Whichever comes first decides what is done first.
      bool landed;
      do {
        landed = smem.full[kRole][kLastTile].test_wait(phases.parity(kRole));
      } while (!landed && pending && !smem.weights[kOther].test_wait(phases.parity(kOther)));
      smem.landed[kRole] = landed;
    }
    const int valid = item.length - block * kBlock;
    if (valid < kBlock) {
#pragma unroll 1
      for (int tile = 0; tile < kTiles; ++tile) {
        smem.full[kRole][tile].wait(phases.parity(kRole));
      }
      clear_past_end(smem, kRole, valid, thread);
    }
    sync(kAlone, kWarpgroup);
    const bool scores_first = smem.landed[kRole];

    if (pending && !scores_first) {
      meet_other();
      add_other();
    }
    Tensor scores = partition_fragment_C(ScoresMma<Element>{}, Shape<_64, _64>{});
    issue_scores<kRole>(smem, phases.parity(kRole), thread, scores);
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores);
    scale_and_mask(p, work, item, block, rows, scores);
    if (pending && scores_first) meet_other();

    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float new_max = row_max(scores, i, max[i]);
      factor[i] = exp2f(max[i] - new_max);
      max[i] = new_max;
      if (rows.column == 0) smem.row_max[kRole][rows.row(i)] = new_max;
      sum[i] = sum[i] * factor[i] + exponentiate(scores, i, new_max);
    }
    Tensor weights = pack_weights<Element>(scores);
    store_weights(smem, kRole, rows, weights);
    __syncwarp();
    if (thread % 32 == 0) smem.weights[kRole].arrive();

    if (pending && scores_first) add_other();
    rescale(out, factor);
    issue_own_values(smem, kRole, kRole, thread, weights, out);
    warpgroup_wait<0>();
    warpgroup_fence_operand(out);
    release(smem, kRole, kRole, thread);
    ++phases.uses[kRole];
  };

  uint32_t q_parity = 0;
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item(p, work, seq);
    clear(out);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      max[i] = -FLT_MAX;
      sum[i] = 0;
    }
    smem.q_full.wait(q_parity);
    q_parity ^= 1;

    for (int block = item.first + kRole; block < item.last; block += 2) {
      process_own(item, block, block > item.first);
    }
    // The last block, where it was the other's.
    if (item.blocks() > 0 && item.blocks() % 2 == kRole) {
      meet_other();
      add_other();
    }

    if (thread % 32 == 0) smem.q_empty.arrive();
    // Sums over the threads of a row, then over both warpgroups, then the result.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float total = sum[i];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      if (rows.column == 0) smem.row_sums[seq & 1][kRole][rows.row(i)] = total;
    }
    sync(Sync::kConsumers, kConsumers);
    write_result(p, smem, work, item, kRole, rows, max, out);
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, 1)
    split_kernel(const __grid_constant__ DecodeParams p, const __grid_constant__ CUtensorMap map) {
  extern __shared__ __align__(1024) char raw[];
  auto& smem = *reinterpret_cast<SharedMemory<Element>*>(raw);
  {
    const Work work = find_work(p);
    if (!has_item(work, work.begin_seq)) return;
    clear_missing_rows(p, smem, work);
  }
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const TmaDescriptor*>(&map));
    for (int stage = 0; stage < 2; ++stage) {
      for (int tile = 0; tile < kTiles; ++tile) smem.full[stage][tile].init(1);
      for (int half = 0; half < 2; ++half) smem.empty[stage][half].init(kWarpgroup / 32);
      smem.weights[stage].init(kWarpgroup / 32);
    }
    smem.q_full.init(kQueryLoaders);
    smem.q_empty.init(kConsumers / 32);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  // Every role finds its work again: kept across the branch, it would be spilled.
  const int role = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  if (role == kLoader) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    const int thread = threadIdx.x % kWarpgroup;
    const Work work = find_work(p);
    if (thread < 32) {
      run_loader(p, &map, smem, work, thread);
    } else {
      run_query_loader(p, smem, work, thread - 32);
    }
  } else if (role == kLeft) {
    cutlass::arch::warpgroup_reg_alloc<232>();
    run_consumer<kLeft>(p, smem, find_work(p), threadIdx.x % kWarpgroup);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    run_consumer<kRight>(p, smem, find_work(p), threadIdx.x % kWarpgroup);
  }
}

template <typename Element>
cudaError_t launch(const DecodeParams& p, const CUtensorMap& map, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedMemory<Element>);
  const auto kernel = split_kernel<Element>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int64_t ctas = int64_t{p.groups} * p.num_parts * p.h_kv * p.row_tiles();
  if (ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(ctas), kThreads, kBytes, stream>>>(p, map);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_split(const DecodeParams& p, cudaStream_t stream) {
  CUtensorMap map;
  const cudaError_t error = make_pool_map(p, &map);
  if (error != cudaSuccess) return error;
  return p.dtype == DType::kBFloat16 ? launch<cutlass::bfloat16_t>(p, map, stream)
                                     : launch<cutlass::half_t>(p, map, stream);
}

cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream) {
  if (params.groups == 0 || params.batch == 0) return cudaSuccess;
  const cudaError_t error = launch_split(params, stream);
  return error == cudaSuccess ? launch_combine(params, stream) : error;
}

}  // namespace jax_flashmla
