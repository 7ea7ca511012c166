// The split kernel. Schedule, barriers and budgets are drawn in cuda/README.md.
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>

#include <cfloat>

#include "cuda/decode_shared.cuh"
#include "cuda/tensor_map.h"

namespace jax_flashmla {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <typename Element>
using ScoresMma =
    decltype(make_tiled_mma(GMMA::ss_op_selector<Element, Element, float, Shape<_64, _64, _16>,
                                                 GMMA::Major::K, GMMA::Major::K>()));
// O += P V with P from registers (own block) or from shared memory (the other's).
template <typename Element>
using OwnMma =
    decltype(make_tiled_mma(GMMA::rs_op_selector<Element, Element, float, Shape<_64, _256, _16>,
                                                 GMMA::Major::K, GMMA::Major::MN>()));
template <typename Element>
using OtherMma =
    decltype(make_tiled_mma(GMMA::ss_op_selector<Element, Element, float, Shape<_64, _256, _16>,
                                                 GMMA::Major::K, GMMA::Major::MN>()));

// ---------------------------------------------------------------------------------------- loader

// One warp: walks the same blocks as the consumers, pair by pair, in the order of release. A lane
// issues the copy of one tile.
template <typename Element>
__device__ void run_loader(const DecodeParams& p, const CUtensorMap* map,
                           SharedMemory<Element>& smem, const Work& work, int lane) {
  Phases phases;
  const auto load = [&](int page, int stage, int half, int first_tile, int count) {
    smem.empty[stage][half].wait(phases.parity(stage) ^ 1);
    const int tile = first_tile + lane;
    if (lane < count) {
      FullBarrier& barrier = smem.full[stage][tile];
      barrier.arrive_and_expect_tx(kTileBytes);
      SM90_TMA_LOAD_5D::copy(map, reinterpret_cast<uint64_t*>(&barrier),
                             static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_FIRST),
                             smem.k[stage][tile], tile * 64, 0, work.head, page, work.group);
    }
    __syncwarp();
  };
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item(p, work, seq);
    const int32_t* table =
        p.block_table + (static_cast<int64_t>(work.group) * p.batch + seq) * p.max_blocks;
#pragma unroll 1
    for (int block = item.first; block < item.last; block += 2) {
      const bool pair = block + 1 < item.last;
      const int left_page = table[block];
      const int right_page = pair ? table[block + 1] : 0;
      load(left_page, 0, kLeft, 0, kHalfTiles);
      load(left_page, 0, kRight, kHalfTiles, kHalfTiles + 1);
      ++phases.uses[0];
      if (pair) {
        load(right_page, 1, kRight, kHalfTiles, kHalfTiles);
        load(right_page, 1, kLeft, kRopeTile, 1);
        load(right_page, 1, kLeft, 0, kHalfTiles);
        ++phases.uses[1];
      }
    }
  }
}

// Where row `row` of all the tile's query rows lies in [.., s_q, h_q, ..].
__device__ __forceinline__ int64_t query_index(const DecodeParams& p, const Work& work, int seq,
                                               int row) {
  const int64_t group_seq = static_cast<int64_t>(work.group) * p.batch + seq;
  const int64_t first = group_seq * p.s_q * p.h_q;
  if (p.h_kv == 1) return first + row;  // spares a division
  const int token = row / p.heads_per_kv();
  const int head = work.head * p.heads_per_kv() + row % p.heads_per_kv();
  return first + int64_t{token} * p.h_q + head;
}

__device__ __forceinline__ void copy_16_bytes(uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source));
}

// All threads, once: zeroes the rows of q that do not exist; no sequence writes them.
template <typename Element>
__device__ __forceinline__ void clear_missing_rows(const DecodeParams& p,
                                                   SharedMemory<Element>& smem, const Work& work) {
  const int rows = min(p.num_rows() - work.tile * kRowTile, kRowTile);
#pragma unroll 1
  for (int tile = 0; tile < kTiles; ++tile) {
    uint4* vectors = reinterpret_cast<uint4*>(smem.q[tile]);
#pragma unroll 1
    for (int i = rows * 8 + threadIdx.x; i < kRowTile * 8; i += kThreads) {
      vectors[i] = make_uint4(0, 0, 0, 0);
    }
  }
  cutlass::arch::fence_view_async_shared();
}

