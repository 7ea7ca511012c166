#include <cutlass/fast_math.h>

#include "cuda/block_scan.cuh"
#include "cuda/plan.h"

namespace jax_flashmla {
namespace {

// What a partition gains if equal sequences are split into equal pieces, in blocks.
constexpr int kEvenGainBlocks = 1;

// What the host can divide.
struct Quotients {
  cutlass::FastDivmod by_num_parts;
  cutlass::FastDivmod by_min_split_blocks;
  int seqs_of_part;
  int parts_of_seq;

  explicit Quotients(const PlanParams& p)
      : by_num_parts(p.num_parts),
        by_min_split_blocks(p.min_split_blocks),
        seqs_of_part((p.batch + p.num_parts - 1) / p.num_parts),
        parts_of_seq(p.batch > 0 ? p.num_parts / p.batch : 0) {}
};

// A sequence on the line of all work: `overhead` units, then one unit per block; 1 unit if empty.
struct Interval {
  int start;
  int blocks;
  int extent;
};

// Divides often by one number.
struct Divider {
  int divisor;
  float inverse;
  __device__ explicit Divider(int d) : divisor(d) { inverse = __fdividef(1, d); }
  __device__ __forceinline__ int estimate(int x) const {
    return __float2int_rd(static_cast<float>(x) * inverse);
  }
  // Two estimates, since the first is off by some 2^-21 of a large quotient.
  __device__ __forceinline__ int divide(int x) const {
    int quotient = estimate(x);
    quotient += estimate(x - quotient * divisor);
    const int rest = x - quotient * divisor;
    return quotient + (rest >= divisor) - (rest < 0);
  }
};

// Where a cut falls: before block `block` of sequence `seq`, which starts its split `split`.
struct Position {
  int seq;
  int block;
  int split;
};

__device__ __forceinline__ Interval interval_at(const PlanParams& p, const int32_t* seqlens,
                                                int seq, int start) {
  const int length = max(seqlens[seq], 0);
  // No `length + 63`, which overflows for lengths near 2^31.
  const int blocks = min(length / kBlockTokens + (length % kBlockTokens > 0 ? 1 : 0), p.max_blocks);
  return {start, blocks, blocks > 0 ? blocks + p.overhead_blocks : 1};
}

// The first and last point at which a cut leaves `min_split_blocks` of the sequence on both sides.
__device__ __forceinline__ int first_inner_point(const PlanParams& p, const Interval& s) {
  return s.start + p.overhead_blocks + p.min_split_blocks;
}
__device__ __forceinline__ int last_inner_point(const PlanParams& p, const Interval& s) {
  return s.start + p.overhead_blocks + s.blocks - p.min_split_blocks;
}

__device__ __forceinline__ int count_splits(const PlanParams& p, const Interval& s,
                                            const Divider& part_length) {
  if (s.blocks == 0) return 0;
  const int first = first_inner_point(p, s);
  const int last = last_inner_point(p, s);
  return last < first ? 1 : 1 + part_length.divide(last) - part_length.divide(first - 1);
}

// Finds the sequence that cut number `cut` falls into, and moves the cut off its ends.
// `chunk_starts[i]`: where the line of thread i's sequences starts, `per_thread` sequences each.
template <int kThreads>
__device__ Position locate_cut(const PlanParams& p, const int32_t* seqlens, const int* chunk_starts,
                               int per_thread, int total, const Divider& part_length, int cut) {
  const int x = cut * part_length.divisor;
  if (x >= total) return {p.batch, 0, 0};
  int chunk = 0;  // the last one that starts at or before x
#pragma unroll
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (chunk_starts[chunk + step] <= x) chunk += step;
  }
  int seq = chunk * per_thread;
  Interval s = interval_at(p, seqlens, seq, chunk_starts[chunk]);
  while (s.start + s.extent <= x) {
    ++seq;
    s = interval_at(p, seqlens, seq, s.start + s.extent);
  }
  const int block = x - s.start - p.overhead_blocks;
  if (s.blocks == 0 || block < min(p.min_split_blocks, (s.blocks + 1) / 2)) return {seq, 0, 0};
  const int first = first_inner_point(p, s);
  if (x < first || x > last_inner_point(p, s)) return {seq + 1, 0, 0};
  return {seq, block, cut - part_length.divide(first - 1)};
}

// The cuts where all sequences have the same number of blocks.
struct EvenCuts {
  int per_part;    // sequences of a partition, if there are more of them than partitions
  Divider pieces;  // of a sequence
  int size;        // blocks of a piece; the first `longer` have one more
  int longer;

  __device__ EvenCuts(const PlanParams& p, const Quotients& known, int blocks)
      : per_part(known.seqs_of_part),
        pieces(max(min(known.by_min_split_blocks.div(blocks), known.parts_of_seq), 1)),
        size(pieces.divide(blocks)),
        longer(blocks - size * pieces.divisor) {}

