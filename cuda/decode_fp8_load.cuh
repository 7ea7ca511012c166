// The loader of the split kernel for FP8 caches: keys by the copy engine or row by row, and the
// scales of fp8_block.
#pragma once

#include "cuda/decode_copies.cuh"
#include "cuda/decode_fp8_shared.cuh"

namespace jax_flashmla {

// A named barrier for the loader's four warps.
__device__ __forceinline__ void sync_loader() {
  cutlass::arch::NamedBarrier::sync(kGatherThreads, 3);
}

// Prepares the scales of an item's blocks, one after the other: a warp those of two tiles. A lane
// has two neighbouring keys' scales, and what is known of the tile `lane % 2` of both.
struct ScalePreparer {
  static constexpr int kTiles = 2;  // of a warp
  int first_tile;
  float base = 0;    // of the block before; zero: there is none
  float lowest = 0;  // below this it does not go, or the output so far might become infinite

  // Waits for a block, writes its scales and says so.
  template <typename Memory, int kSlots>
  __device__ __forceinline__ void prepare(const KernelParams& p, const Item& item, int number,
                                          Memory& smem, const Ring<kSlots>& slot) {
    smem.full[slot.slot].wait(slot.parity);
    __syncwarp();
    write(p, item.length - number * kBlock, smem, slot.slot);
    smem.scales_full[slot.slot].arrive();
  }

 private:
  // As the bits of positive numbers: a ratio of 2^8.
  static constexpr uint32_t kWide = 8 << 23;
  static constexpr uint32_t kNone = 0x7fffffff;

  // `left`: keys from the block's first on.
  template <typename Memory>
  __device__ __forceinline__ void write(const KernelParams& p, int left, Memory& smem, int slot) {
    auto& scales = smem.scales[slot];
    const int lane = GatherThread().lane;
    float scale[2][kTiles];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int from_key = left - lane * 2 - i;
      const bool seen = from_key > 0 && from_key <= p.most_hidden + p.window;
      const float* const raw = smem.raw_scales(slot, lane * 2 + i) + first_tile;
      const float2 two = *reinterpret_cast<const float2*>(raw);
      scale[i][0] = seen ? two.x : 0, scale[i][1] = seen ? two.y : 0;
    }
    uint32_t most_of_mine = 0;
    uint32_t high[kTiles];  // scales above this are far from the smallest
    bool wide[kTiles];      // whether there are such
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint32_t most = find_most(scale[0][tile], scale[1][tile]);
      high[tile] = find_least(scale[0][tile], scale[1][tile]) + kWide;
      wide[tile] = most > high[tile];
      if (lane % kTiles == tile) most_of_mine = most;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (__builtin_expect(wide[tile], 0)) {
        // A row of zeros may have any scale, and is not to push those of others out of range.
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint8_t* const line = smem.blocks[slot].line(first_tile + tile, lane * 2 + i);
          if (bits(scale[i][tile]) > high[tile] && is_zero(line)) scale[i][tile] = 0;
        }
        __syncwarp();
        const uint32_t most = find_most(scale[0][tile], scale[1][tile]);
        if (lane % kTiles == tile) most_of_mine = most;
      }
    }
    const float rebase = follow(most_of_mine);
    __syncwarp();
    const float inverse_of_mine = __int_as_float((254 << 23) - __float_as_int(base));
    if constexpr (smem.kWholeRows) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        reinterpret_cast<float2&>(scales.of_keys[lane * 2 + i][first_tile]) = {scale[i][0],
                                                                               scale[i][1]};
      }
    } else {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float inverse = __shfl_sync(0xffffffffu, inverse_of_mine, tile);
        const float first = scale[0][tile], second = scale[1][tile];
        float& at = scales.of_keys[first_tile + tile][scale_slot(lane * 2)];
        reinterpret_cast<float2&>(at) = {first, second};
        scales.pairs[first_tile + tile][pair_slot(lane * 2)] =
            as_half2(first * inverse, second * inverse);
      }
    }
    if (lane < kTiles) {
      scales.base[first_tile + lane] = base;
      scales.inverse[first_tile + lane] = inverse_of_mine;
      scales.rebase[first_tile + lane] = rebase;
    }
  }

  // Lets `base` follow the largest scale; returns what the output so far is to be multiplied with.
  __device__ __forceinline__ float follow(uint32_t most) {
    constexpr float kRoom = 32;  // times 448 is a 16-bit float
    const float top = __uint_as_float(most);
    if (top <= base * kRoom && (top == 0 || top * kRoom >= base)) return 1;
    const int exponent = min(max(static_cast<int>(most >> 23), 1), 253);
    const float now = fmaxf(__int_as_float(exponent << 23), lowest);
    lowest = fmaxf(lowest, now * 0x1p-64f);
    const float rebase = __fdividef(base, now);
    base = now;
    return rebase;
  }

  static __device__ __forceinline__ uint32_t bits(float scale) {
    return __float_as_uint(fabsf(scale));
  }

  // The largest and, but for zeros, the smallest of a warp's.
  static __device__ __forceinline__ uint32_t find_most(float x, float y) {
    return __reduce_max_sync(0xffffffffu, max(bits(x), bits(y)));
  }
  static __device__ __forceinline__ uint32_t find_least(float x, float y) {
    const uint32_t of_x = bits(x) != 0 ? bits(x) : kNone, of_y = bits(y) != 0 ? bits(y) : kNone;
    return __reduce_min_sync(0xffffffffu, min(of_x, of_y));
  }

  // Of 128 bytes.
  static __device__ __forceinline__ bool is_zero(const uint8_t* line) {
    uint32_t any = 0;
#pragma unroll 1
    for (int i = 0; i < 128; i += 16) {
      const uint4 four = *reinterpret_cast<const uint4*>(line + i);
      any |= four.x | four.y | four.z | four.w;
    }
    return (any & 0x7f7f7f7fu) == 0;
  }
};

