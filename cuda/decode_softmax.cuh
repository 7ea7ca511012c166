// What the softmax of both split kernels shares.
#pragma once

#include <cfloat>

#include "cuda/decode_shared.cuh"

namespace jax_flashmla {

inline constexpr float kLog2E = 1.4426950408889634f;
// The maximum that weights are relative to may lag behind the true one by this much, base 2: the
// output is then rarely rescaled, and weights stay below 2^8 (the idea is FlashAttention-4's).
inline constexpr float kMaxLag = 8;

// 2^x in one instruction; results below 2^-126 become zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Where the log-sum-exp of a row goes: natural in a result, base 2 in a partial one.
__device__ __forceinline__ float* lse_target(const KernelParams& p, const Work& work,
                                             const Item& item, int row) {
  if (item.slot >= 0) {
    return p.partial_lse + partial_tile(p, work, item, 0) * kPartialRows + row;
  }
  int token, head;
  p.by_heads_per_kv(token, head, row);
  const int64_t row_head =
      (work.first_seq + item.seq) * p.h_q + work.head * p.heads_per_kv() + head;
  return p.lse + row_head * p.s_q + token;
}

// A log-sum-exp of base 2 as its target has it.
__device__ __forceinline__ float stored_lse(const Item& item, float lse) {
  return item.slot < 0 ? lse * kLn2 : lse;
}

}  // namespace jax_flashmla
