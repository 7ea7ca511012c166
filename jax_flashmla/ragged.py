"""Queries packed one after the other, as many for each sequence as it has, and tables in CSR form.

`cu_seqlens_q [*G, b + 1]` cuts packed tokens `[*G, total, ..]` into sequences: those of sequence
`i` are `cu_seqlens_q[i]` to `cu_seqlens_q[i + 1]`, and the last tokens of the sequence. Names and
layout are those of FlashAttention's `flash_attn_varlen_func`. Decode pads them on the left, to
`max_seqlen_q` for each sequence: the last query of each is then in the last place, from which
causal masks and sliding windows count. Append needs no padding: every row finds its own place.

Whatever `cu_seqlens_q` holds, nothing outside of an operand is read: its entries are clamped to
`[0, total]`, and a token belongs to at most one sequence, which must name it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_flashmla import arguments, partition
from jax_flashmla.promotion import own_promotions


class Tokens(NamedTuple):
    """Of packed tokens: whose they are. All `[*G, total]`."""

    sequence: jax.Array  # in [0, b), also where there is none
    behind: jax.Array  # how many of the sequence's tokens follow; 0 for its last
    named: jax.Array  # whether the token is one of the sequence's at all


def check_cuts(cu_seqlens_q, groups, given: str) -> jax.Array:
    """`cu_seqlens_q` as an int32 array `[*groups, b + 1]`, for at least one sequence."""
    cu_seqlens_q = arguments.int32_array("cu_seqlens_q", cu_seqlens_q)
    expected = (*groups, "b + 1")
    arguments.shape("cu_seqlens_q", cu_seqlens_q, expected, given if groups else "")
    if cu_seqlens_q.shape[-1] < 2:
        got = cu_seqlens_q.shape[-1]
        raise ValueError(f"cu_seqlens_q: expected b + 1 entries, b at least 1, got {got}")
    return cu_seqlens_q


def find_tokens(cu_seqlens_q: jax.Array, total: int) -> Tokens:
    """Finds the sequence of each of `total` packed tokens."""
    starts, stops = _bounds(cu_seqlens_q, total)
    token = jnp.arange(total, dtype=jnp.int32)
    # Counted, not searched for: the cuts need not increase.
    sequence = jnp.sum(token[:, None] >= stops[..., None, :], axis=-1, dtype=jnp.int32)
    sequence = jnp.minimum(sequence, stops.shape[-1] - 1)
    start, stop = (take(x, sequence) for x in (starts, stops))
    return Tokens(sequence, stop - 1 - token, (start <= token) & (token < stop))


def take(values: jax.Array, index: jax.Array) -> jax.Array:
    """`values [*G, n]` at `index [*G, m]`, which must be inside."""
    return jnp.take_along_axis(values, index, axis=-1, mode="clip")


def pad_queries(q, cu_seqlens_q, max_seqlen_q):
    """Pads packed queries on the left.

    Args:
      q: `[*G, total, h_q, 576]`, or a pair.
      cu_seqlens_q: `[*G, b + 1]` int32.
      max_seqlen_q: tokens to pad to (static).

    Returns:
      q `[*G, b, max_seqlen_q, h_q, ..]`, zeros where there is no query, as it was given: an array
      or a pair; which sequences have a query, `[*G, b]`; and the `Tokens`.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype, rank, shape or value.
    """
    if cu_seqlens_q is None:
        raise ValueError(
            "cu_seqlens_q: expected an array, since max_seqlen_q was given, got None; pass both "
            "for packed queries, or neither"
        )
    parts, split = arguments.queries(q, ("total",))
    most = arguments.positive_int("max_seqlen_q", max_seqlen_q)
    partition.check_packed("q_nope" if split else "q", parts[0])
    *groups, total, _, _ = parts[0].shape
    cu_seqlens_q = check_cuts(cu_seqlens_q, groups, "group axes as q's")
    batch = cu_seqlens_q.shape[-1] - 1

    starts, stops = _bounds(cu_seqlens_q, total)
    token = stops[..., None] + jnp.arange(-most, 0, dtype=jnp.int32)
    is_query = token >= starts[..., None]
    index = jnp.where(is_query, token, 0).reshape(*groups, batch * most)

    def pad(part):
        rows = jnp.take_along_axis(part, index[..., None, None], axis=-3, mode="clip")
        rows = rows.reshape(*groups, batch, most, *part.shape[-2:])
        return jnp.where(is_query[..., None, None], rows, jnp.zeros_like(rows))

    parts = tuple(pad(part) for part in parts)
    tokens = find_tokens(cu_seqlens_q, total)
    return (parts if split else parts[0]), starts < stops, tokens


def pack_results(out: jax.Array, lse: jax.Array, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """Packs the results of padded queries: out `[*G, total, h_q, 512]`, lse `[*G, h_q, total]`.

    Tokens of no sequence, and those that did not fit in, get 0 and -inf.
    """
    *groups, batch, most, heads, width = out.shape
    computed = tokens.named & (tokens.behind < most)
    index = tokens.sequence * most + jnp.where(computed, most - 1 - tokens.behind, 0)
    out = out.reshape(*groups, batch * most, heads, width)
    out = jnp.take_along_axis(out, index[..., None, None], axis=-3, mode="clip")
    lse = jnp.moveaxis(lse, -3, -2).reshape(*groups, heads, batch * most)
    lse = jnp.take_along_axis(lse, index[..., None, :], axis=-1, mode="clip")
    return (
        jnp.where(computed[..., None, None], out, jnp.zeros_like(out)),
        jnp.where(computed[..., None, :], lse, jnp.full_like(lse, -jnp.inf)),
    )


def rows_as_sequences(
    cu_seqlens_q: jax.Array,
    total: int,
    block_table: jax.Array | None,
    cache_seqlens: jax.Array,
    page_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Packed new rows as so many sequences of one new row, each with the one page that it is in.

    Without a table the pages are those of `cache_layout.table_of_sequences`.

    Returns:
      The table `[*G, total, 1]` and lengths `[*G, total]`, 0 for rows that have no place.
    """
    sequence, behind, named = find_tokens(cu_seqlens_q, total)
    position = take(cache_seqlens, sequence) - 1 - behind
    if block_table is None:
        named &= (position >= 0) & (position < page_size)
        return sequence[..., None], jnp.where(named, position + 1, 0)
    *groups, batch, max_blocks = block_table.shape
    named &= (position >= 0) & (position < max_blocks * page_size)
    entry = sequence * max_blocks + jnp.where(named, position // page_size, 0)
    page = take(block_table.reshape(*groups, batch * max_blocks), entry)
    return page[..., None], jnp.where(named, position % page_size + 1, 0)


@own_promotions
def block_table_from_csr(kv_indptr: jax.Array, kv_indices: jax.Array, max_blocks: int) -> jax.Array:
    """The page table of sequences whose pages are listed one after the other (CSR, as FlashInfer).

    The pages of sequence `i` are `kv_indices[kv_indptr[i] : kv_indptr[i + 1]]`. Entries past its
    last page are -1, which is no page. `kv_indices` may be longer than `kv_indptr` says, padded
    with anything; what `kv_indptr` names outside of it is -1 as well.

    `*G` stands for any number of leading group axes, the same on both operands.

    Args:
      kv_indptr: `[*G, b + 1]` int32, where the pages of each sequence begin.
      kv_indices: `[*G, n]` int32, page ids.
      max_blocks: pages of a sequence that the table has room for (static); more are left out.

    Returns:
      block_table `[*G, b, max_blocks]` int32.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype, rank, shape or value.

    Example:
      >>> kv_indptr = jnp.array([0, 2, 2, 3], jnp.int32)
      >>> kv_indices = jnp.array([7, 4, 9, -1, -1], jnp.int32)
      >>> print(block_table_from_csr(kv_indptr, kv_indices, 3))
      [[ 7  4 -1]
       [-1 -1 -1]
       [ 9 -1 -1]]
    """
    kv_indptr = arguments.int32_array("kv_indptr", kv_indptr)
    kv_indices = arguments.int32_array("kv_indices", kv_indices)
    max_blocks = arguments.positive_int("max_blocks", max_blocks)
    if kv_indptr.ndim < 1 or kv_indptr.shape[-1] < 1:
        raise ValueError(f"kv_indptr: expected shape [*G, b + 1], got {list(kv_indptr.shape)}")
    *groups, entries = kv_indptr.shape
    given = "group axes as kv_indptr's" if groups else ""
    arguments.shape("kv_indices", kv_indices, (*groups, "n"), given)
    batch, listed = entries - 1, kv_indices.shape[-1]
    starts, stops = kv_indptr[..., :-1], kv_indptr[..., 1:]
    stops = jnp.clip(stops, 0, listed)
    place = starts[..., None] + jnp.arange(max_blocks, dtype=jnp.int32)
    named = (starts >= 0)[..., None] & (place >= starts[..., None]) & (place < stops[..., None])
    if batch == 0 or listed == 0:
        return jnp.full(named.shape, -1, jnp.int32)
    place = jnp.where(named, place, 0).reshape(*groups, batch * max_blocks)
    return jnp.where(named, take(kv_indices, place).reshape(named.shape), -1)


def _bounds(cu_seqlens_q, total):
    """Where each sequence's tokens start and stop, inside of `[0, total]`: both `[*G, b]`."""
    cuts = jnp.clip(cu_seqlens_q, 0, total)
    return cuts[..., :-1], cuts[..., 1:]