// Three warps: copy the row tile's queries of each sequence into the tiles that wgmma reads.
template <typename Element>
__device__ void run_query_loader(const DecodeParams& p, SharedMemory<Element>& smem,
                                 const Work& work, int thread) {
  constexpr int kWarps = kQueryLoaders / 32;
  const int lane = thread % 32;
  const int rows = min(p.num_rows() - work.tile * kRowTile, kRowTile);
  const uint32_t q = cast_smem_ptr_to_uint(&smem.q[0][0]);
  // A row is 72 vectors of 16 bytes, 8 in each tile, swizzled. A warp takes a row, a thread its
  // vectors lane, lane + 32 and, for the rotary tile, lane + 64.
  const auto target = [&](int row, int tile) {
    return q + tile * kTileBytes + row * 128 + ((lane % 8 ^ row % 8) * 16);
  };
  uint32_t parity = 1;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    smem.q_empty.wait(parity);
    parity ^= 1;
    const int first_row = work.tile * kRowTile + thread / 32;
    const char* nope = static_cast<const char*>(p.q_nope) + lane * 16;
    const char* rope = static_cast<const char*>(p.q_rope) + lane * 16;
    const int64_t nope_bytes = p.q_nope_stride * 2;
    const int64_t rope_bytes = p.q_rope_stride * 2;
    int64_t index = query_index(p, work, seq, first_row);
#pragma unroll 1
    for (int row = thread / 32; row < rows; row += kWarps) {
      const char* source = nope + index * nope_bytes;
      copy_16_bytes(target(row, lane / 8), source);
      copy_16_bytes(target(row, lane / 8 + 4), source + 512);
      if (lane < 8) copy_16_bytes(target(row, kRopeTile), rope + index * rope_bytes);
      index = p.h_kv == 1 ? index + kWarps
                          : query_index(p, work, seq, work.tile * kRowTile + row + kWarps);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    cutlass::arch::fence_view_async_shared();
    smem.q_full.arrive();
  }
}

// ------------------------------------------------------------------------------------- consumers

// A consumer thread's view: two rows of the tile, eight apart.
struct Rows {
  int first;
  int column;  // of its first pair in every eight columns
  __device__ explicit Rows(int thread)
      : first(thread / 32 * 16 + thread % 32 / 4), column(thread % 4 * 2) {}
  __device__ int row(int i) const { return first + 8 * i; }
};

// Zeroes the values of keys past the end, which may be NaN: 0 * NaN would reach the output.
template <typename Element>
__device__ __forceinline__ void clear_past_end(SharedMemory<Element>& smem, int stage, int valid,
                                               int thread) {
  constexpr int kVectors = kTiles * 8;  // of 16 bytes in a row
#pragma unroll 1
  for (int i = thread; i < (kBlock - valid) * kVectors; i += kWarpgroup) {
    const int row = valid + i / kVectors;
    const int vector = i % kVectors;
    // Swizzling permutes vectors inside a row of a tile: all of them are cleared.
    uint4* tile = reinterpret_cast<uint4*>(smem.k[stage][vector / 8]);
    tile[row * 8 + vector % 8] = make_uint4(0, 0, 0, 0);
  }
  cutlass::arch::fence_view_async_shared();
}

// Zero, in a way that the compiler cannot move out of a loop: descriptors built from an address
// that it can hoist are all kept in registers, and something else is spilled.
__device__ __forceinline__ int opaque_zero() {
  int zero;
  asm volatile("mov.u32 %0, 0;" : "=r"(zero));
  return zero;
}

// Issues S = Q K^T for the block in buffer `kStage`, tile by tile as they land.
template <int kStage, typename Element, typename Scores>
__device__ __forceinline__ void issue_scores(SharedMemory<Element>& smem, uint32_t parity,
                                             int thread, Scores& scores) {
  ScoresMma<Element> mma;
  const auto slice = mma.get_slice(thread);
  const int zero = opaque_zero();
  Tensor q = make_tensor(make_smem_ptr(&smem.q[0][zero]), BlockLayout<Element>{});
  Tensor k = make_tensor(make_smem_ptr(&smem.k[kStage][0][zero]), BlockLayout<Element>{});
  Tensor a = slice.partition_fragment_A(q);
  Tensor b = slice.partition_fragment_B(k);
  warpgroup_fence_operand(scores);
  mma.accumulate_ = GMMA::ScaleOut::Zero;
  // The order in which the loader fills the buffer.
  constexpr int kOrder[2][kTiles] = {{0, 1, 2, 3, 4, 5, 6, 7, 8}, {4, 5, 6, 7, 8, 0, 1, 2, 3}};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int tile = kOrder[kStage][i];
    smem.full[kStage][tile].wait(parity);
    warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      cute::gemm(mma, a(_, _, tile * 4 + step), b(_, _, tile * 4 + step), scores);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
  }
  warpgroup_commit_batch();
}

