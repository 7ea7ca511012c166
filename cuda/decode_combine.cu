// Combines the partial results of sequences that the plan split.
#include "cuda/decode_combine_few.cuh"
#include "cuda/decode_combine_many.cuh"

namespace jax_flashmla {
namespace {

// The tile that a unit of work is a slice of.
__device__ __forceinline__ Tile find_tile(const KernelParams& p,
                                          const cutlass::FastDivmod& by_slices, int unit,
                                          int& slice) {
  int tile_of_all, head_of_all, number, group_seq, kv_head;
  by_slices(tile_of_all, slice, unit);
  p.by_partial_tiles(head_of_all, number, tile_of_all);
  p.by_h_kv(group_seq, kv_head, head_of_all);
  return find_tile(p, p.by_batch.div(group_seq), group_seq, kv_head, number);
}

// Where most sequences have many splits: a CTA for each slice of each tile.
template <typename Element, typename S>
__global__ void __launch_bounds__(S::kThreads)
    combine_slices(const __grid_constant__ KernelParams p, cutlass::FastDivmod by_slices) {
  __shared__ ManyMemory<S> smem;
  int slice;
  const Tile tile = find_tile(p, by_slices, blockIdx.x, slice);
  combine_many<Element, S>(p, tile, slice, smem,
                           [&] { return leave_or_wait(p, tile.splits <= 1); });
}

// Where most have few: a CTA for a tile, or for a slice of it, unless it has many.
template <typename Element>
__device__ __forceinline__ void combine_tile(const KernelParams& p,
                                             const cutlass::FastDivmod& by_slices, int unit) {
  using S = FewSplits;
  int slice;
  const Tile tile = find_tile(p, by_slices, unit, slice);
  const int lane = threadIdx.x % 32;
  Target<Element> target[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) target[i] = find_target<Element>(p, tile, lane / 4 + 8 * i);
  if (leave_or_wait(p, tile.splits <= 1 || tile.splits > S::kMost)) return;
  for (int first = (slice * S::kWarps + threadIdx.x / 32) * S::kVectors; first < kPartialStrips;
       first += by_slices.divisor * S::kWarps * S::kVectors) {
    combine_few<Element>(tile, target, first, lane);
  }
}

// One sequence among them may be long. Its splits are in as many partitions, one after the other.
// So for every so-many-th partition there is a CTA for each tile, which has a share of the slices
// if a sequence with many splits goes on in that partition, and else leaves.
constexpr int kShareParts = 4;
static_assert(kShareParts <= FewSplits::kMost, "no sequence with many splits is missed");
using SharedSplits = ManySplits<FewSplits::kWarps, 4, 4>;

__host__ __device__ constexpr int shares_of_group(int num_parts) {
  return (num_parts + kShareParts - 1) / kShareParts;
}

template <typename Element>
__device__ __forceinline__ void combine_share(const KernelParams& p, int unit) {
  using S = SharedSplits;
  __shared__ ManyMemory<S> smem;
  int head_of_all, number, share_of_all, kv_head;
  p.by_partial_tiles(head_of_all, number, unit);
  p.by_h_kv(share_of_all, kv_head, head_of_all);
  const int shares = shares_of_group(p.num_parts);
  const int group = share_of_all / shares;
  const int share = share_of_all % shares;
  const int part = share * kShareParts;
  const int32_t* const plan =
      p.tile_scheduler_metadata + (int64_t{group} * p.num_parts + part) * kMetadataColumns;
  const int seq = min(max(plan[0], 0), p.batch - 1);
  const int split = plan[4];
  const Tile tile = find_tile(p, group, int64_t{group} * p.batch + seq, kv_head, number);
  const int first_part = part - split;  // in which the sequence begins
  const bool goes_on = split > 0 && split < tile.splits && first_part >= 0;
  if (leave_or_wait(p, !goes_on || tile.splits <= FewSplits::kMost)) return;
  const int first = first_part / kShareParts + 1;
  const int last = min(first_part + tile.splits - 1, p.num_parts - 1) / kShareParts;
#pragma unroll 1
  for (int slice = share - first; slice < S::kSlices; slice += last - first + 1) {
    combine_many<Element, S>(p, tile, slice, smem, [] { return false; });
  }
}

// The first `shares` CTAs have the longest work, if they have any.
template <typename Element>
__global__ void __launch_bounds__(FewSplits::kThreads)
    combine_tiles(const __grid_constant__ KernelParams p, cutlass::FastDivmod by_slices,
                  int shares) {
  const int unit = static_cast<int>(blockIdx.x);
  if (unit < shares) {
    combine_share<Element>(p, unit);
  } else {
    combine_tile<Element>(p, by_slices, unit - shares);
  }
}

template <typename Element>
cudaError_t launch_for_splits(const DecodeParams& p, cudaStream_t stream) {
  const int64_t tiles_of_seq = int64_t{p.h_kv} * p.partial_tiles();
  const int64_t tiles = int64_t{p.groups} * p.batch * tiles_of_seq;
  const auto launch_slices = [&](auto shape) {
    using S = decltype(shape);
    return launch_dependent<combine_slices<Element, S>>(
        {.ctas = tiles * S::kSlices, .threads = S::kThreads}, stream, p,
        cutlass::FastDivmod(S::kSlices));
  };
  // Splits of a sequence, if the batch shares the partitions evenly. With many, a tile is work for
  // several CTAs; with few, there are many tiles, most of which are whole and only cost their CTA.
  const int splits = (p.num_parts + p.batch - 1) / p.batch;
  if (splits > FewSplits::kMost) {
    return tiles <= 4 ? launch_slices(ManySplits<8, 1, 18>{})
                      : launch_slices(ManySplits<8, 4, 4>{});
  }
  const int slices = tiles > 256 ? 1 : FewSplits::kSlices;
  const int64_t shares = int64_t{p.groups} * shares_of_group(p.num_parts) * tiles_of_seq;
  return launch_dependent<combine_tiles<Element>>(
      {.ctas = shares + tiles * slices, .threads = FewSplits::kThreads}, stream, p,
      cutlass::FastDivmod(slices), static_cast<int>(shares));
}

}  // namespace

cudaError_t launch_combine(const DecodeParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? launch_for_splits<__nv_bfloat16>(p, stream)
                                     : launch_for_splits<__half>(p, stream);
}

}  // namespace jax_flashmla
