// The products of the split kernel for FP8 caches: how queries get into registers, what they and
// the weights are multiplied with.
#pragma once

#include "cuda/decode_fp8_shared.cuh"

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
  // Of four vectors of 16 e4m3, and one of the rotary columns.
  static constexpr int kGroups = kFp8Tiles * 2 + 1;
  float4 sums[2] = {};  // products that do not wait for each other
  float4 scaled = {};   // of fp8_block: the tiles so far, times their scales

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

}  // namespace jax_flashmla
