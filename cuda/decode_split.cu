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

// Issues the copies of `count` tiles of a page, after their owner has released them.
template <typename Element>
__device__ void load_tiles(const CUtensorMap* map, SharedMemory<Element>& smem, const Work& work,
                           int page, int stage, int first_tile, int count) {
  for (int tile = first_tile; tile < first_tile + count; ++tile) {
    FullBarrier& barrier = smem.full[stage][tile];
    barrier.arrive_and_expect_tx(kTileBytes);
    SM90_TMA_LOAD_5D::copy(map, reinterpret_cast<uint64_t*>(&barrier),
                           static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_FIRST),
                           smem.k[stage][tile], tile * 64, 0, work.head, page, work.group);
  }
}

// One thread: walks the same blocks as the consumers, pair by pair, in the order of release.
template <typename Element>
__device__ void run_loader(const DecodeParams& p, const CUtensorMap* map,
                           SharedMemory<Element>& smem, const Work& work) {
  Phases phases;
  const auto wait_empty = [&](int stage, int half) {
    smem.empty[stage][half].wait(phases.parity(stage) ^ 1);
  };
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item(p, work, seq);
    const int32_t* table =
        p.block_table + (static_cast<int64_t>(work.group) * p.batch + seq) * p.max_blocks;
    for (int block = item.first; block < item.last; block += 2) {
      const bool pair = block + 1 < item.last;
      const int left_page = table[block];
      const int right_page = pair ? table[block + 1] : 0;
      wait_empty(0, kLeft);
      load_tiles(map, smem, work, left_page, 0, 0, kHalfTiles);
      if (pair) {
        wait_empty(1, kRight);
        load_tiles(map, smem, work, right_page, 1, kHalfTiles, kHalfTiles);
      }
      wait_empty(0, kRight);
      load_tiles(map, smem, work, left_page, 0, kHalfTiles, kHalfTiles + 1);
      ++phases.uses[0];
      if (pair) {
        wait_empty(1, kLeft);
        load_tiles(map, smem, work, right_page, 1, kRopeTile, 1);
        load_tiles(map, smem, work, right_page, 1, 0, kHalfTiles);
        ++phases.uses[1];
      }
    }
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

// Where row `row` of all the tile's query rows lies in [.., s_q, h_q, ..].
__device__ __forceinline__ int64_t query_index(const DecodeParams& p, const Work& work, int seq,
                                               int row) {
  const int64_t group_seq = static_cast<int64_t>(work.group) * p.batch + seq;
  const int token = row / p.heads_per_kv();
  const int head = work.head * p.heads_per_kv() + row % p.heads_per_kv();
  return (group_seq * p.s_q + token) * p.h_q + head;
}

// Both consumers: copies the tile's query rows into shared memory, zeros where there are none.
template <typename Element>
__device__ void load_q(const DecodeParams& p, SharedMemory<Element>& smem, const Work& work,
                       int seq, int thread) {
  constexpr int kVector = 8;  // elements of 16 bytes
  constexpr int kVectors = kHeadDim / kVector;
  Tensor tile = make_tensor(make_smem_ptr(&smem.q[0][0]), BlockLayout<Element>{});
  for (int i = thread; i < kRowTile * kVectors; i += kConsumers) {
    const int row = i / kVectors;
    const int column = i % kVectors * kVector;
    const int query_row = work.tile * kRowTile + row;
    uint4 values = make_uint4(0, 0, 0, 0);
    if (query_row < p.num_rows()) {
      const int64_t index = query_index(p, work, seq, query_row);
      const Element* source =
          column < kLatentDim
              ? static_cast<const Element*>(p.q_nope) + index * p.q_nope_stride + column
              : static_cast<const Element*>(p.q_rope) + index * p.q_rope_stride + column -
                    kLatentDim;
      values = __ldg(reinterpret_cast<const uint4*>(source));
    }
    *reinterpret_cast<uint4*>(&tile(row, column)) = values;
  }
  cutlass::arch::fence_view_async_shared();
}

// Zeroes the values of keys past the end, which may be NaN: 0 * NaN would reach the output.
template <typename Element>
__device__ void clear_past_end(SharedMemory<Element>& smem, int stage, int valid, int thread,
                               Sync own_barrier) {
  constexpr int kVectors = kTiles * 8;  // of 16 bytes in a row
  for (int i = thread; i < (kBlock - valid) * kVectors; i += kWarpgroup) {
    const int row = valid + i / kVectors;
    const int vector = i % kVectors;
    // Swizzling permutes vectors inside a row of a tile: all of them are cleared.
    uint4* tile = reinterpret_cast<uint4*>(smem.k[stage][vector / 8]);
    tile[row * 8 + vector % 8] = make_uint4(0, 0, 0, 0);
  }
  cutlass::arch::fence_view_async_shared();
  sync(own_barrier, kWarpgroup);
}

// S = Q K^T for the block in buffer `stage`, tile by tile as they land.
template <typename Element, typename Scores>
__device__ void compute_scores(SharedMemory<Element>& smem, int stage, uint32_t parity, int thread,
                               Scores& scores) {
  ScoresMma<Element> mma;
  const auto slice = mma.get_slice(thread);
  Tensor q = make_tensor(make_smem_ptr(&smem.q[0][0]), BlockLayout<Element>{});
  Tensor k = make_tensor(make_smem_ptr(&smem.k[stage][0][0]), BlockLayout<Element>{});
  Tensor a = slice.partition_fragment_A(q);
  Tensor b = slice.partition_fragment_B(k);
  warpgroup_fence_operand(scores);
  mma.accumulate_ = GMMA::ScaleOut::Zero;
  // The order in which the loader fills the buffer.
  constexpr int kOrder[2][kTiles] = {{0, 1, 2, 3, 4, 5, 6, 7, 8}, {4, 5, 6, 7, 8, 0, 1, 2, 3}};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int tile = stage == 0 ? kOrder[0][i] : kOrder[1][i];
    smem.full[stage][tile].wait(parity);
    warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      cute::gemm(mma, a(_, _, tile * 4 + step), b(_, _, tile * 4 + step), scores);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
  }
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  warpgroup_fence_operand(scores);
}