// Scales the scores to base 2 and masks those past what each row may see.
template <typename Scores>
__device__ __forceinline__ void scale_and_mask(const DecodeParams& p, const Work& work,
                                               const Item& item, int block, const Rows& rows,
                                               Scores& scores) {
  const float scale = p.softmax_scale * kLog2E;
#pragma unroll
  for (int i = 0; i < size(scores); ++i) scores(i) *= scale;
  const int first_hidden = item.length - (p.causal ? p.s_q - 1 : 0);
  if ((block + 1) * kBlock <= first_hidden) return;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int token = (work.tile * kRowTile + rows.row(row)) / p.heads_per_kv();
    const int visible = (p.causal ? item.length - p.s_q + 1 + token : item.length) - block * kBlock;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int key = i / 2 * 8 + rows.column + i % 2;
      if (key >= min(visible, item.length - block * kBlock)) {
        scores(i / 2 * 4 + row * 2 + i % 2) = -INFINITY;
      }
    }
  }
}

// The larger of `start` and the row's scores, over the four threads that share a row.
template <typename Scores>
__device__ __forceinline__ float row_max(const Scores& scores, int row, float start) {
  float top = start;
#pragma unroll
  for (int i = 0; i < 16; ++i) top = fmaxf(top, scores(i / 2 * 4 + row * 2 + i % 2));
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
  return fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
}

// Scores become weights exp2(score - max); returns this thread's part of the row's sum.
template <typename Scores>
__device__ __forceinline__ float exponentiate(Scores& scores, int row, float max) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float& x = scores(i / 2 * 4 + row * 2 + i % 2);
    x = exp2f(x - max);
    sum += x;
  }
  return sum;
}

// Multiplies the rows of an accumulator by `factor`, unless nothing would change.
template <typename Accumulator>
__device__ __forceinline__ void rescale(Accumulator& acc, const float (&factor)[2]) {
  if (__all_sync(0xffffffffu, factor[0] == 1.0f && factor[1] == 1.0f)) return;
#pragma unroll
  for (int i = 0; i < size(acc); ++i) acc(i) *= factor[i / 2 % 2];
}

// The weights as the A operand of the second product: an accumulator's registers, packed in pairs,
// are the operand's, four steps of 16 keys.
template <typename Element, typename Weights>
__device__ __forceinline__ auto pack_weights(const Weights& weights) {
  Tensor packed = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, _4>>{});
#pragma unroll
  for (int i = 0; i < size(packed); ++i) packed(i) = Element(weights(i));
  return packed;
}

// Writes the weights of a block over its rotary tile, for the other warpgroup.
template <typename Element, typename Weights>
__device__ __forceinline__ void store_weights(SharedMemory<Element>& smem, int stage,
                                              const Rows& rows, const Weights& weights) {
  Tensor pairs = recast<uint32_t>(weights);
  // Row r, 16-byte vector v of the tile is at 128 r + 16 (v ^ r % 8): the swizzle of TileLayout.
  char* tile = reinterpret_cast<char*>(smem.k[stage][kRopeTile]);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int row = rows.row(i % 2);
    const int vector = i / 2 ^ rows.first % 8;
    *reinterpret_cast<uint32_t*>(tile + row * 128 + vector * 16 + rows.column * 2) = pairs(i);
  }
  cutlass::arch::fence_view_async_shared();
}

// Issues O += P V: the warpgroup's half of the values, P from its registers.
template <typename Element, typename Weights, typename Accumulator>
__device__ __forceinline__ void issue_own_values(SharedMemory<Element>& smem, int stage, int half,
                                                 int thread, const Weights& weights,
                                                 Accumulator& out) {
  OwnMma<Element> mma;
  const auto slice = mma.get_slice(thread);
  const int zero = opaque_zero();
  Tensor v =
      make_tensor(make_smem_ptr(&smem.k[stage][half * kHalfTiles][zero]), ValueLayout<Element>{});
  Tensor b = slice.partition_fragment_B(v);
  warpgroup_fence_operand(out);
  warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < 4; ++step) cute::gemm(mma, weights(_, _, step), b(_, _, step), out);
  warpgroup_commit_batch();
}

// The same with the other warpgroup's P, from shared memory.
template <typename Element, typename Accumulator>
__device__ __forceinline__ void issue_other_values(SharedMemory<Element>& smem, int stage, int half,
                                                   int thread, Accumulator& out) {
  OtherMma<Element> mma;
  const auto slice = mma.get_slice(thread);
  const int zero = opaque_zero();
  Tensor p = make_tensor(make_smem_ptr(&smem.k[stage][kRopeTile][zero]), TileLayout<Element>{});
  Tensor v =
      make_tensor(make_smem_ptr(&smem.k[stage][half * kHalfTiles][zero]), ValueLayout<Element>{});
  Tensor a = slice.partition_fragment_A(p);
  Tensor b = slice.partition_fragment_B(v);
  warpgroup_fence_operand(out);
  warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < 4; ++step) cute::gemm(mma, a(_, _, step), b(_, _, step), out);
  warpgroup_commit_batch();
}

