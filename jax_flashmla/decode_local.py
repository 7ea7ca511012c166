"""The inner decode primitive: one device's operands, one group axis, a lowering per platform."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import cache_layout, decode_xla, native, partition
from jax_flashmla.arguments import LATENT_DIM
from jax_flashmla.metadata import get_mla_metadata
from jax_flashmla.primitive import define_primitive, lower_as_jax, result_aval

PARTIAL_ROWS = 16  # the kernels' partial results are in tiles of so many query rows
PARTIAL_STATS = PARTIAL_ROWS + LATENT_DIM // 8  # of each: log-sum-exps, scales of columns


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """The static parameter of the decode primitives."""

    softmax_scale: float
    causal: bool
    sliding_window: int | None
    logits_soft_cap: float | None
    split_q: bool  # q is the pair (q_nope, q_rope)
    scaled: bool  # there is a k_scale
    paged: bool  # there is a block_table
    planned: bool  # the metadata are the last two operands
    implementation: str | None

    def split_operands(self, operands):
        """Returns `(q parts, (k_cache, k_scale, block_table, cache_seqlens), metadata)`.

        `None` for a k_scale or block_table that is not there.
        """
        num_q = 2 if self.split_q else 1
        q, k_cache, rest = operands[:num_q], operands[num_q], operands[num_q + 1 :]
        k_scale, rest = (rest[0], rest[1:]) if self.scaled else (None, rest)
        block_table, rest = (rest[0], rest[1:]) if self.paged else (None, rest)
        return q, (k_cache, k_scale, block_table, rest[0]), rest[1:]


def result_types(q):
    """Shapes and dtypes of out and lse."""
    *leading, s_q, h_q, _ = q.shape
    out = (*leading, s_q, h_q, LATENT_DIM), q.dtype
    return out, ((*leading, h_q, s_q), jnp.dtype(jnp.float32))


def decode_abstract(*operands, config, devices=None):
    """The results of both decode primitives."""
    del devices
    specs = None, None
    if partition.is_sharded(operands):
        q, rest, _ = config.split_operands(operands)
        divided = partition.decode_specs(q, *rest)
        specs = divided.out, divided.lse
    types = result_types(operands[0])
    return [result_aval(operands, *t, spec) for t, spec in zip(types, specs, strict=True)]


def _decode_local_xla(*operands, config, walk):
    """One pool out of all groups' pools, one batch out of all groups' batches."""
    q, (k_cache, k_scale, block_table, cache_seqlens), _ = config.split_operands(operands)
    groups, num_blocks = k_cache.shape[:2]
    batch = cache_seqlens.shape[1]
    first_page = jnp.arange(groups, dtype=jnp.int32)[:, None, None] * num_blocks
    in_pool = (block_table >= 0) & (block_table < num_blocks)
    block_table = jnp.where(in_pool, block_table + first_page, -1)
    if k_scale is not None:
        k_scale = jnp.broadcast_to(k_scale[:, None], (groups, batch))
    out, lse = decode_xla.decode_xla(
        *(_merge_leading_axes(x) for x in (q, k_cache, k_scale, block_table, cache_seqlens)),
        softmax_scale=config.softmax_scale,
        causal=config.causal,
        sliding_window=config.sliding_window,
        logits_soft_cap=config.logits_soft_cap,
        walk=walk,
    )
    return out.reshape(groups, batch, *out.shape[1:]), lse.reshape(groups, batch, *lse.shape[1:])


def _merge_leading_axes(tree):
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)


def _xla_lowering(walk):
    lower = lower_as_jax(functools.partial(_decode_local_xla, walk=walk))

    def lowering(ctx, *operands, config):
        native.check_platforms(config.implementation, ctx.module_context.platforms)
        return lower(ctx, *operands, config=config)

    return lowering


def partial_types(slots, rows):
    """The kernels' buffers of partial results: outputs and what belongs to them (cuda/decode.h).

    Args:
      slots: the leading dimensions: (groups,) slots of `num_splits`, KV heads.
      rows: query tokens x heads per KV head.
    """
    tiles = -(-rows // PARTIAL_ROWS)
    return (
        jax.ShapeDtypeStruct((*slots, tiles, PARTIAL_ROWS * LATENT_DIM), jnp.float16),
        jax.ShapeDtypeStruct((*slots, tiles, PARTIAL_STATS), jnp.float32),
    )


def _decode_local_cuda(*operands, config):
    q, (k_cache, k_scale, block_table, cache_seqlens), metadata = config.split_operands(operands)
    k_cache, block_table = cache_layout.cut_for_kernel(k_cache, block_table)
    groups, batch, s_q, h_q, _ = q[0].shape
    h_kv = k_cache.shape[3]
    rows = s_q * h_q // h_kv
    if not metadata:
        metadata = get_mla_metadata(
            cache_seqlens,
            rows,
            h_kv,
            is_fp8_kvcache=k_cache.dtype != q[0].dtype,
            sliding_window=config.sliding_window,
        )
    slots = batch + metadata[0].shape[1]  # of partial results; one more than a plan can use
    call = jax.ffi.ffi_call(
        native.FFI_TARGETS["decode"],
        [
            *(jax.ShapeDtypeStruct(*result) for result in result_types(q[0])),
            *partial_types((groups, slots, h_kv), rows),
        ],
    )
    out, lse, *_workspace = call(
        q[0],
        q[-1],
        k_cache,
        jnp.zeros(0, jnp.float32) if k_scale is None else k_scale,
        block_table,
        cache_seqlens,
        *metadata,
        softmax_scale=np.float32(config.softmax_scale),
        logits_soft_cap=np.float32(config.logits_soft_cap or 0),
        sliding_window=np.int32(config.sliding_window or 0),
        causal=config.causal,
    )
    return out, lse


_accelerator_lowering = _xla_lowering(decode_xla.ACCELERATOR_WALK)
_kernel_lowering = lower_as_jax(_decode_local_cuda)


def _cuda_lowering(ctx, *operands, config):
    chosen = native.chosen_implementation("decode", config.implementation)
    lowering = _kernel_lowering if chosen == "cuda" else _accelerator_lowering
    return lowering(ctx, *operands, config=config)


decode_local_p = define_primitive(
    "mla_decode_local",
    abstract=decode_abstract,
    lowering=_accelerator_lowering,
    platform_lowerings={"cpu": _xla_lowering(decode_xla.CPU_WALK), "cuda": _cuda_lowering},
)
