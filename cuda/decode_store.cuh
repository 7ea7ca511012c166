// How a value warpgroup of the split kernel writes its half of the output.
#pragma once

#include "cuda/decode_shared.cuh"

namespace jax_flashmla {

// Multiplies by the inverse sums and writes a half of the columns to `out` or to the partial
// result. A thread holds columns 2t and 2t + 1 of every eight, t its number in the quad that shares
// a row. The code is plain to be short: it runs once per item, and instructions are then not in the
// cache.
template <typename Element, typename Accumulator>
__device__ __forceinline__ void write_output(const DecodeParams& p, const Work& work,
                                             const Item& item, int half, const Rows& rows,
                                             const float (&inverse)[2], const Accumulator& out) {
  const int first_column = half * kHalfTiles * 64 + rows.column;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = work.tile * kRowTile + rows.row(i);
    if (row >= p.num_rows()) break;
    const auto pair = [&](int j) __attribute__((always_inline)) {
      return make_float2(out(j * 4 + i * 2) * inverse[i], out(j * 4 + i * 2 + 1) * inverse[i]);
    };
    if (item.slot < 0) {
      const int64_t index = query_index(p, work, item.seq, row);
      Element* target = static_cast<Element*>(p.out) + index * kLatentDim + first_column;
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        const float2 x = pair(j);
        Element rounded[2] = {Element(x.x), Element(x.y)};
        *reinterpret_cast<uint32_t*>(target + j * 8) = *reinterpret_cast<uint32_t*>(rounded);
      }
    } else {
      float* target = p.partial_out + partial_row(p, work, item, row) * kLatentDim + first_column;
#pragma unroll
      for (int j = 0; j < 32; ++j) *reinterpret_cast<float2*>(target + j * 8) = pair(j);
    }
  }
}

}  // namespace jax_flashmla