// Scales the scores to base 2 and masks those past what each row may see.
template <typename Scores>
__device__ void scale_and_mask(const DecodeParams& p, const Work& work, const Item& item, int block,
                               const Rows& rows, Scores& scores) {
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
__device__ float row_max(const Scores& scores, int row, float start) {
  float top = start;
#pragma unroll
  for (int i = 0; i < 16; ++i) top = fmaxf(top, scores(i / 2 * 4 + row * 2 + i % 2));
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
  return fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
}

// Scores become weights exp2(score - max); returns this thread's part of the row's sum.
template <typename Scores>
__device__ float exponentiate(Scores& scores, int row, float max) {
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
__device__ void rescale(Accumulator& acc, const float (&factor)[2]) {
  if (__all_sync(0xffffffffu, factor[0] == 1.0f && factor[1] == 1.0f)) return;
#pragma unroll
  for (int i = 0; i < size(acc); ++i) acc(i) *= factor[i / 2 % 2];
}

// Writes the weights of a block over its rotary tile, for the other warpgroup.
template <typename Element, typename Weights>
__device__ void store_weights(SharedMemory<Element>& smem, int stage, const Rows& rows,
                              const Weights& weights) {
  Tensor tile = make_tensor(make_smem_ptr(smem.k[stage][kRopeTile]), TileLayout<Element>{});
#pragma unroll
  for (int i = 0; i < 32; i += 2) {
    const int row = rows.row(i / 2 % 2);
    const int column = i / 4 * 8 + rows.column;
    Element pair[2] = {Element(weights(i)), Element(weights(i + 1))};
    *reinterpret_cast<uint32_t*>(&tile(row, column)) = *reinterpret_cast<uint32_t*>(pair);
  }
  cutlass::arch::fence_view_async_shared();
}

// O += P V: the warpgroup's half of the values, P from its registers.
template <typename Element, typename Weights, typename Accumulator>
__device__ void add_own_values(SharedMemory<Element>& smem, int stage, int half, int thread,
                               const Weights& weights, Accumulator& out) {
  OwnMma<Element> mma;
  const auto slice = mma.get_slice(thread);
  Tensor v = make_tensor(make_smem_ptr(smem.k[stage][half * kHalfTiles]), ValueLayout<Element>{});
  Tensor b = slice.partition_fragment_B(v);
  // An accumulator's registers, packed in pairs, are the A operand's, four steps of 16 keys.
  Tensor a = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, _4>>{});
#pragma unroll
  for (int i = 0; i < size(a); ++i) a(i) = Element(weights(i));
  warpgroup_fence_operand(out);
  warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < 4; ++step) cute::gemm(mma, a(_, _, step), b(_, _, step), out);
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  warpgroup_fence_operand(out);
}

