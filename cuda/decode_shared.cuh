// What the split kernels share, work items and rings, and what the roles of the wide one share:
// the shared memory plan, the barriers.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/tensor.hpp>

#include "cuda/kernel_params.cuh"
#include "cuda/plan.h"
#include "cuda/tensor_map.h"

namespace jax_flashmla {

using namespace cute;

inline constexpr int kBlock = kBlockTokens;          // keys of a block: the plan's unit
inline constexpr int kTiles = kHeadDim / 64;         // 64 x 64 tiles of a block
inline constexpr int kValueTiles = kLatentDim / 64;  // of them also values
inline constexpr int kHalfTiles = kValueTiles / 2;   // of a half of the latent columns
inline constexpr int kRopeTile = kTiles - 1;
inline constexpr int kMaxParts = kBlock / kLeastCopiedPage;  // pages of a block
inline constexpr int kTileElements = 64 * 64;
inline constexpr int kTileBytes = kTileElements * 2;

// The warpgroups of a CTA: one computes scores and weights, two multiply the weights with the left
// and the right half of the values, one loads.
enum Role { kLeft = 0, kRight = 1, kScores = 2, kLoader = 3 };
inline constexpr int kWarpgroup = 128;
inline constexpr int kWarps = kWarpgroup / 32;
inline constexpr int kThreads = 4 * kWarpgroup;

// Shared memory holds halves of blocks, in a ring, and their rotary tiles, in another. An item's
// first entry in the ring of halves is the left half of its queries, which goes on into registers.
inline constexpr int kHalfSlots = 5;
inline constexpr int kRopeSlots = 3;
// A half of the values is multiplied in two parts, each released as soon as it is done with.
inline constexpr int kParts = 2;
inline constexpr int kPartTiles = kHalfTiles / kParts;
static_assert(kPartTiles == kKeyBoxTiles, "a box has all tiles of a part");

// One 64 x 64 tile, rows of 128 bytes, swizzled: what TMA writes and wgmma reads.
template <typename Element>
using TileLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, Shape<_64, _64>{}));
// As many tiles of queries as a part has, one behind the other.
template <typename Element>
using QueriesLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                             Shape<_64, Int<kPartTiles * 64>>{}));
// A part of a half of a block: eight keys of each of its tiles, then the next eight. Thus one copy
// brings all columns of a page of any size.
template <typename Element>
using PartLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                          Shape<_64, Int<kPartTiles * 64>>{}, Step<_2, _1>{}));
// The same, seen as B of the second product: (value column, key).
template <typename Element>
using ValueLayout = decltype(composition(
    PartLayout<Element>{}, make_layout(Shape<Int<kPartTiles * 64>, _64>{}, Stride<_64, _1>{})));

// The address of a 16-byte vector of a swizzled tile of 128-byte rows.
template <typename Element>
__device__ __forceinline__ uint128_t& vector_at(Element* tile, int row, int vector) {
  return reinterpret_cast<uint128_t*>(tile)[row * 8 + (vector ^ row % 8)];
}

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

// What one CTA does: a row tile of a KV head, over one partition of the plan.
struct Work {
  int group;
  int head;  // KV head
  int tile;
  int part;  // of the plan
  // Where the group begins, among all groups' sequences, entries of the block table, slots.
  int64_t first_seq;
  int64_t first_entry;
  int64_t first_slot;
  int begin_seq, begin_block, end_seq, end_block, begin_split;
};

// Of what is never negative, as part of an index: a sign would take one more register.
__device__ __forceinline__ int64_t wide(int count) { return static_cast<uint32_t>(count); }

// Which of its warpgroup's threads this is. Asked for anew at every use: registers are scarce.
struct ThreadNow {
  int warp;
  int lane;
  __device__ __forceinline__ ThreadNow() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread)::"memory");
    warp = thread / 32 % kWarps;
    lane = thread % 32;
  }
};

// Where a CTA's keys come from: by the copy engine from pages that hold blocks, or row by row.
enum class Source { kPages, kRows };

// Where the rows of a block are, for the warps that copy keys row by row (decode_gather.cuh).
inline constexpr int kGatherWarps = 4;
inline constexpr int kGatherThreads = kGatherWarps * 32;
static_assert(kGatherThreads == 128, "sixteen rows at once");
// In shared memory, since registers are scarce: [warp][place among the warp's four rows][row].
using GatherRows = int4[kGatherWarps][4];

