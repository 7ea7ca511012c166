"""How decode and append are divided over a mesh, with nothing to exchange.

Plans are divided by groups, decode by groups, batch and heads, append by groups and KV heads, and
by the batch if the cache is unpaged. Everything else (query tokens, columns, pages) is whole on
every device. On meshes with explicit
axes shardings are part of types, and what does not fit is refused while tracing. On others XLA
propagates them by the rules here, and gathers what does not fit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


class DecodeSpecs(NamedTuple):
    """Specs of the operands (`q` and `metadata` of each part) and of the results."""

    q: PartitionSpec
    k_cache: PartitionSpec
    k_scale: PartitionSpec
    block_table: PartitionSpec
    cache_seqlens: PartitionSpec
    metadata: PartitionSpec
    out: PartitionSpec
    lse: PartitionSpec
    whole_groups: bool  # neither batch nor heads are divided


def decode_rule(
    num_groups: int, num_q: int, scaled: bool, paged: bool, planned: bool, divide_heads: bool
):
    """Shardy's rule for decode, and the axes of it that stay whole."""
    q = ["b s h d", "b s h r"][:num_q]
    cache = ["p t u e" if paged else "b t u e", *([""] if scaled else [])]
    operands = [*q, *cache, *(["b n"] if paged else []), "b", *(["m c", "k"] if planned else [])]
    return _rule(num_groups, operands, ["b s h v", "b h s"], "bh" if divide_heads else "b")


def plan_rule(num_groups: int):
    """Shardy's rule for a plan, and the axes of it that stay whole."""
    return _rule(num_groups, ["b"], ["m c", "k"], "")


def append_rule(num_groups: int, paged: bool):
    """Shardy's rule for append, and the axes of it that stay whole."""
    if paged:
        return _rule(num_groups, ["p t u e", "b s u r", "b n", "b"], ["p t u e"], "u")
    return _rule(num_groups, ["b t u e", "b s u r", "b"], ["b t u e"], "bu")


def _rule(num_groups, operands, results, divided):
    """Puts the group axes before each; all axes but those and `divided` stay whole."""
    groups = " ".join(f"g{i}" for i in range(num_groups))
    left, right = (", ".join(f"{groups} {axes}" for axes in lists) for lists in (operands, results))
    # Shardy wants them in the order of their appearance.
    letters = dict.fromkeys(" ".join([*operands, *results]).split())
    return f"{left} -> {right}", tuple(x for x in letters if x not in divided)


def decode_specs(q, k_cache, k_scale, block_table, cache_seqlens) -> DecodeSpecs:
    """How to divide a decode whose operands are sharded.

    Args:
      q: the abstract values of q's parts, one or two.
      k_cache: and
      k_scale: and
      block_table: and
      cache_seqlens: those of the other operands; no table: the cache is unpaged; no scale: it is
        one of 16 bits, or has them in its rows.

    Raises:
      ValueError: an operand is sharded in a way that would need data of other devices.
    """
    name = "q" if len(q) == 1 else "q_nope"
    *groups, batch, s_q, heads, width = spec_of(q[0])
    if s_q is not None or width is not None:
        _refuse(name, q[0], "only group axes, b and h_q to be sharded")
    if spec_of(q[-1]) != spec_of(q[0]):
        _refuse("q_rope", q[-1], f"the sharding of q_nope, {q[0].sharding.spec}")

    *pool_groups, pages, tokens, kv_heads, width = spec_of(k_cache)
    if block_table is None:
        if pages != batch:  # they are sequences
            _refuse("k_cache", k_cache, f"b sharded as {name}'s, {q[0].sharding.spec}")
    elif pages is not None:
        _refuse(
            "k_cache",
            k_cache,
            "pages not to be sharded, since page ids name pages of the whole pool (shard group "
            "axes, each group with a pool and ids of its own, or see context_parallel)",
        )
    if tokens is not None or width is not None:
        axes = "group axes and h_kv" if block_table is not None else "group axes, b and h_kv"
        _refuse("k_cache", k_cache, f"only {axes} to be sharded")
    if pool_groups != groups:
        _refuse("k_cache", k_cache, f"group axes sharded as {name}'s, {q[0].sharding.spec}")
    if kv_heads != (heads if k_cache.shape[-2] > 1 else None):
        _refuse("k_cache", k_cache, f"h_kv sharded as {name}'s h_q, {q[0].sharding.spec}")

    if k_scale is not None and spec_of(k_scale) != tuple(groups):
        _refuse("k_scale", k_scale, f"group axes sharded as {name}'s, {q[0].sharding.spec}")

    for operand_name, operand in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        if operand is None:
            continue
        spec = spec_of(operand)
        batch_axis = len(groups)
        if spec[:batch_axis] != tuple(groups):
            _refuse(operand_name, operand, f"group axes sharded as {name}'s, {q[0].sharding.spec}")
        if spec[batch_axis] not in (batch, None):
            _refuse(operand_name, operand, f"b sharded as {name}'s, {q[0].sharding.spec}, or whole")
        if any(entry is not None for entry in spec[batch_axis + 1 :]):
            _refuse(operand_name, operand, "max_blocks not to be sharded")

    return divide(groups, batch, heads, kv_heads, block_table is not None)


