"""How a cache lies in memory, paged or not: what is supported, and where a token's row is.

A paged cache is `[*G, num_blocks, page_block_size, h_kv, width]`, and a table names the pages of
each sequence. An unpaged one is `[*G, b, max_len, h_kv, width]` and has no table: it is the same
as pages of `max_len` tokens, one for each sequence in order, and is treated as such where nothing
is gained by knowing more. Rows may be wider than what their format uses (576 columns, or 656 bytes:
`jax_flashmla.cache_formats`): what follows is padding, never read and never written.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashmla import arguments
from jax_flashmla.cache_formats import CacheFormat, described, format_of

PAGE_SIZES = (1, 16, 32, 64, 128, 256, 512, 1024)  # the kernel: any power of two up to the last


def check_cache(k_cache: jax.Array, groups, paged: bool, batch="b", given: str = "") -> None:
    """Raises unless `k_cache` is a cache with these group axes, and for so many sequences.

    `given` says, in the message, what fixed them.
    """
    expected = ("num_blocks", "page_block_size") if paged else (batch, "max_len")
    arguments.shape("k_cache", k_cache, (*groups, *expected, "h_kv", "width"), given)
    *_, page, _, width = k_cache.shape
    if paged:
        check_page_size("k_cache", page)
    elif page == 0:
        raise ValueError("k_cache: expected room for at least one token, got max_len 0")
    kind = format_of(k_cache)
    if width % kind.width_multiple or width < kind.row_width:
        raise ValueError(
            f"k_cache: expected rows of {described(kind)}, or of more that are a multiple of "
            f"{kind.width_multiple}, got width {width}"
        )


def check_scale(name: str, k_scale, format: CacheFormat, groups, given: str) -> jax.Array | None:
    """The scales of a cache as a float32 array `[*G]`; `None` for formats without.

    `given` says, in the message, what fixed the group axes.
    """
    if not format.scale_per_cache:
        if k_scale is not None:
            raise ValueError(f"{name}: expected None for a cache of format {format}, got a scale")
        return None
    if k_scale is None:
        raise ValueError(
            f"{name}: expected the float32 scale of the {format.dtype} cache, shape [*G], got None"
        )
    if isinstance(k_scale, (int, float)) and not isinstance(k_scale, bool):
        k_scale = jnp.float32(k_scale)
    k_scale = arguments.array(name, k_scale)
    if k_scale.dtype != jnp.float32:
        raise TypeError(f"{name}: expected dtype float32, got {k_scale.dtype}")
    arguments.shape(name, k_scale, tuple(groups), given if groups else "")
    return k_scale


def check_page_size(name: str, page) -> None:
    """Raises unless pages may have so many tokens."""
    if page not in PAGE_SIZES:
        raise ValueError(f"{name}: expected pages of {_listed(PAGE_SIZES)} tokens, got {page}")


def kernel_page_size(tokens: int) -> int:
    """The largest pages that the kernel takes and that so many tokens can be cut into."""
    return math.gcd(tokens, PAGE_SIZES[-1])


def table_of_sequences(k_cache: jax.Array) -> jax.Array:
    """The page table of an unpaged cache, in which a sequence is a page."""
    *groups, batch, _, _, _ = k_cache.shape
    return lax.broadcasted_iota(jnp.int32, (*groups, batch, 1), len(groups))


def cut_for_kernel(k_cache: jax.Array, block_table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same cache in pages that the kernel takes, and its table.

    An unpaged cache is only seen differently: nothing is copied.
    """
    groups, num_blocks, tokens, *row = k_cache.shape
    page = kernel_page_size(tokens)
    if tokens == page:
        return k_cache, block_table
    pieces = tokens // page
    k_cache = k_cache.reshape(groups, num_blocks * pieces, page, *row)
    block_table = block_table[..., None] * pieces + jnp.arange(pieces, dtype=jnp.int32)
    return k_cache, block_table.reshape(*block_table.shape[:2], -1)


def _listed(sizes) -> str:
    return f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"


def find_rows(k_cache, block_table, position):
    """Where in the cache tokens lie: `position [*G, b, t]` in their sequences.

    Returns the index arrays of the group axes, the page (or sequence) and its row, and whether
    there is such a token: inside the table, on a page of the pool. Where there is none, the page
    may be anything.
    """
    num_blocks, page_size = k_cache.shape[-4:-2]
    (*group, sequence, _) = (
        lax.broadcasted_iota(jnp.int32, position.shape, axis) for axis in range(position.ndim)
    )
    if block_table is None:
        inside = (position >= 0) & (position < page_size)
        return (*group, sequence, jnp.where(inside, position, 0)), inside
    inside = (position >= 0) & (position < block_table.shape[-1] * page_size)
    column = jnp.where(inside, position // page_size, 0)
    page = jnp.take_along_axis(block_table, column, axis=-1)
    inside &= (page >= 0) & (page < num_blocks)
    return (*group, page, position % page_size), inside
