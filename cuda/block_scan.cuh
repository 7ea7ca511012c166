// Prefix sum over the threads of a block.
#pragma once

namespace jax_flashmla {

struct ScanResult {
  int before;  // sum over the threads before this one
  int total;   // sum over all threads
};

// Every thread calls it with its value; `scratch` holds one int per warp in shared memory and may
// be reused by the next call. Contains two barriers.
template <int kThreads>
__device__ __forceinline__ ScanResult exclusive_scan(int value, int* scratch) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "one warp sums up the warps");
  constexpr unsigned kAllLanes = 0xffffffffu;
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  int inclusive = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += below;
  }
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();

  // Every warp scans the warps' sums for itself: cheaper than a round through shared memory.
  int warps = lane < kWarps ? scratch[lane] : 0;
#pragma unroll
  for (int distance = 1; distance < kWarps; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, warps, distance);
    if (lane >= distance) warps += below;
  }
  const int total = __shfl_sync(kAllLanes, warps, kWarps - 1);
  const int warps_before = __shfl_sync(kAllLanes, warps, warp == 0 ? 0 : warp - 1);
  __syncthreads();  // scratch may be written again
  return {(warp == 0 ? 0 : warps_before) + inclusive - value, total};
}

}  // namespace jax_flashmla
