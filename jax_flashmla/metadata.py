"""`get_mla_metadata`: plans a decode step, once per step, for all layers."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import arguments, native, partition, planner
from jax_flashmla.primitive import (
    define_primitive,
    lower_as_jax,
    lower_on_mesh,
    needs_devices,
    result_aval,
)
from jax_flashmla.promotion import own_promotions

# SMs of an H100 SXM or H200: what a plan is made for where JAX sees no GPU.
DEFAULT_NUM_SMS = 132
MAX_NUM_SMS = 65535  # keeps every cut of the plan inside int32


class MLAMetadata(NamedTuple):
    """A plan; layout in `jax_flashmla.planner`. Unpack it into the decode call: `*metadata`."""

    tile_scheduler_metadata: jax.Array  # [*G, num_sm_parts, 8] int32
    num_splits: jax.Array  # [*G, b + 1] int32


@own_promotions
def get_mla_metadata(
    cache_seqlens: jax.Array,
    num_q_tokens_per_head_k: int,
    num_heads_k: int,
    *,
    is_fp8_kvcache: bool = False,
    sliding_window: int | None = None,
    num_sms: int | None = None,
    implementation: str | None = None,
) -> MLAMetadata:
    """Plans which thread-block partition works on which 64-token blocks of which sequence.

    The plan depends on the lengths, the head counts and whether the cache is FP8, whatever its
    pages: make it once per step and share it between layers. Results of the decode never depend on
    it, only its speed does. The name and the first arguments are FlashMLA's; the balancing is
    described in `jax_flashmla.planner`.

    Args:
      cache_seqlens: `[*G, b]` int32, valid tokens of each sequence.
      num_q_tokens_per_head_k: `s_q * h_q // h_kv`, query rows per KV head (static).
      num_heads_k: `h_kv` (static).
      is_fp8_kvcache: for an FP8 cache, whose blocks take less time (static). A plan made for
        the other kind is as right, and up to 5 % slower with few heads.
      sliding_window: as the decode's (static).
      num_sms: streaming multiprocessors to plan for (static). Default: those of JAX's first CUDA
        device, or 132 (H100 SXM, H200) where there is none.
      implementation: `"cuda"` (one kernel launch), `"xla"`, or `None` for the faster one that runs
        here. Both give the same bits.

    Returns:
      `MLAMetadata(tile_scheduler_metadata [*G, num_sm_parts, 8], num_splits [*G, b + 1])`, int32.

    Raises:
      TypeError, ValueError: an argument has the wrong type, rank or value.
      RuntimeError: `implementation="cuda"` where the kernel cannot run.

    Example:
      One query token, 16 heads that share a KV head; on 132 SMs there are 132 partitions:

      >>> lengths = jnp.array([100, 3], jnp.int32)
      >>> metadata = jax.jit(lambda x: get_mla_metadata(x, 1 * 16, 1, num_sms=132))(lengths)
      >>> metadata.tile_scheduler_metadata.shape, metadata.num_splits.shape
      ((132, 8), (3,))
    """
    cache_seqlens = arguments.int32_array("cache_seqlens", cache_seqlens)
    if cache_seqlens.ndim < 1:
        raise ValueError("cache_seqlens: expected shape [*G, b], got a scalar")
    rows = arguments.positive_int("num_q_tokens_per_head_k", num_q_tokens_per_head_k)
    heads = arguments.positive_int("num_heads_k", num_heads_k)
    if sliding_window is not None:
        cache_seqlens = _seen(cache_seqlens, arguments.window("sliding_window", sliding_window))
    native.check_implementation("plan", implementation)
    if num_sms is None:
        devices = native.gpus()
        num_sms = devices[0].core_count if devices else DEFAULT_NUM_SMS
    sms = arguments.positive_int("num_sms", num_sms)
    if sms > MAX_NUM_SMS:
        raise ValueError(f"num_sms: expected at most {MAX_NUM_SMS}, got {sms}")
    parts = planner.num_sm_parts(rows, heads, sms)
    fp8 = arguments.static_bool("is_fp8_kvcache", is_fp8_kvcache)
    overhead = planner.overhead_blocks(rows, fp8)
    config = PlanConfig(parts, overhead, planner.min_split_blocks(rows), implementation)
    return MLAMetadata(*plan_p.bind(cache_seqlens, config=config, devices=needs_devices()))


def _seen(cache_seqlens, window):
    """Tokens from the block on with which a window of so many begins: the decode counts from it.

    With several causal query tokens it may be a block more, which a plan need not know.
    """
    cache_seqlens = jnp.maximum(cache_seqlens, 0)  # from the least of int32 nothing is subtracted
    beyond = jnp.maximum(cache_seqlens - window, 0)
    return cache_seqlens - beyond // planner.BLOCK_TOKENS * planner.BLOCK_TOKENS


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """The static parameter of the plan primitives."""

    num_sm_parts: int
    overhead_blocks: int
    min_split_blocks: int
    implementation: str | None


def _abstract(cache_seqlens, *, config, devices=None):
    del devices
    *groups, batch = cache_seqlens.shape
    # Sharded as the groups are; a plan for a sharded batch is whole.
    _, *specs = partition.divide_plan(partition.spec_of(cache_seqlens)[:-1])
    shapes = (*groups, config.num_sm_parts, planner.METADATA_COLUMNS), (*groups, batch + 1)
    return [
        result_aval([cache_seqlens], shape, jnp.dtype("int32"), spec)
        for shape, spec in zip(shapes, specs, strict=True)
    ]


def _plan(cache_seqlens, *, config):
    """Lowers the outer primitive: any number of group axes become one."""
    *groups, batch = cache_seqlens.shape
    results = plan_local_p.bind(cache_seqlens.reshape(math.prod(groups), batch), config=config)
    return tuple(result.reshape(*groups, *result.shape[1:]) for result in results)


def _plan_lowering(ctx, cache_seqlens, *, config, devices):
    """Devices share groups."""
    del devices
    plan = functools.partial(_plan, config=config)

    def divide(specs):
        in_spec, *out_specs = partition.divide_plan(specs[0][:-1])
        return plan, (in_spec,), tuple(out_specs)

    rule = partition.plan_rule(ctx.avals_in[0].ndim - 1)
    return lower_on_mesh(ctx, [cache_seqlens], plan, rule, divide)


def _batcher(args, dims, *, config, devices):
    """A mapped axis becomes one more group axis."""
    (cache_seqlens,), (dim,) = args, dims
    mapped = jnp.moveaxis(cache_seqlens, dim, 0)
    return plan_p.bind(mapped, config=config, devices=devices), [0, 0]


def _plan_local_xla(cache_seqlens, *, config):
    plan = functools.partial(
        planner.plan_reference,
        parts=config.num_sm_parts,
        overhead=config.overhead_blocks,
        least=config.min_split_blocks,
    )
    return jax.vmap(plan)(cache_seqlens)


_lower_as_jax = lower_as_jax(_plan_local_xla)


def _xla_lowering(ctx, cache_seqlens, *, config):
    native.check_platforms(config.implementation, ctx.module_context.platforms)
    return _lower_as_jax(ctx, cache_seqlens, config=config)


def _cuda_lowering(ctx, cache_seqlens, *, config):
    if native.chosen_implementation("plan", config.implementation) == "xla":
        return _xla_lowering(ctx, cache_seqlens, config=config)
    return jax.ffi.ffi_lowering(native.FFI_TARGETS["plan"])(
        ctx,
        cache_seqlens,
        overhead_blocks=np.int32(config.overhead_blocks),
        min_split_blocks=np.int32(config.min_split_blocks),
        split_cost_blocks=np.int32(planner.SPLIT_COST_BLOCKS),
    )


plan_local_p = define_primitive(
    "mla_metadata_local",
    abstract=_abstract,
    lowering=_xla_lowering,
    platform_lowerings={"cuda": _cuda_lowering},
)
plan_p = define_primitive(
    "mla_metadata", abstract=_abstract, lowering=_plan_lowering, batcher=_batcher
)
