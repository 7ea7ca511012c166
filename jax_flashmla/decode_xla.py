"""MLA decode in plain JAX, for every platform: walks the keys with an online softmax.

A plain version gathers all pages that the table could hold and multiplies with the result. This one
reads some tokens of every sequence at a time, keeps a running maximum, sum and output per row, and
stops after the longest sequence, so that memory stays small and work follows the lengths.
"""

import dataclasses

import jax.export
import jax.numpy as jnp
from jax import lax

from jax_flashmla.arguments import LATENT_DIM
from jax_flashmla.cache_formats import format_of
from jax_flashmla.quantization import unpack_rows


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a platform walks the keys."""

    tokens_per_step: int  # at most, over all sequences together
    # At least; so that a step's temporaries (pages, their scores and weights, copies in other
    # layouts or types) stay below an eighth of the gathered cache.
    steps_per_table: int
    compute_dtype: jnp.dtype | None  # of the products' operands; None: as the queries


# A step costs some 45 µs of launches on a GPU: few, large ones.
ACCELERATOR_WALK = Walk(tokens_per_step=2**20, steps_per_table=16, compute_dtype=None)
# Small steps, which stay in a CPU's caches. XLA:CPU multiplies float32: for some shapes it fails at
# run time on bfloat16 operands (jaxlib 0.10 to 0.12: "Unsupported element type for
# DotThunk::Execute: BF16 x BF16 = F32").
CPU_WALK = Walk(tokens_per_step=2048, steps_per_table=64, compute_dtype=jnp.float32)

MAX_PIECE = 64  # tokens; larger pages are read in pieces, so that steps stay as small

# Where a row has seen no key yet. Finite, so that exp(-inf - start) is 0 and never NaN.
START_MAX = float(jnp.finfo(jnp.float32).min)


def decode_xla(
    q,
    k_cache,
    k_scale,
    block_table,
    cache_seqlens,
    *,
    softmax_scale,
    causal,
    sliding_window,
    logits_soft_cap,
    walk,
):
    """Decodes a batch from one pool.

    Args:
      q: a tuple of arrays `[b, s_q, h_q, .]` that together have the cache's 576 columns.
      k_cache: `[num_blocks, page, h_kv, width]`: rows in the format of its dtype, and perhaps
        padding.
      k_scale: `[b]` float32, what the rows of each sequence are to be multiplied with, or None.
      block_table: `[b, max_blocks]` int32.
      cache_seqlens: `[b]` int32.
      softmax_scale: float.
      causal: bool.
      sliding_window: int or None.
      logits_soft_cap: float or None.
      walk: how much to read at a time, and in which precision to multiply.

    Returns:
      out `[b, s_q, h_q, 512]` in q's dtype and lse `[b, h_q, s_q]` float32.
    """
    batch, s_q, h_q, _ = q[0].shape
    num_blocks, page, h_kv, _ = k_cache.shape
    max_blocks = block_table.shape[1]
    heads_per_kv = h_q // h_kv
    rows = (batch, h_kv, heads_per_kv, s_q)

    dtype, compute_dtype = q[0].dtype, walk.compute_dtype or q[0].dtype
    # [b, s_q, h_q, d] -> [b, h_kv, heads, s_q, d]: the heads that share a KV head are its rows.
    q = [
        part.reshape(batch, s_q, h_kv, heads_per_kv, part.shape[-1])
        .transpose(0, 2, 3, 1, 4)
        .astype(compute_dtype)
        for part in q
    ]
    lengths = jnp.clip(cache_seqlens, 0, max_blocks * page)
    visible = lengths[:, None]  # [b, 1 or s_q]: keys that a query may see
    if causal:
        visible = visible - s_q + 1 + jnp.arange(s_q, dtype=jnp.int32)
    # [b, 1 or s_q]: the first key that it may see.
    start = jnp.maximum(visible - sliding_window, 0) if sliding_window else jnp.zeros_like(visible)

    # Rows are multiplied as they are stored, and scores and sums with their scale.
    value_scale = 1 if k_scale is None else k_scale[:, None, None, None, None]
    scale = softmax_scale * value_scale

    piece = _piece_of(page)
    first_rows, pieces = _rows_of_pieces(block_table, num_blocks, page, piece)
    per_step = walk.tokens_per_step // (max(_extent(batch, 32), 1) * piece)
    per_step = max(1, min(per_step, _extent(pieces, 256) // walk.steps_per_table))
    tokens = per_step * piece
    # Written so that a symbolic extent is known to have room for a step.
    padded = (pieces + per_step - 1) // per_step * per_step
    first_rows = jnp.pad(first_rows, ((0, 0), (0, padded - pieces)))

    def attend_to_some_pages(step, carry):
        row_max, row_sum, out = carry
        positions = step * tokens + jnp.arange(tokens, dtype=jnp.int32)
        firsts = lax.dynamic_slice_in_dim(first_rows, step * per_step, per_step, axis=1)
        keys = _gather_rows(k_cache, firsts, piece, step)
        in_pool = jnp.repeat(firsts >= 0, piece, axis=1)
        readable = in_pool & (positions < lengths[:, None]) & (positions >= start[:, :1])
        # Zeros, not only masked scores: 0 * NaN would let a poisoned tail into the output.
        keys = jnp.where(readable[..., None, None], unpack_rows(keys, compute_dtype), 0)

        scores = scale * sum(
            jnp.einsum("bghsd,btgd->bghst", part, columns, preferred_element_type=jnp.float32)
            for part, columns in zip(q, _split_columns(keys, q), strict=True)
        )
        if logits_soft_cap is not None:
            scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
        seen = positions < visible[..., None]  # [b, 1 or s_q, tokens]
        seen &= positions >= start[..., None]
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)

        new_max = jnp.maximum(row_max, scores.max(axis=-1))
        weights = jnp.exp(scores - new_max[..., None])
        shrink = jnp.exp(row_max - new_max)
        update = jnp.einsum(
            "bghst,btgv->bghsv",
            weights.astype(compute_dtype),
            keys[..., :LATENT_DIM],
            preferred_element_type=jnp.float32,
        )
        return (
            new_max,
            row_sum * shrink + weights.sum(axis=-1),
            out * shrink[..., None] + update,
        )

    longest = jnp.max(lengths, initial=0)
    steps = (longest + tokens - 1) // tokens
    # Padding begins behind all others.
    first_step = jnp.min(jnp.where(lengths > 0, start[:, 0], longest), initial=longest) // tokens
    carry = (
        jnp.full(rows, START_MAX, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, LATENT_DIM), jnp.float32),
    )
    row_max, row_sum, out = lax.fori_loop(first_step, steps, attend_to_some_pages, carry)

    empty = row_sum == 0
    out = value_scale * out / jnp.where(empty, 1, row_sum)[..., None]
    out = jnp.where(empty[..., None], 0, out)
    lse = jnp.where(empty, -jnp.inf, row_max + jnp.log(row_sum))
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, s_q, h_q, LATENT_DIM)
    return out.astype(dtype), lse.reshape(batch, h_q, s_q)


def _extent(size, guess):
    """A shape's extent, or a guess where an exported program does not know it yet."""
    return guess if jax.export.is_symbolic_dim(size) else size