// Has the copy engine bring a block; of `kWholeRows`, where they lie together, its first `keys`
// rows. Of a page that does not exist a tensor map gives zeros.
template <int kRows, KeyFormat kFormat>
__device__ __forceinline__ void copy_block(const KernelParams& p, const Fp8TensorMaps& maps,
                                           Fp8Memory<kRows, kFormat>& smem, int slot, int page,
                                           int row, int keys) {
  auto& block = smem.blocks[slot];
  FullBarrier& full = smem.full[slot];
  const int head = smem.work.head;
  if constexpr (smem.kWholeRows) {
    if (p.row_bytes == kFp8BlockBytes && page >= 0) {
      const int64_t first = static_cast<int64_t>(page) * p.page_tokens + row;
      const uint32_t bytes = keys * kFp8BlockBytes;
      full.arrive_and_expect_tx(bytes);
      copy_bytes(static_cast<const char*>(p.k_cache) + first * kFp8BlockBytes, full, block.rows,
                 bytes);
    } else {
      full.arrive_and_expect_tx(sizeof(block));
      load_box<1>(&maps.rows, full, block.rows, 0, head, page, row);
    }
  } else {
    constexpr uint32_t kBytes = sizeof(block.latent) + sizeof(block.rope);
    full.arrive_and_expect_tx(kBytes + (smem.kBlocks ? kBlock * kScaleBytes : 0));
    // Scales first: they are what is to be prepared before others can use the block.
    if constexpr (smem.kBlocks) {
      load_box<1>(&maps.scales, full, smem.scales[slot].raw, 0, head, page, row);
    }
    load_box<1>(&maps.latent, full, block.latent, 0, head, page, row);
    load_box<1>(&maps.rope, full, block.rope, 0, head, page, row);
  }
}

