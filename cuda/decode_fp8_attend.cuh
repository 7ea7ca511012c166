// The warps of the split kernel for FP8 caches that multiply. A block goes the way of the narrow
// kernel; see decode_narrow_attend.cuh.
#pragma once

#include "cuda/decode_fp8_shared.cuh"
#include "cuda/decode_softmax.cuh"
#include "cuda/decode_store.cuh"

namespace jax_flashmla {

// Writes two rows of an item's queries to shared memory, for all warps. Those that meet e4m3 become
// 16-bit floats, divided by a power of two such that none is lost: what is smaller than 2^-24 of a
// row's largest value is.
template <KeyFormat kFormat, typename Element>
__device__ __forceinline__ void write_queries(const KernelParams& p,
                                              Fp8Memory<kFormat, Element>& smem, const Work& work,
                                              int seq, int warp, int lane) {
  keep_nothing_of(lane);
  constexpr bool kRopeToo = kFormat == KeyFormat::kFp8PerTensor;
  constexpr int kPairs = kHeadDim / 2 / 32;  // of columns, a lane's; the last is rotary
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp + kMathWarps * i;
    const int of_all = work.tile * kNarrowRows + row;
    uint32_t pairs[kPairs] = {};
    if (of_all < p.num_rows()) {
      const int64_t index = query_index(p, work, seq, of_all);
      const auto* nope = static_cast<const uint16_t*>(p.q_nope) + index * p.q_nope_stride;
      const auto* rope = static_cast<const uint16_t*>(p.q_rope) + index * p.q_rope_stride;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const uint16_t* from = j == kPairs - 1 ? rope + lane * 2 : nope + (j * 32 + lane) * 2;
        pairs[j] = *reinterpret_cast<const uint32_t*>(from);
      }
    }
    float scale = 1;
    if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
      uint32_t top = 0;
#pragma unroll
      for (int j = 0; j < kPairs - !kRopeToo; ++j) top = __vmaxu2(top, pairs[j] & 0x7fff7fffu);
      top = max(top & 0xffff, top >> 16);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        top = max(top, __shfl_xor_sync(0xffffffffu, top, step));
      }
      // The largest value becomes one from 2^14 on. Infinities stay what they are.
      const int exponent = min(max(static_cast<int>(top >> 7), 15), 254) - 141;
      const float factor = __int_as_float((127 - exponent) << 23);
      scale = __int_as_float((127 + exponent) << 23);
#pragma unroll
      for (int j = 0; j < kPairs - !kRopeToo; ++j) {
        const float first = __uint_as_float(pairs[j] << 16) * factor;
        const float second = __uint_as_float(pairs[j] & 0xffff0000u) * factor;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pairs[j]) : "f"(second), "f"(first));
      }
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      *reinterpret_cast<uint32_t*>(&smem.q[row][(j * 32 + lane) * 2]) = pairs[j];
    }
    if (lane == 0) smem.q_scale[row] = scale;
  }
}

// The queries that meet e4m3, as the operand A of a step: a vector of 16 columns of which a thread
// has the same four of every row and of the keys.
template <KeyFormat kFormat, typename Element>
__device__ __forceinline__ void read_step_queries(const Fp8Memory<kFormat, Element>& smem, int step,
                                                  int lane, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint16_t* row = &smem.q[lane / 4 + 8 * i][step * 16 + lane % 4 * 4];
    const uint2 four = *reinterpret_cast<const uint2*>(row);
    a[i] = four.x;
    a[i + 2] = four.y;
  }
}

// What a warp keeps of them in its registers; of fp8_block, which needs more for the rest, not all.
template <KeyFormat kFormat>
inline constexpr int kFirstKept = kFormat == KeyFormat::kFp8PerTensor ? 0 : 8;
template <KeyFormat kFormat, typename Element>
__device__ __forceinline__ void read_queries(const Fp8Memory<kFormat, Element>& smem, int lane,
                                             Queries& q) {
  constexpr int kEnd = kFormat == KeyFormat::kFp8PerTensor ? kTiles * 4 : kValueTiles * 4;
#pragma unroll
  for (int step = kFirstKept<kFormat>; step < kEnd; ++step) {
    read_step_queries(smem, step, lane, q.a[step]);
  }
}

// Of the others, a step's.
template <KeyFormat kFormat, typename Element>
__device__ __forceinline__ void read_rope_queries(const Fp8Memory<kFormat, Element>& smem, int step,
                                                  int lane, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = kLatentDim + step * 16 + lane % 4 * 2 + i / 2 * 8;
    a[i] = *reinterpret_cast<const uint32_t*>(&smem.q[lane / 4 + i % 2 * 8][column]);
  }
}