def _piece_of(page):
    """The most tokens, up to MAX_PIECE, into which a page can be cut without a rest."""
    if jax.export.is_symbolic_dim(page):  # of which a power of two may be known to be a factor
        candidates = [2**i for i in range(MAX_PIECE.bit_length())]
    else:
        candidates = range(1, MAX_PIECE + 1)
    return max(piece for piece in candidates if page % piece == 0)


def _rows_of_pieces(block_table, num_blocks, page, piece):
    """The first rows `[b, n]`, in the pool, of the pieces of each sequence, and `n`.

    A piece of a page outside the pool has -1.
    """
    batch, max_blocks = block_table.shape
    in_pool = (block_table >= 0) & (block_table < num_blocks)
    first_rows = jnp.where(in_pool, block_table, 0) * page
    pieces = page // piece
    first_rows = first_rows[..., None] + piece * jnp.arange(pieces, dtype=jnp.int32)
    first_rows = jnp.where(in_pool[..., None], first_rows, -1)
    return first_rows.reshape(batch, max_blocks * pieces), max_blocks * pieces


def _gather_rows(k_cache, firsts, count, step):
    """Reads `count` rows from each of `firsts [b, n]` on: `[b, n * count, h_kv, row_width]`.

    The barrier and the bitcast keep XLA:CPU (jaxlib 0.10) from gathering in float32 and hoisting a
    float32 copy of the whole pool out of the loop: the barrier ties the pool to the loop's step,
    and a gather of integers is left as it is. The pool becomes an array of rows without an
    axis of extent 1, about whose place in a layout XLA:CPU might disagree with itself and copy.
    """
    batch, pieces = firsts.shape
    num_blocks, page, h_kv, width = k_cache.shape
    row_width = format_of(k_cache).row_width
    heads = (h_kv,) if h_kv > 1 else ()
    pool = k_cache.reshape(num_blocks * page, *heads, width)
    pool, _ = lax.optimization_barrier((pool, step))
    pool = lax.bitcast_convert_type(pool, f"uint{8 * pool.dtype.itemsize}")
    keys = lax.gather(
        pool,
        jnp.maximum(firsts, 0)[..., None],
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(2, 2 + pool.ndim)),
            collapsed_slice_dims=(),
            start_index_map=(0,),
        ),
        slice_sizes=(count, *heads, row_width),
        mode="promise_in_bounds",
    )
    keys = lax.bitcast_convert_type(keys, k_cache.dtype)
    return keys.reshape(batch, pieces * count, h_kv, row_width)


def _split_columns(keys, q):
    """Cuts the columns of `keys` as the parts of `q` are cut."""
    if len(q) == 1:
        return [keys]
    return [keys[..., :LATENT_DIM], keys[..., LATENT_DIM:]]
