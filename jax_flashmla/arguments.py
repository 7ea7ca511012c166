"""Checks of what users pass. Each names the argument, what was expected and what came."""

import math
import numbers
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_flashmla.planner import METADATA_COLUMNS

QUERY_DTYPES = (jnp.bfloat16, jnp.float16)
LATENT_DIM = 512  # the columns of a cache row that are both key and value
ROPE_DIM = 64  # the columns that are key only
HEAD_DIM = LATENT_DIM + ROPE_DIM
# Where nothing else says it, and what the plan counts in, whatever the pages of the cache.
PAGE_BLOCK_SIZE = 64
MOST_TOKENS = 2**30  # of a sequence: tables hold less
FLOAT32_MAX = float(np.finfo(np.float32).max)


def array(name: str, value) -> jax.Array:
    """`value` as a JAX array."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}") from error


def int32_array(name: str, value) -> jax.Array:
    """`value` as an int32 array. Of int64, which JAX makes int32 without a word, none may wrap."""
    if isinstance(value, (list, tuple)) or getattr(value, "dtype", None) == np.int64:
        _check_range(name, value)
    value = array(name, value)
    if value.dtype != jnp.int32:
        raise TypeError(f"{name}: expected dtype int32, got {value.dtype}")
    return value


def _check_range(name, value):
    if isinstance(value, jax.Array):  # under jax_enable_x64, where its dtype is refused
        return
    limits = np.iinfo(np.int32)
    try:
        value = np.asarray(value)
    except (TypeError, ValueError):  # of traced numbers, or not an array at all
        return
    if value.dtype.kind in "iuO" and value.size:
        least, most = value.min(), value.max()
        if least < limits.min or most > limits.max:
            wrong = most if most > limits.max else least
            raise ValueError(f"{name}: expected numbers of 32 bits, got {wrong}")


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


def static_float(name: str, value) -> float:
    """`value` as a Python float; of numbers beyond float32's range, infinity."""
    if isinstance(value, (Tracer, bool)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a static Python float, got {_kind(value)}")
    if abs(value) > FLOAT32_MAX:
        return math.inf if value > 0 else -math.inf
    return float(value)


def static_finite_float(name: str, value) -> float:
    """`value` as a Python float that is finite in float32, too."""
    number = static_float(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, in float32 too, got {value}")
    return number


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
    """The page table, if any, and the lengths of `batch` sequences in each group, as int32."""
    if block_table is not None:
        block_table = int32_array("block_table", block_table)
        shape("block_table", block_table, (*groups, batch, "max_blocks"), given)
        if block_table.shape[-1] == 0:
            raise ValueError("block_table: expected at least one column, got max_blocks 0")
    cache_seqlens = int32_array("cache_seqlens", cache_seqlens)
    shape("cache_seqlens", cache_seqlens, (*groups, batch), given)
    return block_table, cache_seqlens


def room(block_table: jax.Array, page_size: int) -> None:
    """Raises if a row of the table has room for more tokens than can be counted."""
    columns = block_table.shape[-1]
    # An exported program does not know its columns yet.
    if isinstance(columns, int) and columns * page_size >= MOST_TOKENS:
        raise ValueError(
            f"block_table: expected room for less than 2**30 tokens in a row, got max_blocks "
            f"{columns} of {page_size}"
        )


def queries(q, tokens=("b", "s_q")) -> tuple[tuple[jax.Array, ...], bool]:
    """Returns the parts of q, one or two, and whether it was a pair.

    `tokens` names the axes between the group axes and the heads.
    """
    split = isinstance(q, (tuple, list))
    if split and len(q) != 2:
        raise ValueError(f"q: expected an array or a pair (q_nope, q_rope), got {len(q)} items")
    names = ("q_nope", "q_rope") if split else ("q",)
    widths = (LATENT_DIM, ROPE_DIM) if split else (HEAD_DIM,)
    parts = tuple(array(name, part) for name, part in zip(names, q if split else (q,), strict=True))
    known = parts[0].ndim >= len(tokens) + 2
    leading = parts[0].shape[:-1] if known else ("*G", *tokens, "h_q")
    for name, part, width in zip(names, parts, widths, strict=True):
        if part.dtype not in QUERY_DTYPES:
            raise TypeError(f"{name}: expected dtype bfloat16 or float16, got {part.dtype}")
        if part.dtype != parts[0].dtype:
            raise TypeError(f"{name}: expected q_nope's dtype {parts[0].dtype}, got {part.dtype}")
        shape(name, part, (*leading, width), "as q_nope's" if name == "q_rope" else "")
    if parts[0].shape[-3] == 0:
        raise ValueError(f"{names[0]}: expected at least one query token, got {tokens[-1]} 0")
    return parts, split


def plan(tile_scheduler_metadata, num_splits, groups, batch) -> tuple[jax.Array, ...]:
    """Returns `()`, or both arrays of the plan."""
    if (tile_scheduler_metadata is None) != (num_splits is None):
        missing = "num_splits" if num_splits is None else "tile_scheduler_metadata"
        raise ValueError(
            f"{missing}: expected an array, since the other half of the metadata was given, got "
            "None; pass both as get_mla_metadata returns them, or neither"
        )
    if num_splits is None:
        return ()
    name = "tile_scheduler_metadata"
    tile_scheduler_metadata = int32_array(name, tile_scheduler_metadata)
    expected = (*groups, "num_sm_parts", METADATA_COLUMNS)
    shape(name, tile_scheduler_metadata, expected)
    if tile_scheduler_metadata.shape[-2] == 0:
        raise ValueError(f"{name}: expected at least one partition, got num_sm_parts 0")
    num_splits = int32_array("num_splits", num_splits)
    shape("num_splits", num_splits, (*groups, batch + 1), "b + 1")
    return tile_scheduler_metadata, num_splits


def _kind(value) -> str:
    if isinstance(value, Tracer):
        return "a traced value (pass it by closure, or mark it static in jax.jit)"
    return f"{type(value).__name__} {value!r}"
