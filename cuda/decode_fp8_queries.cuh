// The queries of the split kernel for FP8 caches, as e4m3 pieces: of 32 query rows in registers,
// else in shared memory.
#pragma once

#include "cuda/decode_fp8_shared.cuh"
#include "cuda/decode_softmax.cuh"

namespace jax_flashmla {

// Of 32 query rows a warp has eight: a thread the pieces of one in the two rows of its operand A.
// Of more it has sixteen, in shared memory, of which a thread works on two.
template <int kRows>
inline constexpr int kThreadRows = kRows == kRowTile ? 2 : 1;

template <KeyFormat kFormat>
struct SharedFp8Queries {
  float scale[kThreadRows<kRowTile>];  // of the pieces
};

template <KeyFormat kFormat>
struct RegisterFp8Queries {
  static constexpr bool kBlocks = kFormat == KeyFormat::kFp8Block;
  static constexpr int kSteps = (kBlocks ? kLatentDim : kHeadDim) / 32;
  decltype(make_tensor<E4M3>(Layout<Shape<Shape<_4, _2, _2>, _1, Int<kSteps>>>{})) pieces;
  // The rotary columns of fp8_block, of which the second of both rows is zero.
  decltype(make_tensor<bfloat16_t>(Layout<Shape<Shape<_2, _2, _2>, _1, _4>>{})) rope;
  float scale[1];  // of the pieces
};

template <int kRows, KeyFormat kFormat>
using Fp8Queries =
    std::conditional_t<kRows == kRowTile, SharedFp8Queries<kFormat>, RegisterFp8Queries<kFormat>>;

template <typename Element>
__device__ __forceinline__ float as_float(uint32_t bits) {
  if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
    return __uint_as_float(bits << 16);
  } else {
    return static_cast<float>(Element::bitcast(static_cast<uint16_t>(bits)));
  }
}

// Of a row of queries, four neighbouring columns.
struct QueryRow {
  const uint16_t* nope = nullptr;
  const uint16_t* rope = nullptr;
  __device__ __forceinline__ uint2 four(int column) const {
    if (nope == nullptr) return {0, 0};
    const uint16_t* at = column < kLatentDim ? nope + column : rope + (column - kLatentDim);
    return *reinterpret_cast<const uint2*>(at);
  }
};

__device__ __forceinline__ uint32_t largest_of(uint32_t largest, uint2 four) {
  const uint32_t top = __vmaxu2(four.x & 0x7fff7fffu, four.y & 0x7fff7fffu);
  return __vmaxu2(largest, top);
}

// The power of two for a row, by the largest of its magnitudes: each of `kLanes` neighbouring lanes
// knows two. A cache's one scale is in it, so that what scores are multiplied with is never
// negative.
template <int kLanes, bool kBlocks, typename Element>
__device__ __forceinline__ Scaling scaling_of(const KernelParams& p, const Work& work,
                                              uint32_t largest) {
  largest = max(largest & 0xffff, largest >> 16);
#pragma unroll
  for (int by = 1; by < kLanes; by *= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, by));
  }
  Scaling scaling(as_float<Element>(largest));
  if constexpr (!kBlocks) scaling.include(p.k_scale[work.group]);
  return scaling;
}

template <bool kTimes32, typename Element>
__device__ __forceinline__ Pieces pieces_of(const Scaling& scaling, uint2 four) {
  const auto scaled = [&](uint32_t bits) { return scaling.apply(as_float<Element>(bits)); };
  return split<kTimes32>(scaled(four.x & 0xffff), scaled(four.x >> 16), scaled(four.y & 0xffff),
                         scaled(four.y >> 16));
}

// Two queries as bfloat16: eight bits, as many as pieces have.
template <typename Element>
__device__ __forceinline__ uint32_t as_bfloat16(uint32_t pair) {
  if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) return pair;
  const bfloat16_t both[2] = {bfloat16_t(as_float<Element>(pair & 0xffff)),
                              bfloat16_t(as_float<Element>(pair >> 16))};
  return reinterpret_cast<const uint32_t&>(both);
}

