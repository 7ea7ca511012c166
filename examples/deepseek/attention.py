"""Multi-head latent attention (arXiv 2405.04434, section 2.1): its weights and its two forms.

What a token leaves in the cache is one row of 576 columns: a normalised latent, from which keys and
values of every head can be computed, and a rotated key part that all heads share. *Expanded*, as in
prefill and training, keys and values are computed from the latents. *Absorbed*, as in decode, the
map from latents to keys goes to the query instead, and the one to values is applied to the
attention's output, so that only cache rows are read.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.deepseek.config import LATENT_DIM, ROPE_DIM, Config
from examples.deepseek.rope import rotate, softmax_scale
from jax_flashmla import (
    FP8_BLOCK,
    MLAMetadata,
    append_kv_cache,
    dequantize_kv_cache,
    flash_mla_with_kvcache,
)

PAGE = 64
KEY_PAGES = 8  # of prefill's steps through the keys


class Attention(nnx.Module):
    """One layer's projections. On a mesh each device has some of the heads."""

    def __init__(self, config: Config, *, dtype, rngs: nnx.Rngs):
        """Random weights; `dtype` is that of weights and results."""
        linear = functools.partial(
            nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        norm = functools.partial(
            nnx.RMSNorm, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.config = config
        if config.q_lora_rank is None:
            self.q = linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a = linear(hidden, config.q_lora_rank)
            self.q_norm = norm(config.q_lora_rank)
            self.q = linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a = linear(hidden, LATENT_DIM + ROPE_DIM)
        self.kv_norm = norm(LATENT_DIM)
        draw = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2, batch_axis=0)
        key_shape = heads, config.qk_nope_head_dim, LATENT_DIM
        value_shape = heads, config.v_head_dim, LATENT_DIM
        self.k_up = nnx.Param(draw(rngs.params(), key_shape, dtype))  # latent to a head's key
        self.v_up = nnx.Param(draw(rngs.params(), value_shape, dtype))  # and to its value
        self.o = linear(heads * config.v_head_dim, hidden)

    def queries(self, x: jax.Array, positions: jax.Array):
        """`[*n, hidden]` to `q_nope [*n, heads, nope]` and the rotated `q_rope [*n, heads, 64]`."""
        if self.config.q_lora_rank is not None:
            x = self.q_norm(self.q_a(x))
        q = self.q(x)
        q = q.reshape(*q.shape[:-1], -1, self.config.qk_head_dim)
        q_nope, q_rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
        return q_nope, rotate(q_rope, positions[..., None], self.config)

    def rows(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """`[*n, hidden]` to what the cache keeps, `[*n, 576]`."""
        latent, rope = jnp.split(self.kv_a(x), [LATENT_DIM], axis=-1)
        rope = rotate(rope, positions, self.config)
        return jnp.concatenate([self.kv_norm(latent), rope], axis=-1)

    def absorb(self, q_nope: jax.Array) -> jax.Array:
        """Queries `[*n, heads, nope]` to those against latents, `[*n, heads, 512]`."""
        return jnp.einsum("...hd,hdl->...hl", q_nope, self.k_up[...])

    def values(self, latents: jax.Array) -> jax.Array:
        """Weighted latents `[*n, heads, 512]` to weighted values `[*n, heads, v]`."""
        return jnp.einsum("...hl,hvl->...hv", latents.astype(self.v_up.dtype), self.v_up[...])

    def project(self, values: jax.Array) -> jax.Array:
        """`[*n, heads, v]` to `[*n, hidden]`, the part of this device's heads."""
        return self.o(values.reshape(*values.shape[:-2], -1))

    def expand(self, rows: jax.Array):
        """Cache rows `[*n, 576]` to keys `[*n, heads, nope + 64]` and values `[*n, heads, v]`."""
        latent, rope = jnp.split(rows, [LATENT_DIM], axis=-1)
        nope = jnp.einsum("...l,hdl->...hd", latent, self.k_up[...])
        rope = jnp.broadcast_to(rope[..., None, :], (*nope.shape[:-1], ROPE_DIM))
        values = jnp.einsum("...l,hvl->...hv", latent, self.v_up[...])
        return jnp.concatenate([nope, rope], axis=-1), values


def attend_to_sequence(attention: Attention, x: jax.Array) -> jax.Array:
    """Causal attention of whole sequences, without a cache: for training.

    `[batch, tokens, hidden]` to `[batch, tokens, hidden]`.
    """
    positions = jnp.arange(x.shape[1])
    q = jnp.concatenate(attention.queries(x, positions), axis=-1)
    keys, values = attention.expand(attention.rows(x, positions))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(positions[:, None] >= positions, scores, -jnp.inf)
    weights = nnx.softmax(scores * softmax_scale(attention.config)).astype(values.dtype)
    return attention.project(jnp.einsum("bhqk,bkhv->bqhv", weights, values))


class Step(NamedTuple):
    """What all layers of a decode share: `g` pools with `b` sequences each."""

    block_table: jax.Array  # [g, b, max_blocks] int32
    cache_seqlens: jax.Array  # [g, b] int32, the new tokens included
    metadata: MLAMetadata | None


def append(pool, rows, block_table, cache_seqlens):
    """`append_kv_cache` for rows `[g, b, t, 576]` of any dtype, which take the pool's.

    The library's pools are of 16 or 8 bits; float32 ones, for tests, are written here by its
    contract.
    """
    rows = rows[..., None, :]
    if pool.dtype == FP8_BLOCK.dtype:
        return append_kv_cache(pool, rows, block_table, cache_seqlens)
    rows = rows.astype(pool.dtype)
    if pool.dtype.itemsize == 2:
        return append_kv_cache(pool, rows, block_table, cache_seqlens)
    position = cache_seqlens[..., None] + jnp.arange(-rows.shape[2], 0)
    column = jnp.maximum(position // PAGE, 0)
    page = jnp.take_along_axis(block_table, column, -1, mode="fill", fill_value=-1)
    page = jnp.where((position >= 0) & (page >= 0), page, pool.shape[1])
    group = jnp.arange(pool.shape[0])[:, None, None]
    return pool.at[group, page, position % PAGE].set(rows, mode="drop")


def attend_with_flash_mla(q, pool, step, scale, implementation=None):
    """Absorbed decode through `jax_flashmla`, in 16 bits.

    Args:
      q: `(q_nope [n, heads, 512], q_rope [n, heads, 64])`, n = g b.
      pool: `[g, num_pages, 64, 1, width]` bfloat16 or float16, or in the format `FP8_BLOCK`, the
        new rows in it.
      step: a `Step`.
      scale: the softmax's.
      implementation: of `flash_mla_with_kvcache`.

    Returns:
      weighted latents `[n, heads, 512]` in the pool's dtype, or bfloat16.
    """
    groups = step.cache_seqlens.shape
    dtype = jnp.bfloat16 if pool.dtype == FP8_BLOCK.dtype else pool.dtype
    out, _ = flash_mla_with_kvcache(
        tuple(x.reshape(*groups, 1, *x.shape[1:]).astype(dtype) for x in q),
        pool,
        step.block_table,
        step.cache_seqlens,
        LATENT_DIM,
        *(step.metadata or ()),
        softmax_scale=scale,
        implementation=implementation,
    )
    return out.reshape(-1, *out.shape[3:])


def attend_plainly(q, pool, step, scale, implementation=None):
    """The same in the arithmetic of `q`, for tests in float32: gathers all that tables name."""
    del implementation  # there is one
    groups = step.cache_seqlens.shape
    q = jnp.concatenate(q, axis=-1)
    q = q.reshape(*groups, *q.shape[1:])
    keys = jax.vmap(gather)(pool, step.block_table)  # [g, b, tokens, 576]
    seen = jnp.arange(keys.shape[2]) < step.cache_seqlens[..., None]
    keys = jnp.where(seen[..., None], keys, 0)  # 0 * NaN is NaN
    scores = jnp.einsum("gbhd,gbtd->gbht", q, keys) * scale
    scores = jnp.where(seen[:, :, None], scores, -1e30)  # finite: padding rows see nothing
    out = jnp.einsum("gbht,gbtl->gbhl", nnx.softmax(scores), keys[..., :LATENT_DIM])
    return out.reshape(-1, *out.shape[2:])


def gather(pool, table):
    """The rows of the pages that a table `[*n, blocks]` names: `[*n, blocks * 64, 576]`.

    Pages outside the pool give some other page's rows.
    """
    rows = pool[jnp.clip(table, 0, pool.shape[0] - 1)]
    return rows.reshape(*table.shape[:-1], -1, rows.shape[-1])


def attend_to_pages(attention: Attention, q, pool, table, start, length):
    """Expanded causal attention of one sequence's newest tokens to its pages, for prefill.

    Walks the keys with a running maximum and sum, so that memory does not grow with the context.

    Args:
      attention: whose keys and values.
      q: `[t, heads, nope + 64]`, at positions `start` to `start + t - 1`.
      pool: `[num_pages, 64, 1, width]`, the new tokens' rows in it.
      table: `[max_blocks]` int32.
      start: int32.
      length: int32, tokens of the sequence; later rows of its pages may hold anything.

    Returns:
      weighted values `[t, heads, v]`.
    """
    tokens, heads = q.shape[:2]
    keys_at_once = KEY_PAGES * PAGE
    table = jnp.pad(table, (0, -len(table) % KEY_PAGES))
    own = start + jnp.arange(tokens)
    scale = softmax_scale(attention.config)

    def walk(number, carry):
        top, total, out = carry
        position = number * keys_at_once + jnp.arange(keys_at_once)
        pages = jax.lax.dynamic_slice_in_dim(table, number * KEY_PAGES, KEY_PAGES)
        # Zeros, not only weights of zero: 0 * NaN is NaN.
        rows = gather(pool, pages)
        if pool.dtype == FP8_BLOCK.dtype:
            rows = dequantize_kv_cache(rows[None, :, None], dtype=q.dtype)[0, :, 0]
        rows = jnp.where((position < length)[:, None], rows, 0).astype(q.dtype)
        keys, values = attention.expand(rows)
        scores = jnp.einsum("qhd,khd->hqk", q, keys, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(position <= own[:, None], scores, -jnp.inf)
        # The first keys are seen by all queries: from then on the maximum is finite.
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        part = jnp.einsum(
            "hqk,khv->hqv",
            weights.astype(q.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + part

    # Inside a shard_map a loop's carry has to vary from the start over the mesh axes over which it
    # will vary: those of the table and of q.
    zero = 0.0 * (table[0] + q[0, 0, 0].astype(jnp.int32))
    empty = (
        jnp.full((heads, tokens), -jnp.inf) + zero,
        jnp.zeros((heads, tokens)) + zero,
        jnp.zeros((heads, tokens, attention.config.v_head_dim)) + zero,
    )
    _, total, out = jax.lax.fori_loop(0, -(-length // keys_at_once), walk, empty)
    return (out / total[..., None]).astype(q.dtype).swapaxes(0, 1)