def divide(groups: Sequence, batch, heads, kv_heads, paged: bool) -> DecodeSpecs:
    """The specs for these mesh axes of the group axes, the batch, and the heads."""
    return DecodeSpecs(
        q=PartitionSpec(*groups, batch, None, heads, None),
        k_cache=PartitionSpec(*groups, None if paged else batch, None, kv_heads, None),
        k_scale=PartitionSpec(*groups),
        block_table=PartitionSpec(*groups, batch, None),
        cache_seqlens=PartitionSpec(*groups, batch),
        metadata=PartitionSpec(*groups),
        out=PartitionSpec(*groups, batch, None, heads, None),
        lse=PartitionSpec(*groups, batch, heads, None),
        whole_groups=batch is None and heads is None,
    )


def divide_plan(groups: Sequence) -> tuple[PartitionSpec, ...]:
    """The specs of the lengths and of both results, for these mesh axes of the group axes."""
    return (
        PartitionSpec(*groups, None),
        PartitionSpec(*groups, None, None),
        PartitionSpec(*groups, None),
    )


def append_specs(k_cache, new_kv, *table_and_lengths) -> tuple[PartitionSpec, ...]:
    """How to divide an append whose operands are sharded: specs of the operands; the first is the
    result's. Without a table the cache is unpaged.

    Raises:
      ValueError: an operand is sharded in a way that would need data of other devices.
    """
    paged = len(table_and_lengths) == 2
    *groups, pages, tokens, kv_heads, width = spec_of(k_cache)
    if (paged and pages is not None) or (tokens, width) != (None, None):
        axes = "group axes and h_kv" if paged else "group axes, b and h_kv"
        _refuse("k_cache", k_cache, f"only {axes} to be sharded")
    specs = divide_append(groups, pages, kv_heads, paged)
    names = "new_kv", *(["block_table"] if paged else []), "cache_seqlens"
    operands = zip(names, (new_kv, *table_and_lengths), specs[1:], strict=True)
    for name, operand, spec in operands:
        if spec_of(operand) != tuple(spec):
            _refuse(name, operand, f"{spec}, to fit k_cache's {k_cache.sharding.spec}")
    return specs


def divide_append(groups: Sequence, batch, kv_heads, paged: bool) -> tuple[PartitionSpec, ...]:
    """The specs for these mesh axes of the group axes, an unpaged cache's batch, the KV heads."""
    rows = PartitionSpec(*groups, None if paged else batch, None, kv_heads, None)
    if paged:
        return rows, rows, PartitionSpec(*groups, None, None), PartitionSpec(*groups, None)
    return rows, rows, PartitionSpec(*groups, batch)


def check_packed(name: str, rows) -> None:
    """Raises if packed tokens `[*G, total, heads, columns]` are divided over explicit axes.

    Any sequence may be anywhere in them, so that each device would need those of others.
    """
    aval = jax.typeof(rows)
    if spec_of(aval)[-3] is not None:
        _refuse(name, aval, "total not to be sharded (shard group axes, each with cuts of its own)")


def spec_of(aval) -> tuple:
    """The axes of the mesh that each axis is sharded over, `None` for none."""
    spec = tuple(aval.sharding.spec)
    return spec + (None,) * (len(aval.shape) - len(spec))


def mapped_axes(operands: Sequence, dims: Sequence):
    """The axes of the mesh that the mapped axis of a `vmap` is sharded over, `None` for none."""
    specs = (
        spec_of(jax.typeof(x))[d] for x, d in zip(operands, dims, strict=True) if d is not None
    )
    return next((entry for entry in specs if entry is not None), None)


def repeat(x: jax.Array, axis: int, size: int, mesh_axes) -> jax.Array:
    """What a `vmap` does not map, once for every example: a new axis, sharded like theirs."""
    spec = list(spec_of(jax.typeof(x)))
    spec.insert(axis, mesh_axes)
    return jnp.broadcast_to(
        jnp.expand_dims(x, axis),
        (*x.shape[:axis], size, *x.shape[axis:]),
        out_sharding=PartitionSpec(*spec) if any(spec) else None,
    )


def is_sharded(avals) -> bool:
    """Whether any of `avals` is sharded over an explicit axis of a mesh."""
    return any(entry is not None for aval in avals for entry in spec_of(aval))


def _refuse(name, aval, expected):
    raise ValueError(f"{name}: expected {expected}, got sharding {aval.sharding.spec}")
