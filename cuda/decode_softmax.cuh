// What the softmax of the split kernels shares.
#pragma once

#include <cfloat>

#include "cuda/decode_shared.cuh"
#include "cuda/weight_sums.cuh"

namespace jax_flashmla {

// The maximum that weights are relative to may lag behind the true one by this much, base 2: the
// output is then rarely rescaled, and weights stay below 2^8 (the idea is FlashAttention-4's).
inline constexpr float kMaxLag = 8;

// 2^x in one instruction; results below 2^-126 become zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Combines what the four threads have that share a row.
template <typename Combine>
__device__ __forceinline__ float reduce_quad(float x, const Combine& combine) {
  x = combine(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return combine(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The hyperbolic tangent of a product of a query and a key, scaled, that is to be capped. Of small
// numbers by its series: the other way leaves an error of 2^-23 of the cap, which may be large.
__device__ __forceinline__ float capped(const KernelParams& p, float product) {
  const float x = product * p.cap_scale;
  constexpr float kHalf = kLn2 / 2;
  const float series = x * fmaf(x * x, -kHalf * kHalf * kHalf / 3, kHalf);
  return fabsf(x) < 0.0625f ? series : 1 - __fdividef(2.0f, 1 + exp2_approx(x));
}

// What a block has that not all rows see, with keys counted from the block's first. `kWindowed`:
// there may be a sliding window.
template <bool kWindowed>
struct BlockView {
  int left;    // keys from here to the sequence's end
  bool whole;  // all rows see all of it
  int unseen;  // so many keys no row sees, since the window begins behind them

  __device__ BlockView(const KernelParams& p, const Item& item, int block)
      : left(item.length - block * kBlock),
        whole(left - p.most_hidden >= kBlock && (!kWindowed || left <= p.window)),
        unseen(kWindowed ? left - p.most_hidden - p.window : 0) {}

  // Whether a row sees a key: one comparison, since several cost time where every block has some.
  __device__ bool seen(const KernelParams& p, int key, int hidden) const {
    if constexpr (!kWindowed) return key < left - hidden;
    const int from = left - hidden - p.window;
    return static_cast<unsigned>(key - from) < static_cast<unsigned>(p.window);
  }
};

// Where the log-sum-exp of a row goes: natural in a result, base 2 in a partial one.
__device__ __forceinline__ float* lse_target(const KernelParams& p, const Work& work,
                                             const Item& item, int row) {
  if (item.slot >= 0) {
    const int64_t tile = partial_tile(p, work, item, row / kPartialRows);
    return p.partial_stats + tile * kPartialStats + row % kPartialRows;
  }
  int token, head;
  p.by_heads_per_kv(token, head, row);
  const int64_t row_head =
      (work.first_seq + wide(item.seq)) * wide(p.h_q) + wide(work.head * p.heads_per_kv() + head);
  return p.lse + row_head * wide(p.s_q) + wide(token);
}

// A log-sum-exp of base 2 as its target has it.
__device__ __forceinline__ float stored_lse(const Item& item, float lse) {
  return item.slot < 0 ? lse * kLn2 : lse;
}

}  // namespace jax_flashmla