// A thread has the copy engine bring all blocks, in the order of their use.
template <int kRows, KeyFormat kFormat>
__device__ __forceinline__ void copy_blocks(const KernelParams& p, const Fp8TensorMaps& maps,
                                            Fp8Memory<kRows, kFormat>& smem) {
  const Work& work = smem.work;
  Ring<Fp8Memory<kRows, kFormat>::kSlots> slot;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    int next = load_page<1>(p, work, seq, item.first);
#pragma unroll 1
    for (int number = item.first; number < item.last; ++number, slot.advance()) {
      const int page = check_page(p, work.group, next);
      next = load_page<1>(p, work, seq, number + 1);
      smem.empty[slot.slot].wait(slot.parity ^ 1);
      copy_block(p, maps, smem, slot.slot, page, block_in_page(p, number) * kBlock,
                 count_keys(item, number));
    }
  }
}

// Two warps prepare the scales of the same blocks.
template <int kRows, KeyFormat kFormat>
__device__ __forceinline__ void prepare_scales(const KernelParams& p,
                                               Fp8Memory<kRows, kFormat>& smem, int warp) {
  const Work& work = smem.work;
  Ring<Fp8Memory<kRows, kFormat>::kSlots> slot;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    ScalePreparer preparer{warp * ScalePreparer::kTiles};
#pragma unroll 1
    for (int number = item.first; number < item.last; ++number, slot.advance()) {
      // The block would not be there otherwise, but here it is this warp that writes the slot.
      smem.empty[slot.slot].wait(slot.parity ^ 1);
      preparer.prepare(p, item, number, smem, slot);
    }
  }
}

// By the copy engine. Other warps than that of its thread prepare scales: copies are not to wait
// for that.
template <int kRows, KeyFormat kFormat>
__device__ __forceinline__ void load(const KernelParams& p, const Fp8TensorMaps& maps,
                                     Fp8Memory<kRows, kFormat>& smem) {
  const int thread = threadIdx.x % kGatherThreads;
  if (thread == 0) copy_blocks(p, maps, smem);
  if constexpr (smem.kBlocks) {
    if (thread / 32 == 1 || thread / 32 == 2) prepare_scales(p, smem, thread / 32 - 1);
  }
}

// Row by row, by all four warps. The first two prepare a block's scales when they have begun to
// copy the item's next one.
template <int kRows, KeyFormat kFormat>
__device__ __forceinline__ void gather(const KernelParams& p, Fp8Memory<kRows, kFormat>& smem) {
  constexpr int kLag = smem.kBlocks ? 1 : 0;
  const Work& work = smem.work;
  Ring<Fp8Memory<kRows, kFormat>::kSlots> slot;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    ScalePreparer preparer{GatherThread().warp * ScalePreparer::kTiles};
    int next = load_row_page(p, work, item, item.first);
#pragma unroll 1
    for (int number = item.first; number < item.last + kLag; ++number) {
      if (kLag == 0 || number < item.last) {
        auto& block = smem.blocks[slot.slot];
        find_rows(p, work, number, next, smem.rows);
        next = load_row_page(p, work, item, number + 1);
        smem.empty[slot.slot].wait(slot.parity ^ 1);
        gather_tiles(p, work, smem.rows, block.latent[0], kFp8Tiles, 0);
        constexpr int kRope = kLatentDim + (smem.kBlocks ? kScaleBytes : 0);
        gather_tiles<1, sizeof(block.rope) / kBlock / 16>(p, work, smem.rows, block.rope, 1, kRope);
        if constexpr (smem.kBlocks) {
          gather_tiles<1, 1>(p, work, smem.rows, smem.scales[slot.slot].raw, 1, kLatentDim);
        }
        arrive_after_copies(smem.full[slot.slot]);
      }
      if constexpr (smem.kBlocks) {
        if (number > item.first && GatherThread().warp < kScaleWarps) {
          preparer.prepare(p, item, number - 1, smem, slot.before());
        }
      }
      if (kLag == 0 || number < item.last) slot.advance();
    }
  }
}

}  // namespace jax_flashmla
