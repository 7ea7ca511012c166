"""How a cache lies in memory, paged or not: what is supported, and where a token's row is.

A paged cache is `[*G, num_blocks, page_block_size, h_kv, width]`, and a table names the pages of
each sequence. Rows may be wider than the 576 columns that are used: what follows them is padding,
never read and never written.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashmla import arguments
from jax_flashmla.arguments import HEAD_DIM

KERNEL_PAGE_SIZES = (16, 32, 64, 128, 256, 512, 1024)
PAGE_SIZES = (1, *KERNEL_PAGE_SIZES)
ROW_MULTIPLE = 8  # rows of whole 16 bytes, which is what the copy engine moves


def check_cache(k_cache: jax.Array, groups, given: str = "") -> None:
    """Raises unless `k_cache` is a paged cache with these group axes.

    `given` says, in the message, what fixed them.
    """
    expected = (*groups, "num_blocks", "page_block_size", "h_kv", "width")
    arguments.shape("k_cache", k_cache, expected, given)
    *_, page, _, width = k_cache.shape
    check_page_size("k_cache", page)
    if width % ROW_MULTIPLE or width < HEAD_DIM:
        raise ValueError(
            f"k_cache: expected rows of {HEAD_DIM} columns, or of more that are a multiple of "
            f"{ROW_MULTIPLE}, got width {width}"
        )


def check_page_size(name: str, page) -> None:
    """Raises unless pages may have so many tokens."""
    if page not in PAGE_SIZES:
        raise ValueError(f"{name}: expected pages of {_listed(PAGE_SIZES)} tokens, got {page}")


def why_no_kernel(k_cache: jax.Array) -> str | None:
    """Why the decode kernel cannot read this cache; `None` if it can."""
    page = k_cache.shape[-3]
    if page in KERNEL_PAGE_SIZES:
        return None
    return f"the kernel takes pages of {_listed(KERNEL_PAGE_SIZES)} tokens, and k_cache has {page}"


def _listed(sizes) -> str:
    return f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"


def find_rows(k_cache, block_table, position):
    """Where in the pool tokens lie: `position [*G, b, t]` in their sequences.

    Returns the index arrays of the group axes, the page and its row, and whether there is such a
    token: inside the table, on a page of the pool. Where there is none, the page may be anything.
    """
    *groups, num_blocks, page_size, _, _ = k_cache.shape
    inside = (position >= 0) & (position < block_table.shape[-1] * page_size)
    column = jnp.where(inside, position // page_size, 0)
    page = jnp.take_along_axis(block_table, column, axis=-1)
    inside &= (page >= 0) & (page < num_blocks)
    group = (lax.broadcasted_iota(jnp.int32, page.shape, axis) for axis in range(len(groups)))
    return (*group, page, position % page_size), inside
