"""Checks of what users pass. Each names the argument, what was expected and what came."""

import math
import numbers
import operator

import jax
import jax.numpy as jnp
from jax.core import Tracer

QUERY_DTYPES = (jnp.bfloat16, jnp.float16)
LATENT_DIM = 512  # the columns of a cache row that are both key and value
ROPE_DIM = 64  # the columns that are key only
HEAD_DIM = LATENT_DIM + ROPE_DIM
PAGE_BLOCK_SIZE = 64
MOST_TOKENS = 2**30  # of a sequence: no table holds more


def array(name: str, value) -> jax.Array:
    """`value` as a JAX array."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}") from error


def int32_array(name: str, value) -> jax.Array:
    """`value` as an int32 array."""
    value = array(name, value)
    if value.dtype != jnp.int32:
        raise TypeError(f"{name}: expected dtype int32, got {value.dtype}")
    return value


def positive_int(name: str, value) -> int:
    """`value` as a static Python int above 0."""
    value = static_int(name, value)
    if value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value}")
    return value


def window(name: str, value) -> int:
    """`value` as a number of keys; more than a table can hold are as good as any more."""
    return min(positive_int(name, value), MOST_TOKENS)


def static_int(name: str, value) -> int:
    """`value` as a Python int."""
    if not isinstance(value, (Tracer, bool)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected a static Python integer, got {_kind(value)}")


def static_bool(name: str, value) -> bool:
    """`value` as a Python bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a static Python bool, got {_kind(value)}")
    return value


def static_finite_float(name: str, value) -> float:
    """`value` as a finite Python float."""
    if isinstance(value, (Tracer, bool)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a static Python float, got {_kind(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def shape(name: str, value: jax.Array, expected: tuple[int | str, ...], given: str = "") -> None:
    """Raises unless `value` has shape `expected`, where a string stands for any extent.

    `given` says, in the message, what fixed the numbers in `expected`.
    """
    fits = len(value.shape) == len(expected) and all(
        isinstance(want, str) or want == have
        for want, have in zip(expected, value.shape, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join(str(extent) for extent in expected) + "]"
        got = list(value.shape)
        raise ValueError(f"{name}: expected shape {wanted}{given and f' ({given})'}, got {got}")


def table_and_lengths(block_table, cache_seqlens, groups, batch, given: str):
    """The page table and the lengths of `batch` sequences in each group, as int32 arrays."""
    block_table = int32_array("block_table", block_table)
    shape("block_table", block_table, (*groups, batch, "max_blocks"), given)
    if block_table.shape[-1] == 0:
        raise ValueError("block_table: expected at least one column, got max_blocks 0")
    cache_seqlens = int32_array("cache_seqlens", cache_seqlens)
    shape("cache_seqlens", cache_seqlens, (*groups, batch), given)
    return block_table, cache_seqlens


def _kind(value) -> str:
    if isinstance(value, Tracer):
        return "a traced value (pass it by closure, or mark it static in jax.jit)"
    return f"{type(value).__name__} {value!r}"
