// How a consumer warpgroup of the split kernel writes its half of the output.
#pragma once

#include "cuda/decode_shared.cuh"

namespace jax_flashmla {

inline constexpr float kLn2 = 0.6931471805599453f;

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

}  // namespace jax_flashmla
