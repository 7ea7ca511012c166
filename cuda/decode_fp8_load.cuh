// The loader of the split kernel for FP8 caches: keys by the copy engine or row by row, and the
// scales of fp8_block.
#pragma once

#include "cuda/decode_copies.cuh"
#include "cuda/decode_fp8_shared.cuh"

namespace jax_flashmla {

// Arrivals that complete a full barrier: of the thread that tells the copy engine, or of all that
// copy row by row; of all when they have written scales.
template <Source kSource, KeyFormat kFormat>
inline constexpr int kFp8FullArrivals =
    kFullArrivals<kSource> + (kFormat == KeyFormat::kFp8Block ? kGatherThreads : 0);

// A named barrier for the loader's four warps.
__device__ __forceinline__ void sync_loader() {
  cutlass::arch::NamedBarrier::sync(kGatherThreads, 3);
}

// The scales that a thread has: of the key that `GatherThread` looks up, and of two tiles.
struct ThreadScales {
  float2 two = {0, 0};
  float base[2];  // of the item so far

  __device__ __forceinline__ void begin_item() { base[0] = base[1] = __int_as_float(1 << 23); }

  // `row`: among the rows of all groups' pages; -1: zeros. Does not wait for them.
  __device__ __forceinline__ void load(const KernelParams& p, const Work& work, int row) {
    const int first = GatherThread().lane / 16 * 8;
    const char* const from = static_cast<const char*>(p.k_cache) + work.head * p.head_bytes +
                             kLatentDim + first + static_cast<int64_t>(row) * p.row_bytes;
    two = row < 0 ? float2{0, 0} : *reinterpret_cast<const float2*>(from);
  }

  // Writes a block's scales. All of the loader's warps meet, for their largest.
  __device__ __forceinline__ void write(BlockScales& block) {
    const GatherThread thread;
    const bool upper = thread.lane >= 16;
    const auto largest = [&](bool mine, float x) {
      const uint32_t bits = __float_as_uint(fabsf(x));
      return __uint_as_float(__reduce_max_sync(0xffffffffu, mine ? bits : 0));
    };
    const float4 of_warp = {largest(!upper, two.x), largest(!upper, two.y), largest(upper, two.x),
                            largest(upper, two.y)};
    if (thread.lane == 0) block.largest[thread.warp] = of_warp;
    sync_loader();
    const int tile = upper ? 2 : 0;
    const int key = thread.looked_up();
    float scale[2] = {two.x, two.y};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t top = 0;
#pragma unroll
      for (int warp = 0; warp < kGatherWarps; ++warp) {
        top = max(top,
                  __float_as_uint(reinterpret_cast<const float*>(&block.largest[warp])[tile + i]));
      }
      constexpr float kRoom = 32;  // times 448 is a 16-bit float
      float rebase = 1;
      if (!(__uint_as_float(top) <= base[i] * kRoom)) {
        const int exponent = min(max(static_cast<int>(top >> 23), 1), 253);
        const float larger = __int_as_float(exponent << 23);
        rebase = __fdividef(base[i], larger);
        base[i] = larger;
      }
      const float inverse = __int_as_float((254 << 23) - __float_as_int(base[i]));
      const float next = __shfl_down_sync(0xffffffffu, scale[i], 1);
      block.of_keys[tile + i][key] = scale[i];
      if (key % 2 == 0) {
        asm volatile(
            "{\n.reg .b32 x;\ncvt.rn.f16x2.f32 x, %1, %2;\nst.shared.b32 [%0], x;\n}" ::"r"(
                cast_smem_ptr_to_uint(&block.pairs[tile + i][pair_slot(key)])),
            "f"(next * inverse), "f"(scale[i] * inverse)
            : "memory");
      }
      if (key == 0) block.base[tile + i] = base[i], block.rebase[tile + i] = rebase;
    }
  }
};

// A thread has the copy engine bring all blocks, in the order of their use.
template <KeyFormat kFormat>
__device__ __forceinline__ void load(const KernelParams& p, const Fp8TensorMaps& maps,
                                     Fp8Memory<kFormat>& smem) {
  constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_FIRST);
  const Work& work = smem.work;
  const bool first_thread = threadIdx.x % kGatherThreads == 0;
  if (!smem.kBlocks && !first_thread) return;
  ThreadScales scales;
  Ring<Fp8Memory<kFormat>::kSlots> slot;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    if constexpr (smem.kBlocks) scales.begin_item();
    int next = load_page<1>(p, work, seq, item.first);
#pragma unroll 1
    for (int number = item.first; number < item.last; ++number, slot.advance()) {
      auto& block = smem.blocks[slot.slot];
      const int page = check_page(p, work, next);
      const int row = (number & ((1 << p.page_shift) - 1)) * kBlock;
      next = load_page<1>(p, work, seq, number + 1);
      if constexpr (smem.kBlocks) {
        const int key = GatherThread().looked_up();
        const int left = item.length - number * kBlock - key;
        const bool seen = page >= 0 && left > 0 && left <= p.most_hidden + p.window;
        scales.load(p, work, seen ? page * p.page_tokens + row + key : -1);
      }
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
        scales.write(block.scales);
        reinterpret_cast<EmptyBarrier&>(full).arrive();
      }
    }
  }
}

// The same row by row, by all four warps.
template <KeyFormat kFormat>
__device__ __forceinline__ void gather(const KernelParams& p, Fp8Memory<kFormat>& smem) {
  const Work& work = smem.work;
  ThreadScales scales;
  Ring<Fp8Memory<kFormat>::kSlots> slot;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    if constexpr (smem.kBlocks) scales.begin_item();
    int next = load_row_page(p, work, item, item.first);
#pragma unroll 1
    for (int number = item.first; number < item.last; ++number, slot.advance()) {
      auto& block = smem.blocks[slot.slot];
      find_rows(p, work, number, next, smem.rows);
      next = load_row_page(p, work, item, number + 1);
      if constexpr (smem.kBlocks) {
        const GatherThread thread;
        scales.load(p, work, rows_of(smem.rows, thread)[thread.lane % 16 / 4]);
      }
      FullBarrier& full = smem.full[slot.slot];
      smem.empty[slot.slot].wait(slot.parity ^ 1);
      gather_tiles(p, work, smem.rows, block.latent[0], kFp8Tiles, 0);
      constexpr int kRope = kLatentDim + (smem.kBlocks ? kScaleBytes : 0);
      gather_tiles<1, smem.kRopeBytes / kBlock / 16>(p, work, smem.rows, block.rope, 1, kRope);
      arrive_after_copies(full);
      if constexpr (smem.kBlocks) {
        scales.write(block.scales);
        reinterpret_cast<EmptyBarrier&>(full).arrive();
      }
    }
  }
}

}  // namespace jax_flashmla