// Reads a row, twice: for its largest value, of which a power of two makes one of e4m3, and then
// for its pieces: `store(i, pieces)` takes those of columns 16 i + lane % 4 * 4 and the next three.
// `store_rope(i, pair)`, of fp8_block, takes rotary columns 8 i + lane % 4 * 2 and the next.
// Returns what the pieces are to be multiplied with.
template <bool kTimes32, bool kBlocks, typename Element, typename Store, typename StoreRope>
__device__ __forceinline__ float read_queries(const KernelParams& p, const Work& work, int seq,
                                              int row, int lane, const Store& store,
                                              const StoreRope& store_rope) {
  constexpr int kFours = (kBlocks ? kLatentDim : kHeadDim) / 16;
  QueryRow from;
  if (row < p.num_rows()) {
    const int64_t index = query_index(p, work, seq, row);
    from.nope = static_cast<const uint16_t*>(p.q_nope) + index * p.q_nope_stride + lane % 4 * 4;
    from.rope = static_cast<const uint16_t*>(p.q_rope) + index * p.q_rope_stride + lane % 4 * 4;
  }
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kFours; ++i) largest = largest_of(largest, from.four(i * 16));
  const auto scaling = scaling_of<4, kBlocks, Element>(p, work, largest);
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    store(i, pieces_of<kTimes32, Element>(scaling, from.four(i * 16)));
  }
  if constexpr (kBlocks) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t pair = 0;
      if (from.rope != nullptr) {
        pair = *reinterpret_cast<const uint32_t*>(from.rope - lane % 4 * 2 + i * 8);
      }
      store_rope(i, as_bfloat16<Element>(pair));
    }
  }
  return scaling.inverse;
}

// Reads a thread's row into registers.
template <KeyFormat kFormat, typename Element, typename Memory>
__device__ __forceinline__ void read_item_queries(const KernelParams& p, const Work& work, int seq,
                                                  int first_row, int thread,
                                                  RegisterFp8Queries<kFormat>& q, Memory&) {
  Tensor words = recast<uint32_t>(q.pieces);
  Tensor rope = recast<uint32_t>(q.rope);
  const int lane = thread % 32;
  q.scale[0] = read_queries<true, q.kBlocks, Element>(
      p, work, seq, first_row + thread / 32 * 8 + lane / 4, lane,
      [&](int i, const Pieces& pieces) {
        words(2 * i) = pieces.high;
        words(2 * i + 1) = pieces.low;
      },
      [&](int i, uint32_t pair) {
        rope(2 * i) = pair;
        rope(2 * i + 1) = 0;
      });
}

// A named barrier of the scores' warpgroup.
inline constexpr int kScoresBarrier = 4;
__device__ __forceinline__ void sync_scores() {
  cutlass::arch::NamedBarrier::sync(kWarpgroup, kScoresBarrier);
}

// Reads a thread's two rows into shared memory.
template <KeyFormat kFormat, typename Element, typename Memory>
__device__ __forceinline__ void read_item_queries(const KernelParams& p, const Work& work, int seq,
                                                  int first_row, int thread,
                                                  SharedFp8Queries<kFormat>& q, Memory& smem) {
  constexpr bool kBlocks = kFormat == KeyFormat::kFp8Block;
  const int lane = thread % 32;
  sync_scores();  // nobody needs the queries before
#pragma unroll 1
  for (int j = 0; j < 2; ++j) {
    const int row = thread / 32 * 16 + j * 8 + lane / 4;
    // Four bytes of a vector of 16.
    const auto at = [&](uint8_t* tile, int vector) -> uint32_t& {
      return reinterpret_cast<uint32_t*>(&vector_at(tile, row, vector))[lane % 4];
    };
    (j == 0 ? q.scale[0] : q.scale[1]) = read_queries<false, kBlocks, Element>(
        p, work, seq, first_row + row, lane,
        [&](int i, const Pieces& pieces) {
          const uint32_t of_piece[kPieces] = {pieces.high, pieces.low};
#pragma unroll
          for (int k = 0; k < kPieces; ++k) {
            if (i < kLatentDim / 16) {
              at(smem.q.latent[k][i / 8], i % 8) = of_piece[k];
            } else {  // rows of 64 bytes
              const int vector = row * 4 + ((i - kLatentDim / 16) ^ row / 2 % 4);
              reinterpret_cast<uint32_t*>(smem.q.rope[k])[vector * 4 + lane % 4] = of_piece[k];
            }
          }
        },
        [&](int i, uint32_t pair) { at(smem.q.rope[0], i) = pair; });
  }
  cutlass::arch::fence_view_async_shared();
  sync_scores();
}