__device__ __forceinline__ float4 operator+(const float4& x, const float4& y) {
  return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
}

// The products of a block: of all rows with the warp's eight keys, group after group of columns. A
// thread has two rows and two keys.
template <KeyFormat kFormat, typename Element>
struct Products {
  static constexpr int kGroups =
      kFp8Tiles * 2 + 1;  // of four vectors of 16 e4m3, or the rotary columns
  float4 sums[2] = {};    // products that do not wait for each other
  float4 scaled = {};     // of fp8_block: the tiles so far, times their scales

  __device__ __forceinline__ void add_vectors(Fp8Memory<kFormat, Element>& smem, uint8_t* tile,
                                              int pair, int step, int warp, int lane,
                                              const Queries& q) {
    uint32_t raw[2][2];
    read_keys(tile, warp * kWarpKeys, pair, lane, raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4], b[2];
      if (step + i < kFirstKept<kFormat>) {
        read_step_queries(smem, step + i, lane, a);
      } else {
#pragma unroll
        for (int word = 0; word < 4; ++word) a[word] = q.a[step + i][word];
      }
      widen(raw[i / 2][i % 2], b[0], b[1]);
      multiply_add<cutlass::half_t>(sums[i % 2], a, b);
    }
  }

  __device__ __forceinline__ void add_rope(Fp8Memory<kFormat, Element>& smem, uint8_t* tile,
                                           int warp, int lane) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t raw[2][2];
      read_keys(tile, warp * kWarpKeys, pair, lane, raw);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t a[4];
        read_rope_queries(smem, pair * 2 + i, lane, a);
        const uint32_t b[2] = {as_element<Element>(raw[i][0]), as_element<Element>(raw[i][1])};
        multiply_add<Element>(sums[i], a, b);
      }
    }
  }

  __device__ __forceinline__ void add_group(Fp8Memory<kFormat, Element>& smem, int slot, int group,
                                            int warp, int lane, const Queries& q) {
    auto& block = smem.blocks[slot];
    if (group < kFp8Tiles * 2) {
      add_vectors(smem, block.latent[group / 2], group % 2, group * 4, warp, lane, q);
    } else if constexpr (kFormat == KeyFormat::kFp8PerTensor) {
      add_vectors(smem, block.rope, 0, kValueTiles * 4, warp, lane, q);
    } else {
      add_rope(smem, block.rope, warp, lane);
    }
    if constexpr (kFormat == KeyFormat::kFp8Block) {
      if (group % 2 == 0) return;
      const float4* of_keys = &block.scales[warp * kWarpKeys + lane % 4 * 2];
      const float first = reinterpret_cast<const float*>(of_keys)[group / 2];
      const float second = reinterpret_cast<const float*>(of_keys + 1)[group / 2];
      const float4 sum = sums[0] + sums[1];
      scaled = scaled + make_float4(sum.x * first, sum.y * second, sum.z * first, sum.w * second);
      sums[0] = sums[1] = {};
    }
  }

  // What queries were divided by, of two rows, times the cache's scale.
  __device__ __forceinline__ float4 total(const float (&q_scale)[2]) const {
    const float4 sum = sums[0] + sums[1];
    const auto product = [&](float e4m3, float rope, int row) {
      return kFormat == KeyFormat::kFp8PerTensor ? rope * q_scale[row]
                                                 : fmaf(e4m3, q_scale[row], rope);
    };
    return make_float4(product(scaled.x, sum.x, 0), product(scaled.y, sum.y, 0),
                       product(scaled.z, sum.z, 1), product(scaled.w, sum.w, 1));
  }
};

// A part of O += P V for the warp's 64 value columns: 32 of them, 16 keys. Of a vector of 16
// columns, out[2 i] has the even ones and out[2 i + 1] the odd ones: a thread has four neighbours.
inline constexpr int kValueGroups = kBlock / 16 * 2;
template <KeyFormat kFormat>
__device__ __forceinline__ void add_values(uint8_t* tile, int first_vector,
                                           Weight<kFormat>* weights, int group, int lane,
                                           float4 (&out)[8]) {
  const int step = group / 2, pair = group % 2;
  uint32_t a[4], raw[2][2];
  read_rows(weights, step, lane, a);
  read_values(tile, step, first_vector / 2 + pair, lane, raw);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t even[2], odd[2];
    widen_bytes<kFormat>(raw[i][0], even[0], odd[0]);
    widen_bytes<kFormat>(raw[i][1], even[1], odd[1]);
    multiply_add<Weight<kFormat>>(out[pair * 4 + i * 2], a, even);
    multiply_add<Weight<kFormat>>(out[pair * 4 + i * 2 + 1], a, odd);
  }
}