// The same with the other warpgroup's P, from shared memory.
template <typename Element, typename Accumulator>
__device__ void add_other_values(SharedMemory<Element>& smem, int stage, int half, int thread,
                                 Accumulator& out) {
  OtherMma<Element> mma;
  const auto slice = mma.get_slice(thread);
  Tensor p = make_tensor(make_smem_ptr(smem.k[stage][kRopeTile]), TileLayout<Element>{});
  Tensor v = make_tensor(make_smem_ptr(smem.k[stage][half * kHalfTiles]), ValueLayout<Element>{});
  Tensor a = slice.partition_fragment_A(p);
  Tensor b = slice.partition_fragment_B(v);
  warpgroup_fence_operand(out);
  warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < 4; ++step) cute::gemm(mma, a(_, _, step), b(_, _, step), out);
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  warpgroup_fence_operand(out);
}

// The tiles that a warpgroup multiplies without having computed their scores.
template <typename Element>
__device__ void wait_values(SharedMemory<Element>& smem, int stage, int half, uint32_t parity) {
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

// Divides by the sums and writes rows to `out` and `lse`, or unnormalised to the partial result.
template <typename Element, typename Accumulator>
__device__ void write_result(const DecodeParams& p, SharedMemory<Element>& smem, const Work& work,
                             const Item& item, int half, const Rows& rows, const float (&max)[2],
                             const Accumulator& out) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = work.tile * kRowTile + rows.row(i);
    if (row >= p.num_rows()) continue;
    const float sum = smem.row_sums[0][rows.row(i)] + smem.row_sums[1][rows.row(i)];
    const bool empty = sum == 0;
    const float inverse = empty ? 0.0f : 1.0f / sum;
    const float lse = empty ? -INFINITY : max[i] + log2f(sum);
    const bool writes_lse = half == 0 && rows.column == 0;
    const int first_column = half * kHalfTiles * 64 + rows.column;
    if (item.slot < 0) {
      const int64_t index = query_index(p, work, item.seq, row);
      Element* target = static_cast<Element*>(p.out) + index * kLatentDim + first_column;
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        Element pair[2] = {Element(out(j * 4 + i * 2) * inverse),
                           Element(out(j * 4 + i * 2 + 1) * inverse)};
        *reinterpret_cast<uint32_t*>(target + j * 8) = *reinterpret_cast<uint32_t*>(pair);
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
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        *reinterpret_cast<float2*>(target + j * 8) =
            make_float2(out(j * 4 + i * 2) * inverse, out(j * 4 + i * 2 + 1) * inverse);
      }
      if (writes_lse) p.partial_lse[index] = lse;
    }
  }
}

// Starts an item: queries in shared memory, empty accumulators.
template <typename Element, typename Accumulator>
__device__ void begin_item(const DecodeParams& p, SharedMemory<Element>& smem, const Work& work,
                           int seq, int role, int thread, Accumulator& out) {
  load_q(p, smem, work, seq, role * kWarpgroup + thread);
  clear(out);
  sync(Sync::kConsumers, kConsumers);
}

// Ends it: sums over the threads of a row, then over both warpgroups, then the result.
template <typename Element, typename Accumulator>
__device__ void end_item(const DecodeParams& p, SharedMemory<Element>& smem, const Work& work,
                         const Item& item, int role, const Rows& rows, const float (&max)[2],
                         const float (&sum)[2], const Accumulator& out) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = sum[i];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    if (rows.column == 0) smem.row_sums[role][rows.row(i)] = total;
  }
  // Also the point after which q may be overwritten: both have computed all their scores.
  sync(Sync::kConsumers, kConsumers);
  write_result(p, smem, work, item, role, rows, max, out);
}

template <typename Element>
__device__ void run_left(const DecodeParams& p, SharedMemory<Element>& smem, const Work& work,
                         int thread) {
  const Rows rows(thread);
  Phases phases;
  Tensor out = partition_fragment_C(OtherMma<Element>{}, Shape<_64, _256>{});
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item(p, work, seq);
    begin_item(p, smem, work, seq, kLeft, thread, out);
    float max[2] = {-FLT_MAX, -FLT_MAX};
    float sum[2] = {0, 0};
    for (int block = item.first; block < item.last; block += 2) {
      const bool pair = block + 1 < item.last;
      const int valid = item.length - block * kBlock;
      if (valid < kBlock) {
        for (int tile = 0; tile < kTiles; ++tile) smem.full[0][tile].wait(phases.parity(0));
        clear_past_end(smem, 0, valid, thread, Sync::kLeftOnly);
      }
      Tensor scores = partition_fragment_C(ScoresMma<Element>{}, Shape<_64, _64>{});
      compute_scores(smem, 0, phases.parity(0), thread, scores);
      scale_and_mask(p, work, item, block, rows, scores);

      float factor[2];
      for (int i = 0; i < 2; ++i) {
        const float new_max = row_max(scores, i, max[i]);
        factor[i] = exp2f(max[i] - new_max);
        max[i] = new_max;
        if (rows.column == 0) smem.left_max[rows.row(i)] = new_max;
      }
      arrive(Sync::kLeftMax, kConsumers);
      for (int i = 0; i < 2; ++i) {
        sum[i] = sum[i] * factor[i] + exponentiate(scores, i, max[i]);
      }
      rescale(out, factor);
      add_own_values(smem, 0, kLeft, thread, scores, out);
      release(smem, 0, kLeft, thread);
      ++phases.uses[0];

      sync(Sync::kRightWeights, kConsumers);
      for (int i = 0; i < 2; ++i) {
        const float new_max = smem.right_max[rows.row(i)];
        factor[i] = exp2f(max[i] - new_max);
        max[i] = new_max;
        sum[i] *= factor[i];
      }
      for (int i = 0; i < size(scores); ++i) scores(i) *= factor[i / 2 % 2];
      store_weights(smem, 0, rows, scores);
      arrive(Sync::kLeftWeights, kConsumers);
      if (pair) {
        rescale(out, factor);
        wait_values(smem, 1, kLeft, phases.parity(1));
        add_other_values(smem, 1, kLeft, thread, out);
        release(smem, 1, kLeft, thread);
        ++phases.uses[1];
      }
    }
    end_item(p, smem, work, item, kLeft, rows, max, sum, out);
  }
}

