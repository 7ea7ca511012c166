// What the split kernels write for empty sequences, such as the padding of a captured batch.
#pragma once

#include "cuda/decode_shared.cuh"

namespace jax_flashmla {

// Writes the zeros of empty sequences, and the logarithm of zero: by `kThreads` threads of the
// loader that are idle while the others attend. Whatever the plan says, each CTA of the grid has
// its share: of every num_parts-th sequence, the `count` rows from `first_row` on, as many as there
// are, which are those that it has of other sequences. `thread`: which of the threads this is.
template <int kThreads>
__device__ __forceinline__ void write_empty(const KernelParams& p, const Work& work, int first_row,
                                            int count, int thread) {
  static_assert(kThreads % 32 == 0, "whole warps");
  constexpr int kRowVectors = kLatentDim * 2 / sizeof(uint4);
  static_assert(kRowVectors == 2 * 32, "two for each lane of a warp");
  const int lane = thread % 32;
  const int rows = min(p.num_rows() - first_row, count);
#pragma unroll 1
  for (int64_t first = work.part; first < p.batch; first += int64_t{p.num_parts} * 32) {
    // Each lane looks at another sequence: 32 take the time of one.
    const int64_t mine = first + int64_t{p.num_parts} * lane;
    bool empty = false;
    if (mine < p.batch) {
      const int32_t* splits = find_splits(p, work, static_cast<int>(mine));
      empty = is_empty(splits[1] - splits[0], find_length(p, work, static_cast<int>(mine)));
    }
    unsigned left = __ballot_sync(0xffffffffu, empty);
#pragma unroll 1
    for (; left != 0; left &= left - 1) {
      const int seq = static_cast<int>(first) + p.num_parts * (__ffs(left) - 1);
#pragma unroll 1
      for (int row = thread / 32; row < rows; row += kThreads / 32) {
        uint4* out = static_cast<uint4*>(p.out) +
                     query_index(p, work, seq, first_row + row) * kRowVectors + lane;
        out[0] = make_uint4(0, 0, 0, 0);
        out[32] = make_uint4(0, 0, 0, 0);
      }
      // A KV head's are neighbours, in another order than its rows, but here they are all the same.
      float* lse = p.lse + (work.first_seq + seq) * (p.s_q * p.h_q) + work.head * p.num_rows();
#pragma unroll 1
      for (int row = thread; row < rows; row += kThreads) lse[first_row + row] = -INFINITY;
    }
  }
}

}  // namespace jax_flashmla