// The products of a block beside the values of the one before: neither has to wait for itself.
template <bool kProducts, bool kValues, KeyFormat kFormat, typename Element>
__device__ __forceinline__ void multiply(Fp8Memory<kFormat, Element>& smem, int slot, int before,
                                         int warp, int lane, const Queries& q,
                                         Products<kFormat, Element>& products, float4 (&out)[8]) {
  static_assert(kValueGroups < Products<kFormat, Element>::kGroups);
  auto* const weights = smem.weights[smem.kWeights == 1 ? 0 : warp / 2];
#pragma unroll
  for (int group = 0; group < products.kGroups; ++group) {
    if constexpr (kProducts) products.add_group(smem, slot, group, warp, lane, q);
    if (kValues && group < kValueGroups) {
      add_values<kFormat>(smem.blocks[before].latent[warp / 2], warp % 2 * 4, weights, group, lane,
                          out);
    }
  }
}

// Writes a warp's 64 columns: see `write_output`, whose order of partial results it keeps. `row`:
// the first of all of the KV head.
template <typename Element>
__device__ __forceinline__ void write_fp8_output(const KernelParams& p, const Work& work,
                                                 const Item& item, int row, int warp, int lane,
                                                 const float4 (&out)[8]) {
  keep_nothing_of(lane);
  if (item.slot == Item::kEmpty) return;
  const int column = warp * 64 + lane % 4 * 4;
  if (item.slot >= 0) {
    // Lane, then the next one, of the tile of eight columns that the first of the four is in.
    float4* const partial =
        reinterpret_cast<float4*>(p.partial_out) +
        (partial_tile(p, work, item, work.tile) * (kLatentDim / kPartialColumns) +
         column / kPartialColumns) *
            32 +
        lane / 4 * 4 + column % kPartialColumns / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 even = out[2 * i], odd = out[2 * i + 1];
      partial[i * 64] = make_float4(even.x, odd.x, even.z, odd.z);
      partial[i * 64 + 1] = make_float4(even.y, odd.y, even.w, odd.w);
    }
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int my_row = row + lane / 4 + 8 * half;
    if (my_row >= p.num_rows()) return;
    Element* const target =
        static_cast<Element*>(p.out) + query_index(p, work, item.seq, my_row) * kLatentDim + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 even = out[2 * i], odd = out[2 * i + 1];
      const Element four[4] = {
          Element(half == 0 ? even.x : even.z), Element(half == 0 ? odd.x : odd.z),
          Element(half == 0 ? even.y : even.w), Element(half == 0 ? odd.y : odd.w)};
      *reinterpret_cast<uint2*>(target + i * 16) = *reinterpret_cast<const uint2*>(four);
    }
  }
}

// Writes the weights of a row and of two neighbouring keys of a block; of fp8_block for each tile
// of the values, times its scale of the key.
template <KeyFormat kFormat, typename Element>
__device__ __forceinline__ void write_weights(Fp8Memory<kFormat, Element>& smem,
                                              const float4* scales, int row, int warp, int column,
                                              const float (&weights)[2]) {
#pragma unroll
  for (int tile = 0; tile < smem.kWeights; ++tile) {
    float scaled[2] = {weights[0], weights[1]};
    if constexpr (kFormat == KeyFormat::kFp8Block) {
      const float4* of_keys = &scales[warp * kWarpKeys + column];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        scaled[k] *= reinterpret_cast<const float*>(of_keys + k)[tile] * kWeightScale;
      }
    }
    const Weight<kFormat> pair[2] = {Weight<kFormat>(scaled[0]), Weight<kFormat>(scaled[1])};
    auto* target = reinterpret_cast<Weight<kFormat>*>(&vector_at(smem.weights[tile], row, warp));
    *reinterpret_cast<uint32_t*>(target + column) = *reinterpret_cast<const uint32_t*>(pair);
  }
}

__device__ __forceinline__ void write_fp8_lse(const KernelParams& p, const Work& work,
                                              const Item& item, int first_row, int lane,
                                              const float (&max)[2], const float (&sum)[2]) {
  keep_nothing_of(lane);
  if (item.slot == Item::kEmpty || lane % 4 != 0) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + lane / 4 + 8 * i;
    if (row >= p.num_rows()) return;
    const float value = sum[i] == 0 ? -INFINITY : max[i] + __log2f(sum[i]);
    *lse_target(p, work, item, row) = stored_lse(item, value);
  }
}