  // Whether they are better than cuts that ignore where sequences end.
  __device__ bool worthwhile(const PlanParams& p, int part_length) const {
    const int cost = per_part * (size + (longer > 0) + p.overhead_blocks);
    const int gain = pieces.divisor == 1 ? p.split_cost_blocks : kEvenGainBlocks;
    return size > 0 && cost <= part_length + p.overhead_blocks + gain;
  }

  __device__ Position locate(const PlanParams& p, int cut) const {
    const int number = cut * per_part;
    const int seq = pieces.divide(number);
    if (seq >= p.batch) return {p.batch, 0, 0};
    const int split = number - seq * pieces.divisor;
    return {seq, split * size + min(split, longer), split};
  }
};

// One thread block per group; thread t owns `per_thread` consecutive sequences.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) plan_kernel(PlanParams p, Quotients known) {
  __shared__ int chunk_starts[kThreads];
  __shared__ int scan_scratch[kThreads / 32];

  const int thread = threadIdx.x;
  const int64_t group = blockIdx.x;
  const int32_t* seqlens = p.cache_seqlens + group * p.batch;
  int32_t* num_splits = p.num_splits + group * (p.batch + 1);
  int32_t* metadata = p.tile_scheduler_metadata + group * p.num_parts * kMetadataColumns;

  // A cut ends one partition and begins the next.
  const auto write_cuts = [&](const auto& locate) {
    for (int cut = thread; cut <= p.num_parts; cut += kThreads) {
      const Position at = locate(cut);
      int32_t* const part = metadata + int64_t{cut} * kMetadataColumns;
      const int2 point = make_int2(at.seq, at.block);
      if (cut > 0) reinterpret_cast<int2*>(part - kMetadataColumns)[1] = point;
      if (cut == p.num_parts) continue;
      reinterpret_cast<int2*>(part)[0] = point;
      reinterpret_cast<int4*>(part)[1] = make_int4(at.split, 0, 0, 0);
    }
  };

  const int per_thread = (p.batch + kThreads - 1) / kThreads;
  const int first_seq = min(thread * per_thread, p.batch);
  const int last_seq = min(first_seq + per_thread, p.batch);

  const int first_blocks = p.batch > 0 ? interval_at(p, seqlens, 0, 0).blocks : 0;
  int extent = 0;
  bool equal = true;
  for (int seq = first_seq; seq < last_seq; ++seq) {
    const Interval s = interval_at(p, seqlens, seq, 0);
    extent += s.extent;
    equal = equal && s.blocks == first_blocks;
  }
  const auto line = exclusive_scan<kThreads>(extent, scan_scratch);
  chunk_starts[thread] = line.before;
  const int share = known.by_num_parts.div(line.total + p.num_parts - 1);
  const Divider part_length(max(share, p.min_split_blocks));

  if (__syncthreads_and(equal) && p.batch > 0) {
    const EvenCuts cuts(p, known, first_blocks);
    if (cuts.worthwhile(p, part_length.divisor)) {
      for (int seq = thread; seq <= p.batch; seq += kThreads)
        num_splits[seq] = seq * cuts.pieces.divisor;
      write_cuts([&](int cut) { return cuts.locate(p, cut); });
      return;
    }
  }

  int splits = 0;
  for (int seq = first_seq, start = line.before; seq < last_seq; ++seq) {
    const Interval s = interval_at(p, seqlens, seq, start);
    splits += count_splits(p, s, part_length);
    start += s.extent;
  }
  // Its barriers also make chunk_starts visible to all.
  const auto slots = exclusive_scan<kThreads>(splits, scan_scratch);
  int slot = slots.before;
  for (int seq = first_seq, start = line.before; seq < last_seq; ++seq) {
    const Interval s = interval_at(p, seqlens, seq, start);
    num_splits[seq] = slot;
    slot += count_splits(p, s, part_length);
    start += s.extent;
  }
  if (thread == 0) num_splits[p.batch] = slots.total;

  write_cuts([&](int cut) {
    return locate_cut<kThreads>(p, seqlens, chunk_starts, per_thread, line.total, part_length, cut);
  });
}

}  // namespace

cudaError_t launch_plan(const PlanParams& params, cudaStream_t stream) {
  if (params.groups == 0) return cudaSuccess;
  // Few threads have cheaper barriers; many walk fewer sequences each.
  const bool few = params.batch <= 256;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(params.groups));
  config.blockDim = dim3(few ? 256 : 1024);
  config.stream = stream;
  // Its own error, where cudaGetLastError may have that of an earlier call.
  return cudaLaunchKernelEx(&config, few ? plan_kernel<256> : plan_kernel<1024>, params,
                            Quotients(params));
}

}  // namespace jax_flashmla
