"""`append_kv_cache`: writes new rows into the latent cache, paged or not."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashmla import arguments, partition, ragged
from jax_flashmla.arguments import HEAD_DIM
from jax_flashmla.cache_formats import FP8_BLOCK, FP8_FORMATS, FP8_PER_TENSOR, format_of
from jax_flashmla.cache_layout import check_cache, check_scale, find_rows
from jax_flashmla.primitive import define_primitive, lower_on_mesh, needs_devices, result_aval
from jax_flashmla.promotion import own_promotions
from jax_flashmla.quantization import quantize_rows, rows_array


@own_promotions
def append_kv_cache(
    k_cache: jax.Array,
    new_kv: jax.Array,
    block_table: jax.Array | None,
    cache_seqlens: jax.Array,
    *,
    cu_seqlens_q: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    power_of_two_scales: bool = False,
) -> jax.Array:
    """Writes the newest rows of every sequence into its pages, or into its part of the cache.

    Row `i` of a sequence's `s_q` goes to position `cache_seqlens - s_q + i`: `cache_seqlens` counts
    the new rows already, as the decode that follows needs it. Append first and decode from the
    result: a program that decodes from the cache as it was has to keep a copy of it.

    Skipped, without a word: positions before the start (a padding sequence has length 0) or past
    the end of the table or cache, and page ids outside the pool. No two sequences may name the same
    position of a page for their new rows; if they do, either may be written.

    Rows for an FP8 cache are quantized as by `quantize_kv_cache`.

    `*G` stands for any number of leading group axes, the same on all operands.

    Args:
      k_cache: bfloat16, float16, or FP8: float8_e4m3fn or uint8. Paged: `[*G, num_blocks,
        page_block_size, h_kv, width]`; unpaged: `[*G, b, max_len, h_kv, width]`; with pages and
        rows as `flash_mla_with_kvcache` takes them. Columns past a row's stay as they are. Donate
        it to `jax.jit`, and the rows are written in place.
      new_kv: `[*G, b, s_q, h_kv, 576]`, dtype of `k_cache`; for FP8 caches bfloat16, float16 or
        float32. With `cu_seqlens_q`, packed: `[*G, total, h_kv, 576]`.
      block_table: `[*G, b, max_blocks]` int32, the page ids of each sequence, in order. `None`:
        the cache is unpaged.
      cache_seqlens: `[*G, b]` int32, the valid tokens of each sequence, the new ones included.
      cu_seqlens_q: `[*G, b + 1]` int32: the new rows of sequence `i` are `cu_seqlens_q[i]` to
        `cu_seqlens_q[i + 1]` of the packed ones, as many as it has; they go to its last positions.
        Entries are clamped to `[0, total]`; rows that are no sequence's are skipped.
      k_scale: `[*G]` float32, the scale of a float8_e4m3fn cache, and of no other.
      power_of_two_scales: the scales of new rows of a uint8 cache are powers of two.

    Returns:
      The cache with the rows in it.

    Raises:
      TypeError, ValueError: an argument has the wrong dtype, rank or shape.

    Example:
      The 65th token of a sequence is row 0 of its second page, which is page 7:

      >>> pool = jnp.zeros((8, 64, 1, 576), jnp.bfloat16)
      >>> new_kv = jnp.ones((1, 1, 1, 576), jnp.bfloat16)
      >>> table, lengths = jnp.array([[3, 7]], jnp.int32), jnp.array([65], jnp.int32)
      >>> pool = jax.jit(append_kv_cache, donate_argnums=0)(pool, new_kv, table, lengths)
      >>> print(pool[7, 0, 0, 0], pool[7, 1, 0, 0])
      1 0
    """
    k_cache = arguments.array("k_cache", k_cache)
    kind = format_of(k_cache)
    groups = k_cache.shape[:-4] if k_cache.ndim >= 4 else ("*G",)
    paged = block_table is not None
    check_cache(k_cache, groups, paged)
    h_kv = k_cache.shape[-2]
    k_scale = check_scale("k_scale", k_scale, kind, groups, "group axes as k_cache's")
    if arguments.static_bool("power_of_two_scales", power_of_two_scales) and kind != FP8_BLOCK:
        raise ValueError(
            f"power_of_two_scales: expected False for a cache of format {kind}, whose rows have no "
            "scales of their own, got True"
        )
    if kind in FP8_FORMATS:
        new_kv = rows_array("new_kv", new_kv)
    else:
        new_kv = arguments.array("new_kv", new_kv)
        if new_kv.dtype != k_cache.dtype:
            raise TypeError(f"new_kv: expected k_cache's dtype {k_cache.dtype}, got {new_kv.dtype}")
    if cu_seqlens_q is None:
        given = "group axes and h_kv as k_cache's" if paged else "all but s_q as k_cache's"
        batch = "b" if paged else k_cache.shape[-4]
        arguments.shape("new_kv", new_kv, (*groups, batch, "s_q", h_kv, HEAD_DIM), given)
        batch, of = new_kv.shape[-4], "new_kv"
    else:
        given = "group axes and h_kv as k_cache's"
        arguments.shape("new_kv", new_kv, (*groups, "total", h_kv, HEAD_DIM), given)
        partition.check_packed("new_kv", new_kv)
        cu_seqlens_q = ragged.check_cuts(cu_seqlens_q, groups, "group axes as k_cache's")
        batch, of = cu_seqlens_q.shape[-1] - 1, "cu_seqlens_q"
        if not paged and batch != k_cache.shape[-4]:
            raise ValueError(
                f"cu_seqlens_q: expected shape {[*groups, k_cache.shape[-4] + 1]} (b + 1 for "
                f"k_cache's b), got {list(cu_seqlens_q.shape)}"
            )
    block_table, cache_seqlens = arguments.table_and_lengths(
        block_table, cache_seqlens, groups, batch, f"b as {of}'s"
    )
    if paged:
        arguments.room(block_table, k_cache.shape[-3])
    if kind in FP8_FORMATS:
        new_kv = quantize_rows(new_kv, kind, k_scale, power_of_two_scales)
    if cu_seqlens_q is not None:
        return append_packed(k_cache, new_kv, block_table, cache_seqlens, cu_seqlens_q)

    table = [block_table] if paged else []
    (k_cache,) = append_p.bind(k_cache, new_kv, *table, cache_seqlens, devices=needs_devices())
    return k_cache


def append_packed(k_cache, new_kv, block_table, cache_seqlens, cu_seqlens_q):
    """Appends packed rows `[*G, total, h_kv, columns]`, which are in the cache's format.

    They are written with their padding, if they have any. The pages that an unpaged cache then has
    may be of any size.
    """
    total, page_size = new_kv.shape[-3], k_cache.shape[-3]
    targets = ragged.rows_as_sequences(cu_seqlens_q, total, block_table, cache_seqlens, page_size)
    rows = jnp.expand_dims(new_kv, -3)
    (k_cache,) = append_p.bind(k_cache, rows, *targets, devices=needs_devices())
    return k_cache


def _append(k_cache, new_kv, *table_and_lengths):
    """Writes rows, which are in the cache's format, all at once."""
    (*group, page, row), inside = _places(k_cache, new_kv, *table_and_lengths)
    # What is skipped goes to pages past the pool, a different one each: XLA may then assume that no
    # two rows have the same target, and write them all at once.
    batch, s_q = new_kv.shape[-4:-2]
    past = k_cache.shape[-4] + jnp.arange(batch * s_q, dtype=jnp.int32).reshape(batch, s_q)
    index = (*group, jnp.where(inside, page, past), row, slice(None), slice(new_kv.shape[-1]))
    return (k_cache.at[index].set(new_kv, mode="drop", unique_indices=True),)


