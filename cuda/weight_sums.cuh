// What becomes of the sum of a row's weights.
#pragma once

#include <cmath>

namespace jax_flashmla {

// Of weights that are relative to `base` and have the sum `total`, base 2.
__device__ __forceinline__ float log_sum_exp(float base, float total) {
  return total == 0 ? -INFINITY : base + __log2f(total);
}

// What results are to be multiplied with: `numerator` over the sum of their weights.
__device__ __forceinline__ float over_total(float total, float numerator = 1) {
  return total == 0 ? 0 : __fdividef(numerator, total);
}

}  // namespace jax_flashmla
