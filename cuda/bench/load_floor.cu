#include <cutlass/numeric_types.h>

#include "cuda/bench/load_floor.h"
#include "cuda/decode_load.cuh"

namespace jax_flashmla {
namespace {

constexpr int kSlots = 2;  // blocks in flight; three are a little slower

struct FloorMemory {
  alignas(1024) cutlass::bfloat16_t k[kSlots][kTiles][kTileElements];
  FullBarrier full[kSlots];
};

// `kNarrow`: with the tensor maps of the narrow kernel.
template <bool kNarrow>
__global__ void __launch_bounds__(32) load_floor_kernel(const __grid_constant__ KernelParams p,
                                                        const __grid_constant__ TensorMaps maps) {
  extern __shared__ __align__(1024) char raw[];
  auto& smem = *reinterpret_cast<FloorMemory*>(raw);
  const int lane = threadIdx.x;
  if (lane == 0) {
    for (FullBarrier& barrier : smem.full) barrier.init(1);
    cutlass::arch::fence_barrier_init();
  }
  __syncwarp();

  const Work work = check_plan(p, read_plan(find_place(p)));
  Ring<kSlots> slot;
  int loaded = 0;
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    for (int block = item.first; block < item.last; ++block) {
      if (loaded >= kSlots) smem.full[slot.slot].wait(slot.parity ^ 1);
      const int quarters = kNarrow ? count_quarters(item, block) : kKeyQuarters;
      FullBarrier& full = smem.full[slot.slot];
      if (lane == 0) full.arrive_and_expect_tx(kTiles * quarters * kQuarterBytes);
      __syncwarp();
      const int tile = lane * kKeyBoxTiles;
      auto* const target = &smem.k[slot.slot][tile];
      const auto load = [&](auto tiles) {
        if constexpr (kNarrow) {
          const int page = check_page(p, work.group, load_page<1>(p, work, seq, block));
          load_quarters<tiles>(p, maps, work, full, target, tile, block, page, quarters);
        } else {
          const int first = load_page<kMaxParts>(p, work, seq, block);
          const BlockPages pages(p, work, seq, block, first);
          load_key_tiles<1, tiles>(p, maps, work, full, target, tile, pages);
        }
      };
      if (tile < kRopeTile) load(Int<kKeyBoxTiles>{});
      if (tile == kRopeTile) load(Int<1>{});
      slot.advance();
      ++loaded;
    }
  }
  // The last block into each slot.
  for (int i = 0; i < kSlots; ++i) {
    const bool used = loaded >= kSlots || i < loaded;
    const uint32_t parity = i < slot.slot ? slot.parity : slot.parity ^ 1;
    if (used) smem.full[i].wait(parity);
  }
}

}  // namespace

cudaError_t launch_load_floor(const DecodeParams& p, cudaStream_t stream) {
  if (p.is_fp8() || p.row_tiles() != 1 || !has_block_pages(p)) return cudaErrorInvalidValue;
  TensorMaps maps;
  cudaError_t error = make_tensor_maps(p, &maps);
  if (error != cudaSuccess) return error;
  constexpr int kBytes = sizeof(FloorMemory);
  const auto kernel = is_narrow(p) ? load_floor_kernel<true> : load_floor_kernel<false>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const unsigned ctas = static_cast<unsigned>(p.groups * p.num_parts * p.h_kv);
  kernel<<<ctas, 32, kBytes, stream>>>(KernelParams(p), maps);
  return cudaGetLastError();
}

}  // namespace jax_flashmla