def _append_on_cpu(k_cache, new_kv, *table_and_lengths):
    """The same, row by row into an e4m3 cache: XLA:CPU scatters them through a float16 copy."""
    if k_cache.dtype != FP8_PER_TENSOR.dtype:
        return _append(k_cache, new_kv, *table_and_lengths)
    if 0 in new_kv.shape or 0 in k_cache.shape:
        return (k_cache,)
    index, inside = _places(k_cache, new_kv, *table_and_lengths)
    index = [x.reshape(-1) for x in index]
    inside = inside.reshape(-1)
    rows = new_kv.reshape(-1, *[1] * len(index), *new_kv.shape[-2:])

    def write(i, pool):
        def update(pool):
            head = column = jnp.int32(0)  # not int64, whatever jax_enable_x64
            return lax.dynamic_update_slice(pool, rows[i], (*(x[i] for x in index), head, column))

        return lax.cond(inside[i], update, lambda pool: pool, pool)

    count = jnp.asarray(rows.shape[0], jnp.int32)  # which an exported program may not know yet
    return (lax.fori_loop(0, count, write, k_cache),)


def _places(k_cache, new_kv, *table_and_lengths):
    """Where in the cache new rows go, and whether there is such a place."""
    *table, cache_seqlens = table_and_lengths
    s_q = new_kv.shape[-3]
    position = cache_seqlens[..., None] + jnp.arange(-s_q, 0, dtype=jnp.int32)
    return find_rows(k_cache, table[0] if table else None, position)


def _abstract(k_cache, *operands, devices):
    del devices
    spec = None
    if partition.is_sharded([k_cache, *operands]):
        spec = partition.append_specs(k_cache, *operands)[0]
    return [result_aval([k_cache, *operands], k_cache.shape, k_cache.dtype, spec)]


def _lowering(ctx, *operands, devices, append=_append):
    """Devices share groups, KV heads and the sequences of an unpaged cache."""
    del devices
    paged = len(operands) == 4

    def divide(specs):
        *groups, batch, _, kv_heads, _ = specs[0]
        divided = partition.divide_append(groups, batch, kv_heads, paged)
        return append, divided, divided[:1]

    rule = partition.append_rule(ctx.avals_in[0].ndim - 4, paged)
    return lower_on_mesh(ctx, operands, append, rule, divide)


def _batcher(operands, dims, *, devices):
    """The mapped axis becomes one more group axis: every example has a pool of its own."""
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    mesh_axes = partition.mapped_axes(operands, dims)
    operands = [
        partition.repeat(x, 0, size, mesh_axes) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
    ]
    return append_p.bind(*operands, devices=devices), [0]


append_p = define_primitive(
    "append_kv_cache",
    abstract=_abstract,
    lowering=_lowering,
    platform_lowerings={"cpu": functools.partial(_lowering, append=_append_on_cpu)},
    batcher=_batcher,
)