// What turned products have of queries, so that an item's can be on their way during the one
// before: eight threads share a row, and have every eighth vector of eight columns.
template <bool kBlocks, typename Element>
struct QueryVectors {
  static constexpr int kLanes = kWarpgroup / kNarrowRows;
  static constexpr int kOfLatent = kLatentDim / 8 / kLanes;
  static constexpr int kVectors = kHeadDim / 8 / kLanes;
  uint4 vectors[kVectors];

  // Begins to load those of a sequence.
  __device__ __forceinline__ void load(const KernelParams& p, const Work& work, int seq,
                                       int thread) {
    const int row = work.tile * kNarrowRows + thread / kLanes, lane = thread % kLanes;
#pragma unroll
    for (uint4& vector : vectors) vector = {0, 0, 0, 0};
    if (row >= p.num_rows()) return;
    const int64_t index = query_index(p, work, seq, row);
    const auto* const nope = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.q_nope) +
                                                            index * wide(p.q_nope_stride));
    const auto* const rope = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.q_rope) +
                                                            index * wide(p.q_rope_stride));
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      vectors[i] = i < kOfLatent ? nope[i * kLanes + lane] : rope[(i - kOfLatent) * kLanes + lane];
    }
  }

  // Writes them as pieces; the rotary ones of fp8_block as they are.
  __device__ __forceinline__ void store(const KernelParams& p, const Work& work,
                                        TurnedQueries<kBlocks>& q, int thread) const {
    const int row = thread / kLanes, lane = thread % kLanes;
    constexpr int kSplit = kBlocks ? kOfLatent : kVectors;  // vectors that become pieces
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kSplit; ++i) {
      largest = largest_of(largest, {vectors[i].x, vectors[i].y});
      largest = largest_of(largest, {vectors[i].z, vectors[i].w});
    }
    const auto scaling = scaling_of<kLanes, kBlocks, Element>(p, work, largest);
    if (lane == 0) q.scale[row_slot<kNarrowRows>(row)] = scaling.inverse;
#pragma unroll
    for (int i = 0; i < kSplit; ++i) {
      const uint4 x = vectors[i];
      const auto first = pieces_of<true, Element>(scaling, {x.x, x.y});
      const auto second = pieces_of<true, Element>(scaling, {x.z, x.w});
      const uint2 of_piece[kPieces] = {{first.high, second.high}, {first.low, second.low}};
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        *half_vector(q, i, piece * kNarrowRows + row, lane) = of_piece[piece];
      }
    }
    if constexpr (kBlocks) {
      const uint4 last = vectors[kOfLatent];
      const uint4 rope = {as_bfloat16<Element>(last.x), as_bfloat16<Element>(last.y),
                          as_bfloat16<Element>(last.z), as_bfloat16<Element>(last.w)};
      vector_at(q.rope, row, lane) = reinterpret_cast<const uint128_t&>(rope);
    }
  }

 private:
  static_assert(kVectors == kOfLatent + 1, "a thread has one vector of the rotary columns");

  // Where eight pieces of vector `i` of a row go.
  static __device__ __forceinline__ uint2* half_vector(TurnedQueries<kBlocks>& q, int i, int row,
                                                       int lane) {
    if (i < kOfLatent) {
      const int vector = i * kLanes + lane;
      return reinterpret_cast<uint2*>(&vector_at(q.latent[vector / 16], row, vector % 16 / 2)) +
             vector % 2;
    }
    // Rows of 64 bytes.
    return reinterpret_cast<uint2*>(q.rope) + (row * 4 + (lane / 2 ^ row / 2 % 4)) * 2 + lane % 2;
  }
};

}  // namespace jax_flashmla