template <typename Element>
__device__ void run_right(const DecodeParams& p, SharedMemory<Element>& smem, const Work& work,
                          int thread) {
  const Rows rows(thread);
  Phases phases;
  Tensor out = partition_fragment_C(OtherMma<Element>{}, Shape<_64, _256>{});
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item(p, work, seq);
    begin_item(p, smem, work, seq, kRight, thread, out);
    float max[2] = {-FLT_MAX, -FLT_MAX};
    float sum[2] = {0, 0};
    for (int block = item.first; block < item.last; block += 2) {
      const bool pair = block + 1 < item.last;
      Tensor scores = partition_fragment_C(ScoresMma<Element>{}, Shape<_64, _64>{});
      if (pair) {
        const int valid = item.length - (block + 1) * kBlock;
        if (valid < kBlock) {
          for (int tile = 0; tile < kTiles; ++tile) smem.full[1][tile].wait(phases.parity(1));
          clear_past_end(smem, 1, valid, thread, Sync::kRightOnly);
        }
        compute_scores(smem, 1, phases.parity(1), thread, scores);
        scale_and_mask(p, work, item, block + 1, rows, scores);
      }
      sync(Sync::kLeftMax, kConsumers);
      float factor[2];
      for (int i = 0; i < 2; ++i) {
        const float left_max = smem.left_max[rows.row(i)];
        const float new_max = pair ? row_max(scores, i, left_max) : left_max;
        factor[i] = exp2f(max[i] - new_max);
        max[i] = new_max;
        sum[i] *= factor[i];
        if (rows.column == 0) smem.right_max[rows.row(i)] = new_max;
      }
      if (pair) {
        for (int i = 0; i < 2; ++i) sum[i] += exponentiate(scores, i, max[i]);
        store_weights(smem, 1, rows, scores);
      }
      arrive(Sync::kRightWeights, kConsumers);
      rescale(out, factor);
      if (pair) {
        add_own_values(smem, 1, kRight, thread, scores, out);
        release(smem, 1, kRight, thread);
        ++phases.uses[1];
      }
      sync(Sync::kLeftWeights, kConsumers);
      wait_values(smem, 0, kRight, phases.parity(0));
      add_other_values(smem, 0, kRight, thread, out);
      release(smem, 0, kRight, thread);
      ++phases.uses[0];
    }
    end_item(p, smem, work, item, kRight, rows, max, sum, out);
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, 1)
    split_kernel(const __grid_constant__ DecodeParams p, const __grid_constant__ CUtensorMap map) {
  extern __shared__ __align__(1024) char raw[];
  auto& smem = *reinterpret_cast<SharedMemory<Element>*>(raw);
  const Work work = find_work(p);
  if (!has_item(work, work.begin_seq)) return;

  const int role = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  const int thread = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const TmaDescriptor*>(&map));
    for (int stage = 0; stage < 2; ++stage) {
      for (int tile = 0; tile < kTiles; ++tile) smem.full[stage][tile].init(1);
      for (int half = 0; half < 2; ++half) smem.empty[stage][half].init(kWarpgroup / 32);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  if (role == kLoader) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (thread == 0) run_loader(p, &map, smem, work);
  } else if (role == kLeft) {
    cutlass::arch::warpgroup_reg_alloc<232>();
    run_left(p, smem, work, thread);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    run_right(p, smem, work, thread);
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