template <typename Element>
struct SharedMemory {
  alignas(1024) Element q[kTiles - kHalfTiles][kTileElements];  // right half and rotary tile
  alignas(1024) Element halves[kHalfSlots][kHalfTiles][kTileElements];
  // Once a block's scores are computed, its rotary tile holds their weights P.
  alignas(1024) Element rope[kRopeSlots][kTileElements];
  float factor[kRopeSlots][kRowTile];   // by which the block's new maximum rescales the output
  float inverse[kRopeSlots][kRowTile];  // of the sums, with an item's last block
  GatherRows rows;
  Work work;
  FullBarrier half_full[kHalfSlots][kParts];  // a part has landed
  FullBarrier rope_full[kRopeSlots];
  FullBarrier q_full;
  EmptyBarrier half_empty[kHalfSlots][kParts];  // their only reader is done with them
  EmptyBarrier rope_empty[kRopeSlots];          // both value warpgroups are done with P
  struct {
    EmptyBarrier first;  // P, factor and inverse are written, the left half's first part may begin
    EmptyBarrier rest;   // and so may the other parts
  } weights[kRopeSlots];
  EmptyBarrier factors_read[kRopeSlots];  // factor and inverse may be overwritten
  EmptyBarrier q_empty;                   // all scores with q are computed
  EmptyBarrier work_known;                // `work` is there
};
static_assert(sizeof(SharedMemory<cutlass::bfloat16_t>) <= 232448, "an SM has 227 KiB");

// A position in a ring of `kSlots`. `parity` is that of the slot's full barriers; its empty barrier
// is waited for with the other one.
template <int kSlots>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void advance(int count) {
    slot += count;
    parity ^= slot / kSlots & 1;
    slot %= kSlots;
  }
  __device__ __forceinline__ Ring before() const {
    return slot > 0 ? Ring{slot - 1, parity} : Ring{kSlots - 1, parity ^ 1};
  }
};

// A warp has read a slot for the last time, in each of the `kCtas` CTAs of the cluster that write
// into each other's slots. With keys row by row every lane says so: racecheck sees that threads
// write the slot, and takes no arrival of one lane for those of others.
template <Source kSource>
inline constexpr int kReleases = kSource == Source::kPages ? 1 : 32;
template <int kCtas, Source kSource = Source::kPages>
__device__ __forceinline__ void release(const EmptyBarrier& barrier, int lane) {
  if constexpr (kSource == Source::kRows) {
    barrier.arrive();
  } else if constexpr (kCtas == 1) {
    if (lane == 0) barrier.arrive();
  } else {
    if (lane < kCtas) barrier.arrive(static_cast<uint32_t>(lane));
  }
}

// Zero, which the compiler takes for different in every lane: it then keeps what comes of it out of
// the uniform datapath, where a chain of instructions takes twice the time.
__device__ __forceinline__ uint32_t zero_of_lane() {
  uint32_t lower_lanes;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(lower_lanes));
  return lower_lanes >> 31;
}

// A CTA's part of the grid, and where the plan says what that is.
struct Place {
  Work work;  // up to `first_slot`
  const int4* plan;
};

// To be called before `wait_for_kernel_before`: some hundred cycles that nobody then waits for.
// `zero`: perhaps `zero_of_lane`.
__device__ __forceinline__ Place find_place(const KernelParams& p, uint32_t zero = 0) {
  // Row tiles first: CTAs that run side by side read the same keys.
  Place place;
  Work& work = place.work;
  int tile_group, head_group;
  p.by_row_tiles(tile_group, work.tile, static_cast<int>(blockIdx.x));
  p.by_h_kv(head_group, work.head, tile_group);
  p.by_num_parts(work.group, work.part, head_group);
  const int64_t row = static_cast<int64_t>(work.group) * p.num_parts + work.part;
  place.plan = reinterpret_cast<const int4*>(p.tile_scheduler_metadata) +
               row * (kMetadataColumns / 4) + zero;
  work.first_seq = static_cast<int64_t>(work.group) * p.batch;
  work.first_entry = work.first_seq * p.max_blocks;
  work.first_slot = static_cast<int64_t>(work.group) * p.slots;
  return place;
}

// Begins to load what the plan says. That has not arrived when this returns: it is for
// `check_plan`.
__device__ __forceinline__ Work read_plan(const Place& place) {
  Work work = place.work;
  const int4 range = place.plan[0];
  work.begin_seq = range.x, work.begin_block = range.y;
  work.end_seq = range.z, work.end_block = range.w;
  work.begin_split = place.plan[1].x;
  return work;
}