// The tiles that a warpgroup multiplies without having computed their scores.
template <typename Element>
__device__ __forceinline__ void wait_values(SharedMemory<Element>& smem, int stage, int half,
                                            uint32_t parity) {
#pragma unroll
  for (int tile = 0; tile < kHalfTiles; ++tile) {
    smem.full[stage][half * kHalfTiles + tile].wait(parity);
  }
}

// A warp has read its half of a buffer for the last time.
template <typename Element>
__device__ void release(SharedMemory<Element>& smem, int stage, int half, int thread) {
  if (thread % 32 == 0) smem.empty[stage][half].arrive();
}

// Four values, of which each thread of a quad holds one, for its partners one each: afterwards the
// thread with number t in the quad holds value t of all four, in the order of the threads.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4], int t) {
  // Exchange with the neighbour, then with the other pair; each step swaps what is on the wrong
  // side.
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = t & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const uint32_t given = upper ? x[i] : x[i + distance];
      const uint32_t taken = __shfl_xor_sync(0xffffffffu, given, distance);
      (upper ? x[i] : x[i + distance]) = taken;
    }
  }
}

// Divides by the sums and writes a warpgroup's half of the columns to `out`, or to the partial
// result, and the log-sum-exp.
template <typename Element, typename Accumulator>
__device__ __forceinline__ void write_result(const DecodeParams& p, SharedMemory<Element>& smem,
                                             const Work& work, const Item& item, int half,
                                             const Rows& rows, const float (&max)[2],
                                             const Accumulator& out) {
  const int t = rows.column / 2;  // in the quad of threads that share a row
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = work.tile * kRowTile + rows.row(i);
    const bool exists = row < p.num_rows();
    const auto& sums = smem.row_sums[item.seq & 1];
    const float sum = sums[kLeft][rows.row(i)] + sums[kRight][rows.row(i)];
    const bool empty = sum == 0;
    const float inverse = empty ? 0.0f : 1.0f / sum;
    const float lse = empty ? -INFINITY : max[i] + log2f(sum);
    const bool writes_lse = exists && half == 0 && t == 0;
    const int first_column = half * kHalfTiles * 64;
    if (item.slot < 0) {
      const int64_t index = query_index(p, work, item.seq, exists ? row : 0);
      Element* target = static_cast<Element*>(p.out) + index * kLatentDim + first_column;
      // A thread holds columns 2t and 2t + 1 of every eight: of 32, gather eight in a row.
#pragma unroll
      for (int j = 0; j < 32; j += 4) {
        uint32_t x[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          Element pair[2] = {Element(out((j + n) * 4 + i * 2) * inverse),
                             Element(out((j + n) * 4 + i * 2 + 1) * inverse)};
          x[n] = *reinterpret_cast<uint32_t*>(pair);
        }
        transpose_quad(x, t);
        if (exists) {
          *reinterpret_cast<uint4*>(target + (j + t) * 8) = make_uint4(x[0], x[1], x[2], x[3]);
        }
      }
      if (writes_lse) {
        const int64_t group_seq = static_cast<int64_t>(work.group) * p.batch + item.seq;
        const int head = work.head * p.heads_per_kv() + row % p.heads_per_kv();
        const int token = row / p.heads_per_kv();
        p.lse[(group_seq * p.h_q + head) * p.s_q + token] = lse * kLn2;
      }
    } else {
      const int64_t slot = static_cast<int64_t>(work.group) * p.slots + item.slot;
      const int64_t index = (slot * p.h_kv + work.head) * p.num_rows() + row;
      float* target = p.partial_out + index * kLatentDim + first_column;
      // Of 16 columns, gather four in a row: even threads those of the first eight.
#pragma unroll
      for (int j = 0; j < 32; j += 2) {
        float2 mine[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          mine[n] = make_float2(out((j + n) * 4 + i * 2) * inverse,
                                out((j + n) * 4 + i * 2 + 1) * inverse);
        }
        const bool odd = t & 1;
        const float2 given = odd ? mine[0] : mine[1];
        const float2 taken = make_float2(__shfl_xor_sync(0xffffffffu, given.x, 1),
                                         __shfl_xor_sync(0xffffffffu, given.y, 1));
        const float4 four = odd ? make_float4(taken.x, taken.y, mine[1].x, mine[1].y)
                                : make_float4(mine[0].x, mine[0].y, taken.x, taken.y);
        if (exists) *reinterpret_cast<float4*>(target + (j + odd) * 8 + t / 2 * 4) = four;
      }
      if (writes_lse) p.partial_lse[index] = lse;
    }
  }
}

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
