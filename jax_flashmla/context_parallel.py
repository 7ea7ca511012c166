"""Context parallelism: one sequence's keys spread over the devices of a mesh axis.

Every device keeps some pages of every sequence, in a pool and a page table of its own, decodes what
it has, and the partial results are merged through their log-sum-exps. All functions here are for
the body of a `jax.shard_map`: queries and lengths are the same on every device of the axis, pool
and page table are local.

Which device has which tokens is the *split*:

* `"interleaved"`: page `j` of a sequence is page `j // n` of device `j % n`: any length
  is spread evenly.
* `"contiguous"`: device `d` has the tokens from `d * C` on, where `C` is what its table holds,
  `max_blocks * page_block_size`: a prefill that was itself split contiguously stays where it is.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashmla import arguments
from jax_flashmla.arguments import HEAD_DIM, LATENT_DIM, PAGE_BLOCK_SIZE
from jax_flashmla.cache import append_kv_cache
from jax_flashmla.cache_layout import check_cache, check_page_size, find_rows
from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.merge import merge_attention_states
from jax_flashmla.promotion import own_promotions
from jax_flashmla.quantization import dequantize_rows

SPLITS = ("interleaved", "contiguous")


@own_promotions
def local_seqlens(
    cache_seqlens: jax.Array,
    max_blocks: int,
    *,
    axis_name: str,
    split: str = "interleaved",
    page_block_size: int = PAGE_BLOCK_SIZE,
) -> jax.Array:
    """How many of the first `cache_seqlens` tokens of each sequence this device has.

    Args:
      cache_seqlens: int32 of any shape, tokens of whole sequences.
      max_blocks: columns of this device's page table.
      axis_name: mesh axis (or a tuple of axes) that the keys are spread over.
      split: `"interleaved"` or `"contiguous"`.
      page_block_size: tokens of a page: 1, 16, 32, 64, 128, 256, 512 or 1024.

    Returns:
      int32 in the shape of `cache_seqlens`; always the first so many of the device's own tokens.
      Tokens for which the tables of all devices together have no room do not count.

    Raises:
      TypeError, ValueError: an argument has the wrong type or value.
    """
    lengths = arguments.int32_array("cache_seqlens", cache_seqlens)
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    device, devices = lax.axis_index(axis_name), lax.axis_size(axis_name)
    page = arguments.static_int("page_block_size", page_block_size)
    check_page_size("page_block_size", page)
    capacity = arguments.positive_int("max_blocks", max_blocks) * page
    lengths = jnp.clip(lengths, 0, devices * capacity)
    if split == "contiguous":
        return jnp.clip(lengths - device * capacity, 0, capacity)
    turn = devices * page  # tokens in one page of each device
    last_page = lengths % turn - device * page
    return lengths // turn * page + jnp.clip(last_page, 0, page)


@own_promotions
def append(
    k_cache: jax.Array,
    new_kv: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    axis_name: str,
    split: str = "interleaved",
    k_scale: jax.Array | None = None,
    power_of_two_scales: bool = False,
) -> jax.Array:
    """`append_kv_cache`, each row on the device that its position belongs to.

    Args:
      k_cache: `[*G, num_blocks, page_block_size, h_kv, width]`, this device's pool.
      new_kv: `[*G, b, s_q, h_kv, 576]`, the same on all devices of the axis.
      block_table: `[*G, b, max_blocks]` int32, this device's pages of each sequence, in order.
      cache_seqlens: `[*G, b]` int32, tokens of whole sequences, the new ones included.
      axis_name: mesh axis that the keys are spread over.
      split: `"interleaved"` or `"contiguous"`.
      k_scale: `[*G]` float32, this device's scale of a float8_e4m3fn pool.
      power_of_two_scales: as in `append_kv_cache`.

    Returns:
      This device's pool with the rows in it.

    Raises:
      TypeError, ValueError: an argument has the wrong dtype, rank, shape or value.
    """
    pages = _pages(k_cache, block_table)
    options = {"k_scale": k_scale, "power_of_two_scales": power_of_two_scales}
    new_kv = arguments.array("new_kv", new_kv)
    *groups, _, _, h_kv, _ = k_cache.shape
    expected = (*groups, "b", "s_q", h_kv, HEAD_DIM)
    arguments.shape("new_kv", new_kv, expected, "group axes and h_kv as k_cache's")
    cache_seqlens = arguments.int32_array("cache_seqlens", cache_seqlens)
    s_q = new_kv.shape[-3]
    if s_q == 0:  # nothing to write, but something to check
        return append_kv_cache(k_cache, new_kv, block_table, cache_seqlens, **options)
    for token in range(s_q):
        end = cache_seqlens - (s_q - 1 - token)
        have, had = (
            local_seqlens(lengths, axis_name=axis_name, split=split, **pages)
            for lengths in (end, end - 1)
        )
        # A length of 0 is a padding row, and skipped.
        mine = jnp.where((have > had) & (end > 0), have, 0)
        row = lax.slice_in_dim(new_kv, token, token + 1, axis=-3)
        k_cache = append_kv_cache(k_cache, row, block_table, mine, **options)
    return k_cache


@own_promotions
def decode(
    q: jax.Array | tuple[jax.Array, jax.Array],
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    axis_name: str,
    split: str = "interleaved",
    k_scale: jax.Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`flash_mla_with_kvcache` over keys that are spread over a mesh axis.

    One exchange over the axis: every device gathers the others' outputs, in 16 bits, with their
    `lse`. A device that has no key of a sequence contributes nothing to it.

    Args:
      q: `[*G, b, s_q, h_q, 576]`, or the pair; the same on all devices of the axis.
      k_cache: `[*G, num_blocks, page_block_size, h_kv, width]`, this device's pool.
      block_table: `[*G, b, max_blocks]` int32, this device's pages of each sequence, in order.
      cache_seqlens: `[*G, b]` int32, tokens of whole sequences, the new ones included.
      axis_name: mesh axis that the keys are spread over.
      split: `"interleaved"` or `"contiguous"`.
      k_scale: `[*G]` float32, this device's scale of a float8_e4m3fn pool.
      softmax_scale: default `576 ** -0.5`.
      causal: query `i` of `s_q` sees the keys up to `cache_seqlens - s_q + i`.
      implementation: as in `flash_mla_with_kvcache`.

    Returns:
      out and lse as `flash_mla_with_kvcache` returns them, the same on all devices of the axis.

    Raises:
      TypeError, ValueError, RuntimeError: as `flash_mla_with_kvcache`.
    """
    pages = _pages(k_cache, block_table)
    options = {"softmax_scale": softmax_scale, "implementation": implementation}
    s_q = arguments.queries(q)[0][0].shape[-3]
    cache_seqlens = arguments.int32_array("cache_seqlens", cache_seqlens)
    hidden = s_q - 1 if arguments.static_bool("causal", causal) else 0
    # As decode does with a length that the table has no room for.
    capacity = lax.axis_size(axis_name) * pages["max_blocks"] * pages["page_block_size"]
    cache_seqlens = jnp.clip(cache_seqlens, 0, capacity)
    # Every token of a sequence sees its first keys; which of the last `hidden` each sees depends on
    # where they lie, which no causal mask of one device can say.
    tokens = cache_seqlens[..., None] - jnp.arange(hidden, -1, -1, dtype=jnp.int32)
    visible = local_seqlens(tokens, axis_name=axis_name, split=split, **pages)
    out, lse = flash_mla_with_kvcache(
        q, k_cache, block_table, visible[..., 0], k_scale=k_scale, **options
    )
    if hidden:
        last = _attend_to_last(q, k_cache, block_table, visible, k_scale, softmax_scale)
        out, lse = merge_attention_states([out, last[0]], [lse, last[1]])

    # As integers, in which no compiler changes bits on the way, and in one array: small exchanges
    # cost latency each.
    out_bits = lax.bitcast_convert_type(out, jnp.uint16)
    lse_bits = lax.bitcast_convert_type(jnp.swapaxes(lse, -1, -2), jnp.uint16)
    state = jnp.concatenate([out_bits, lse_bits], axis=-1)
    states = lax.all_gather(state, axis_name, to="invarying")
    outs = lax.bitcast_convert_type(states[..., :LATENT_DIM], out.dtype)
    lses = lax.bitcast_convert_type(states[..., LATENT_DIM:], jnp.float32)
    return merge_attention_states(outs, jnp.swapaxes(lses, -1, -2))


