// How warps of the split kernels write what they have accumulated: 16 rows by some tiles of eight
// columns, of which a lane has a float4 each, in the order of partial results (see decode.h).
#pragma once

#include "cuda/decode_shared.cuh"

namespace jax_flashmla {

// Where a lane's part of a partial result goes, from tile of columns `first_tile` on. `row`: the
// first of the warp's rows, of all of the KV head.
__device__ __forceinline__ float4* partial_target(const KernelParams& p, const Work& work,
                                                  const Item& item, int row, int first_tile,
                                                  int lane) {
  const int64_t tile = partial_tile(p, work, item, row / kPartialRows);
  return reinterpret_cast<float4*>(p.partial_out) +
         (tile * (kLatentDim / kPartialColumns) + first_tile) * 32 + lane;
}

// Writes `kCount` tiles of columns: 32-bit partial results, to `partial`, if the item's sequence is
// split, else 16-bit results. `get(i)`: the lane's part of the i-th tile.
template <typename Element, int kCount, typename Get>
__device__ __forceinline__ void write_output(const KernelParams& p, const Work& work,
                                             const Item& item, float4* partial, int row,
                                             int first_tile, int lane, const Get& get) {
  if (row >= p.num_rows() || item.slot == Item::kEmpty) return;
  if (item.slot >= 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) partial[i * 32] = get(i);
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int my_row = row + lane / 4 + 8 * half;
    if (my_row >= p.num_rows()) return;
    Element* target = static_cast<Element*>(p.out) +
                      query_index(p, work, item.seq, my_row) * kLatentDim +
                      first_tile * kPartialColumns + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float4 x = get(i);
      Element pair[2] = {Element(half == 0 ? x.x : x.z), Element(half == 0 ? x.y : x.w)};
      *reinterpret_cast<uint32_t*>(target + i * kPartialColumns) =
          *reinterpret_cast<uint32_t*>(pair);
    }
  }
}

}  // namespace jax_flashmla
