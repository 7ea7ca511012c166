// How warps of the split kernels write what they have accumulated: 16 rows by some strips of eight
// columns, of which a lane has a float4 each, in the order of partial results (see decode.h).
#pragma once

#include <cfloat>

#include "cuda/decode_shared.cuh"

namespace jax_flashmla {

// Two numbers as 16-bit floats, the first in the lower half.
__device__ __forceinline__ uint32_t as_half2(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// Where a lane's part of a tile of partial results goes, from a strip on: four 16-bit floats of
// each.
__device__ __forceinline__ uint2* partial_target(const KernelParams& p, int64_t tile,
                                                 int first_strip, int lane) {
  return static_cast<uint2*>(p.partial_out) + (tile * kPartialStrips + first_strip) * 32 + lane;
}

// A power of two that brings the numbers of a warp into the range of 16-bit floats, and its
// inverse. Known of them is no more than the sum of the magnitudes of each lane's: an addition
// each, where a maximum would take twice the time. It becomes 2^14 to 2^15; what is 2^-21 of the
// largest number then still has all bits of a 16-bit float.
struct PartialScaling {
  float factor;
  float inverse;

  // `sum(magnitude)`: of the lane's numbers, as that function has them.
  template <typename Sum>
  __device__ __forceinline__ explicit PartialScaling(const Sum& sum) {
    float of_lane = sum([](float x) { return fabsf(x); });
    if (__builtin_expect(__any_sync(0xffffffffu, !(of_lane <= FLT_MAX)), 0)) {
      // Infinite numbers and NaN stay so, whatever the others are multiplied with.
      of_lane = sum([](float x) { return fabsf(x) <= FLT_MAX ? fabsf(x) : 0; });
    }
    const uint32_t largest = __reduce_max_sync(0xffffffffu, __float_as_uint(of_lane));
    const int exponent = min(max(largest >> 23, 15), 254);  // so that both can be
    factor = __int_as_float((268 - exponent) << 23);
    inverse = __int_as_float((exponent - 14) << 23);
  }
  __device__ __forceinline__ void store(const KernelParams& p, int64_t tile, int strip) const {
    p.partial_stats[tile * kPartialStats + kPartialRows + strip] = inverse;
  }
};

// Writes `kCount` strips: as a partial result, in tile `tile`, if the item's sequence is split,
// else to their place. `row`: the first of the warp's rows, of all of the KV head. `get(i)`: the
// lane's part of the i-th strip, which is to be multiplied with its rows' `inverse`.
template <typename Element, int kCount, typename Get>
__device__ __forceinline__ void write_output(const KernelParams& p, const Work& work,
                                             const Item& item, int64_t tile, int row,
                                             int first_strip, int lane, const float (&inverse)[2],
                                             const Get& get) {
  // By votes, so that the compiler knows that a warp stays together: else it keeps even the
  // position in the ring of keys for each thread.
  if (__any_sync(0xffffffffu, row >= p.num_rows() || item.slot == Item::kEmpty)) return;
  if (__any_sync(0xffffffffu, item.slot >= 0)) {
    const PartialScaling scaling([&](const auto& magnitude) __attribute__((always_inline)) {
      float4 sums = {};
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float4 x = get(i);
        sums.x += magnitude(x.x), sums.y += magnitude(x.y);
        sums.z += magnitude(x.z), sums.w += magnitude(x.w);
      }
      return magnitude((sums.x + sums.y) * inverse[0]) + magnitude((sums.z + sums.w) * inverse[1]);
    });
    const float by[2] = {inverse[0] * scaling.factor, inverse[1] * scaling.factor};
    uint2* const partial = partial_target(p, tile, first_strip, lane);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float4 x = get(i);
      partial[i * 32] = {as_half2(x.x * by[0], x.y * by[0]), as_half2(x.z * by[1], x.w * by[1])};
    }
    static_assert(kCount <= 32, "a lane for each strip");
    if (lane < kCount) scaling.store(p, tile, first_strip + lane);
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int my_row = row + lane / 4 + 8 * half;
    if (my_row >= p.num_rows()) return;
    Element* target = static_cast<Element*>(p.out) +
                      query_index(p, work, item.seq, my_row) * kLatentDim +
                      first_strip * kPartialColumns + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float4 x = get(i);
      Element pair[2] = {Element((half == 0 ? x.x : x.z) * inverse[half]),
                         Element((half == 0 ? x.y : x.w) * inverse[half])};
      *reinterpret_cast<uint32_t*>(target + i * kPartialColumns) =
          *reinterpret_cast<uint32_t*>(pair);
    }
  }
}

}  // namespace jax_flashmla