def _pages(k_cache, block_table) -> dict[str, int]:
    """What `local_seqlens` asks about a device's pages."""
    if block_table is None:
        raise ValueError(
            "block_table: expected an array, since the keys of a sequence are spread over devices "
            "in pages, got None (an unpaged cache)"
        )
    k_cache = arguments.array("k_cache", k_cache)
    block_table = arguments.int32_array("block_table", block_table)
    check_cache(k_cache, k_cache.shape[:-4] if k_cache.ndim >= 4 else ("*G",), paged=True)
    if block_table.ndim < 2:
        expected = "[*G, b, max_blocks]"
        got = list(block_table.shape)
        raise ValueError(f"block_table: expected shape {expected}, got {got}")
    return {"max_blocks": block_table.shape[-1], "page_block_size": k_cache.shape[-3]}


def _attend_to_last(q, k_cache, block_table, visible, k_scale, softmax_scale):
    """Attends to the few keys that some tokens of a sequence see and others do not.

    `visible [*G, b, s_q]`: query `i` sees the device's keys from `visible[..., 0]` up to, not
    including, `visible[..., i]`.
    """
    h_kv = k_cache.shape[-2]
    first, s_q = visible[..., :1], visible.shape[-1]
    position = first + jnp.arange(s_q - 1, dtype=jnp.int32)
    (*group, page, row), inside = find_rows(k_cache, block_table, position)
    # A page id outside the pool reads as zeros, and so does what must not be read.
    readable = inside & (position < visible[..., -1:])
    keys = dequantize_rows(k_cache[(*group, jnp.where(readable, page, 0), row)], k_scale)
    keys = jnp.where(readable[..., None, None], keys, 0)

    rows = jnp.concatenate(q, -1) if isinstance(q, (tuple, list)) else q
    *leading, _, h_q, _ = rows.shape
    rows = rows.astype(jnp.float32).reshape(*leading, s_q, h_kv, h_q // h_kv, HEAD_DIM)
    scale = HEAD_DIM**-0.5 if softmax_scale is None else softmax_scale
    precision = lax.Precision.HIGHEST  # few rows, and not less exact than the others
    scores = scale * jnp.einsum("...sghd,...tgd->...ghst", rows, keys, precision=precision)
    seen = position[..., None, :] < visible[..., None]
    scores = jnp.where(seen[..., None, None, :, :], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(lse), 0, lse)[..., None])
    values = keys[..., :LATENT_DIM]
    out = jnp.einsum("...ghst,...tgv->...sghv", weights, values, precision=precision)
    dtype = (q[0] if isinstance(q, (tuple, list)) else q).dtype
    out = out.reshape(*leading, s_q, h_q, LATENT_DIM).astype(dtype)
    return out, lse.reshape(*leading, h_q, s_q)
