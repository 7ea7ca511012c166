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
  float scale[2];
  float base[2];  // of the block before; zero: there is none
  float lowest;   // below this it does not go, or the output so far might become infinite
  int row;        // among the rows of all groups' pages; -1: zeros

  __device__ __forceinline__ void begin_item() { base[0] = base[1] = lowest = 0; }

  // Does not wait for them.
  __device__ __forceinline__ void load(const KernelParams& p, const Work& work, int of_row) {
    row = of_row;
    scale[0] = scale[1] = 0;
    if (row < 0) return;
    const char* const from = bytes(p, work) + kLatentDim + GatherThread().lane / 16 * 8;
    const float2 two = *reinterpret_cast<const float2*>(from);
    scale[0] = two.x, scale[1] = two.y;
  }

  // Writes a block's scales. All of the loader's warps meet.
  __device__ __forceinline__ void write(const KernelParams& p, const Work& work,
                                        BlockScales& block) {
    const GatherThread thread;
    const int tile = thread.lane / 16 * 2;
    share_range(block);
    bool wide = false;
#pragma unroll
    for (int i = 0; i < kFp8Tiles; ++i) wide = wide || block.most(i) > block.least(i) + kWide;
    if (wide) {
      // A row of zeros may have any scale, and is not to push those of others out of range.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool high = __float_as_uint(fabsf(scale[i])) > block.least(tile + i) + kWide;
        if (high && is_zero(bytes(p, work) + (tile + i) * 128)) scale[i] = 0;
      }
      sync_loader();
      share_range(block);
    }
    const int key = thread.looked_up();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      constexpr float kRoom = 32;  // times 448 is a 16-bit float
      const uint32_t most = block.most(tile + i);
      const float top = __uint_as_float(most);
      float rebase = 1;
      if (!(top <= base[i] * kRoom) || (top > 0 && top * kRoom < base[i])) {
        const int exponent = min(max(static_cast<int>(most >> 23), 1), 253);
        const float now = fmaxf(__int_as_float(exponent << 23), lowest);
        lowest = fmaxf(lowest, now * 0x1p-64f);
        rebase = __fdividef(base[i], now);
        base[i] = now;
      }
      const float inverse = __int_as_float((254 << 23) - __float_as_int(base[i]));
      const float next = __shfl_down_sync(0xffffffffu, scale[i], 1);
      block.of_keys[tile + i][key] = scale[i];
      if (key % 2 == 0) {
        uint32_t pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;"
            : "=r"(pair)
            : "f"(next * inverse), "f"(scale[i] * inverse));
        block.pairs[tile + i][pair_slot(key)] = pair;
      }
      if (key == 0) block.base[tile + i] = base[i], block.rebase[tile + i] = rebase;
    }
  }

 private:
  // As the bits of positive numbers: a ratio of 2^8.
  static constexpr uint32_t kWide = 8 << 23;

  __device__ __forceinline__ const char* bytes(const KernelParams& p, const Work& work) const {
    return static_cast<const char*>(p.k_cache) + work.head * p.head_bytes +
           static_cast<int64_t>(row) * p.row_bytes;
  }

  static __device__ __forceinline__ bool is_zero(const char* values) {
    uint32_t any = 0;
#pragma unroll 1
    for (int i = 0; i < 128; i += 16) {
      const uint4 four = *reinterpret_cast<const uint4*>(values + i);
      any |= four.x | four.y | four.z | four.w;
    }
    return (any & 0x7f7f7f7fu) == 0;
  }

  // The largest and the smallest scale of every tile, but for zeros.
  __device__ __forceinline__ void share_range(BlockScales& block) const {
    const GatherThread thread;
#pragma unroll
    for (int i = 0; i < kFp8Tiles; ++i) {
      const uint32_t bits = __float_as_uint(fabsf(scale[i % 2]));
      const bool mine = thread.lane / 16 == i / 2;
      const uint32_t most = __reduce_max_sync(0xffffffffu, mine ? bits : 0);
      const uint32_t least = __reduce_min_sync(0xffffffffu, mine && bits != 0 ? bits : kNone);
      if (thread.lane == 0) {
        block.most_of_warp[i][thread.warp] = most;
        block.least_of_warp[i][thread.warp] = least;
      }
    }
    sync_loader();
  }
  static constexpr uint32_t kNone = 0x7fffffff;
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
        scales.write(p, work, block.scales);
        full.arrive();
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
        scales.write(p, work, block.scales);
        full.arrive();
      }
    }
  }
}

}  // namespace jax_flashmla