// Any metadata keeps the kernel inside its buffers.
__device__ __forceinline__ Work check_plan(const KernelParams& p, Work work) {
  work.begin_seq = min(max(work.begin_seq, 0), p.batch);
  work.begin_block = max(work.begin_block, 0);
  work.end_seq = min(max(work.end_seq, 0), p.batch);
  work.end_block = work.end_seq < p.batch ? max(work.end_block, 0) : 0;
  work.begin_split = max(work.begin_split, 0);
  return work;
}

// One sequence of the partition: its blocks [first, last) and where the result goes.
struct Item {
  int seq;
  int length;
  int first;
  int last;
  int slot;                          // of the partial result, or one of these:
  static constexpr int kWhole = -1;  // the result goes to its place
  static constexpr int kEmpty = -2;  // no key at all: written elsewhere (decode_empty.cuh)

  __device__ int blocks() const { return last - first; }
};

__device__ __forceinline__ bool has_item(const Work& work, int seq) {
  return seq < work.end_seq || (seq == work.end_seq && work.end_block > 0);
}

// Keys at the end that a query token may not see.
__device__ __forceinline__ int hidden_keys(const KernelParams& p, int token) {
  return max(p.most_hidden - token, 0);
}

__device__ __forceinline__ int find_length(const KernelParams& p, const Work& work, int seq) {
  return min(max(p.cache_seqlens[work.first_seq + wide(seq)], 0), p.max_tokens);
}

// Where the plan says which slots a sequence's splits have, up to those of the next one.
__device__ __forceinline__ const int32_t* find_splits(const KernelParams& p, const Work& work,
                                                      int seq) {
  return p.num_splits + work.first_seq + wide(work.group + seq);
}

// Whether no partition attends to a sequence. A plan of before, with no split of what is no longer
// empty, is as good as any.
__device__ __forceinline__ bool is_empty(int splits, int length) {
  return splits < 1 && length == 0;
}

// `kWindowed`: there may be a sliding window.
template <bool kWindowed>
__device__ __forceinline__ Item find_item(const KernelParams& p, const Work& work, int seq) {
  Item item;
  item.seq = seq;
  item.length = find_length(p, work, seq);
  // The plan counts from the first block that any query sees.
  const int base = kWindowed ? max(item.length - p.most_hidden - p.window, 0) / kBlock : 0;
  const int blocks = (item.length + kBlock - 1) / kBlock - base;
  item.first = seq == work.begin_seq ? min(work.begin_block, blocks) : 0;
  item.last = seq == work.end_seq ? min(work.end_block, blocks) : blocks;
  item.last = max(item.first, item.last) + base;
  item.first += base;
  const int32_t* splits = find_splits(p, work, seq);
  const int split = seq == work.begin_seq ? work.begin_split : 0;
  // Unsigned, which no two of them exceed.
  const uint32_t behind = static_cast<uint32_t>(max(splits[0], 0)) + split + 1;
  const int slot = static_cast<int>(min(behind, static_cast<uint32_t>(p.slots))) - 1;
  const int count = splits[1] - splits[0];
  const bool empty = is_empty(count, item.length);
  item.slot = count > 1 ? slot : empty ? Item::kEmpty : Item::kWhole;
  return item;
}

// Where row `row` of all the tile's query rows lies in [.., s_q, h_q, ..].
__device__ __forceinline__ int64_t query_index(const KernelParams& p, const Work& work, int seq,
                                               int row) {
  const int64_t first = (work.first_seq + wide(seq)) * wide(p.s_q * p.h_q);
  if (p.h_kv == 1) return first + wide(row);  // spares a division
  int token, head;
  p.by_heads_per_kv(token, head, row);
  return first + wide(token * p.h_q + work.head * p.heads_per_kv() + head);
}

// Which of all tiles of partial results a tile of the item's is.
__device__ __forceinline__ int64_t partial_tile(const KernelParams& p, const Work& work,
                                                const Item& item, int tile) {
  const int64_t slot_head = (work.first_slot + wide(item.slot)) * wide(p.h_kv) + wide(work.head);
  return slot_head * wide(p.partial_tiles()) + wide(tile);
}

// A thread's view of an accumulator: two rows of the tile, eight apart.
struct Rows {
  int first;
  int column;  // of its first pair in every eight columns
  __device__ explicit Rows(int thread)
      : first(thread / 32 * 16 + thread % 32 / 4), column(thread % 4 * 2) {}
  __device__ int row(int i) const { return first + 8 * i; }
};

}  // namespace jax_flashmla