template <KeyFormat kFormat, typename Element>
__device__ __forceinline__ void attend_fp8(const KernelParams& p, Fp8Memory<kFormat, Element>& smem,
                                           int warp, int lane) {
  const auto larger = [](float x, float y) { return fmaxf(x, y); };
  const auto add = [](float x, float y) { return x + y; };
  const Work& work = smem.work;
  const Quad quad(lane);
  const int first_row = work.tile * kNarrowRows;
  Ring<kFp8Slots> slot;
#pragma unroll 1
  for (int seq = work.begin_seq; has_item(work, seq); ++seq) {
    const Item item = find_item<true>(p, work, seq);
    float max[2] = {-FLT_MAX, -FLT_MAX};
    float sum[2] = {0, 0};
    float4 out[8] = {};
    if (item.blocks() > 0) {
      Queries q;
      float q_scale[2];
      write_queries(p, smem, work, seq, warp, lane);
      sync_math();
      read_queries(smem, lane, q);
      const float scale = kFormat == KeyFormat::kFp8PerTensor ? p.k_scale[work.group] : 1;
#pragma unroll
      for (int i = 0; i < 2; ++i) q_scale[i] = smem.q_scale[quad.row + 8 * i] * scale;
      int before = 0;
#pragma unroll 1
      for (int number = item.first; number < item.last; ++number) {
        smem.full[slot.slot].wait(slot.parity);
        Products<kFormat, Element> products;
        if (number == item.first) {
          multiply<true, false>(smem, slot.slot, 0, warp, lane, q, products, out);
        } else {
          multiply<true, true>(smem, slot.slot, before, warp, lane, q, products, out);
          __syncwarp();
          release<1>(smem.empty[before], lane);
        }
        before = slot.slot;
        slot.advance();
        float4 raw = products.total(q_scale);
        if (p.cap_scale != 0)
          raw = {capped(p, raw.x), capped(p, raw.y), capped(p, raw.z), capped(p, raw.w)};
        float scores[2][2] = {{raw.x, raw.y}, {raw.z, raw.w}};
        const BlockView<true> view(p, item, number);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int key = warp * kWarpKeys + quad.column + j;
            bool seen = view.whole;
            if (!seen) {
              const int token = p.by_heads_per_kv.div(first_row + quad.row + 8 * i);
              seen = view.seen(p, key, hidden_keys(p, token));
            }
            scores[i][j] = seen ? scores[i][j] * p.score_scale : -INFINITY;
          }
          const float top = reduce_quad(fmaxf(scores[i][0], scores[i][1]), larger);
          if (lane % 4 == 0) smem.maxima[quad.row + 8 * i][warp] = top;
        }
        sync_math();  // so the weights of the block before have been read, too
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = quad.row + 8 * i;
          const float top = reduce_eight(smem.maxima[row], larger);
          const float base = top > max[i] + kMaxLag ? top : max[i];
          factor[i] = exp2_approx(max[i] - base);
          max[i] = base;
          const float weights[2] = {exp2_approx(scores[i][0] - base),
                                    exp2_approx(scores[i][1] - base)};
          sum[i] = sum[i] * factor[i] + weights[0] + weights[1];
          write_weights(smem, smem.blocks[before].scales, row, warp, quad.column, weights);
          smem.sums[row][warp * 4 + lane % 4] = sum[i];
        }
        // The output is still zero before the first block.
        const bool rescale = factor[0] != 1 || factor[1] != 1;
        if (number > item.first && __any_sync(0xffffffffu, rescale)) scale_rows(out, factor);
        sync_math();
      }
      Products<kFormat, Element> none;
      multiply<false, true>(smem, 0, before, warp, lane, q, none, out);
      __syncwarp();
      release<1>(smem.empty[before], lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sum[i] = reduce_quad(reduce_eight(smem.sums[quad.row + 8 * i] + lane % 4 * 8, add), add);
      }
    }
    const float value_scale = kFormat == KeyFormat::kFp8Block ? kValueScale : p.k_scale[work.group];
    const auto inverse = [&](float x) { return x == 0 ? 0 : __fdividef(value_scale, x); };
    scale_rows(out, {inverse(sum[0]), inverse(sum[1])});
    write_fp8_output<Element>(p, work, item, first_row, warp, lane, out);
    if (warp == 0) write_fp8_lse(p, work, item, first_row, lane, max, sum);
  }
}

}  // namespace jax_flashmla
