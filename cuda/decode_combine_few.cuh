// Combines few splits: each warp has all of them.
#pragma once

#include "cuda/decode_combine_tile.cuh"

namespace jax_flashmla {

struct FewSplits {
  static constexpr int kMost = 8;  // of a sequence; more are for decode_combine_many.cuh
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kVectors = 4;  // strips that a warp has at a time
  static constexpr int kSlices = kPartialStrips / (kWarps * kVectors);
  static constexpr int kAhead = 2;  // splits loaded at a time
};

// The strips from `first` on, by a warp. `target`: of the lane's two rows.
template <typename Element>
__device__ __forceinline__ void combine_few(const Tile& tile, const Target<Element> (&target)[2],
                                            int first, int lane) {
  using S = FewSplits;
  float base[2] = {kLowest, kLowest};
  float total[2] = {0, 0};
  float4 sum[S::kVectors] = {};
#pragma unroll 1
  for (int begin = 0; begin < tile.splits; begin += S::kAhead) {
    float lse[S::kAhead][2];
    uint2 loaded[S::kAhead][S::kVectors];
    float4 scales[S::kAhead];
    static_assert(S::kVectors == 4);
#pragma unroll
    for (int j = 0; j < S::kAhead; ++j) {
      const bool there = begin + j < tile.splits;
      const int64_t split = (begin + j) * tile.step;
#pragma unroll
      for (int v = 0; v < S::kVectors; ++v) {
        const uint2* at = tile.columns + (split * kPartialStrips + first + v) * 32 + lane;
        loaded[j][v] = there ? *at : uint2{};
      }
      const float* const stats = tile.stats + split * kPartialStats;
      const auto* at = reinterpret_cast<const float4*>(stats + kPartialRows + first);
      scales[j] = there ? *at : float4{};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool has = there && target[i].out != nullptr;
        lse[j][i] = has ? stats[lane / 4 + 8 * i] : -INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = base[i];
#pragma unroll
      for (int j = 0; j < S::kAhead; ++j) top = fmaxf(top, lse[j][i]);
      const float factor = exp2f(base[i] - top);
      base[i] = top;
      total[i] *= factor;
#pragma unroll
      for (float4& x : sum) {
        float* pair = i == 0 ? &x.x : &x.z;
        pair[0] *= factor, pair[1] *= factor;
      }
    }
#pragma unroll
    for (int j = 0; j < S::kAhead; ++j) {
      const float weight[2] = {exp2f(lse[j][0] - base[0]), exp2f(lse[j][1] - base[1])};
      total[0] += weight[0], total[1] += weight[1];
#pragma unroll
      for (int v = 0; v < S::kVectors; ++v) {
        add_scaled(sum[v], weight, reinterpret_cast<const float*>(&scales[j])[v], loaded[j][v]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (target[i].out == nullptr) break;
    const float factor = over_total(total[i]);
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
      const float* pair = i == 0 ? &sum[v].x : &sum[v].z;
      store2(target[i].out + (first + v) * kPartialColumns + lane % 4 * 2, pair[0] * factor,
             pair[1] * factor);
    }
    if (first == 0 && lane % 4 == 0) *target[i].lse = log_sum_exp(base[i], total[i]) * kLn2;
  }
}

}  // namespace jax_flashmla
