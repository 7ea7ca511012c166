"""The operation that the adapters share: append packed rows to a paged cache, then attend to it.

Operands, as in the three projects (`T`: tokens of the batch, some of them padding; `n`: room for
sequences):

* `ql_nope [T, h_q, 512]`, `q_pe [T, h_q, 64]`: absorbed queries of the new tokens, packed.
* `new_kv_c [T, 512]`, `new_k_pe [T, 64]`: the new tokens' rows.
* `cache_kv [pages, page_size / packing, packing, 640]`: the latent columns, then the
  rotary ones, each padded to a multiple of 128. Whatever the packing, a page's tokens are in order,
  so that a reshape which costs nothing gives this library's pages.
* `kv_lens [n]`: tokens of each sequence, the new ones included.
* `cu_q_lens [n + 1]`: where each sequence's new tokens begin among the `T`.
* `distribution [3]`: its last entry is the number of sequences. Everything about further ones may
  be anything. The others say which sequences a TPU kernel treats in which way: ignored.

All are bfloat16, or all float16; those that count are int32. A token sees the keys of its sequence
up to its own. Returned are the output `[T, h_q, 512]`, 0 for tokens of no sequence, and the cache,
with padding columns of the new rows set to 0, as the TPU kernels write them.

Arguments that are static, all keywords:

* `sm_scale`, `q_scale`, `k_scale`: their product scales the scores. `v_scale` scales the output.
* `sliding_window`, `soft_cap`: `sliding_window` and `logits_soft_cap` of `flash_mla_with_kvcache`.
* `mask_value`: `None` or a large negative number, which makes no difference: masked keys weigh
  nothing here.
* `debug_mode`: only `False`.

Without a bound on a sequence's new tokens every token is decoded as a sequence of its own, which
ends with it: the same result, and nothing wasted if all of them have one. A prefill is right, but
its tokens share no reads of the cache and each has a row of the page table.
"""

import jax
import jax.numpy as jnp

from jax_flashmla import arguments, cache_layout, ragged
from jax_flashmla.arguments import HEAD_DIM, LATENT_DIM, ROPE_DIM
from jax_flashmla.cache import append_packed
from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.promotion import own_promotions

LANES = 128  # both parts of a row are padded to multiples of so many columns
PADDED_DIM = LATENT_DIM + -(-ROPE_DIM // LANES) * LANES
NEVER = -1e4  # a score that weighs nothing: what masks may set


@own_promotions
def append_and_attend(
    ql_nope: jax.Array,
    q_pe: jax.Array,
    new_kv_c: jax.Array,
    new_k_pe: jax.Array,
    cache_kv: jax.Array,
    kv_lens: jax.Array,
    block_table: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    *,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    mask_value: float | None,
    q_scale: float | None,
    k_scale: float | None,
    v_scale: float | None,
    debug_mode: bool,
    max_seqlen_q: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Does it, with operands that are checked and a table `block_table [n, max_blocks]`.

    `max_seqlen_q` says how many new tokens a sequence has at most, if that is known.
    """
    scale = 1.0
    for name, factor in (("sm_scale", sm_scale), ("q_scale", q_scale), ("k_scale", k_scale)):
        if factor is not None:
            scale *= arguments.static_finite_float(name, factor)
    if abs(scale) > arguments.FLOAT32_MAX:
        raise ValueError(
            "sm_scale: expected a finite number, in float32 too, with q_scale and k_scale, got more"
        )
    if soft_cap is not None and arguments.static_finite_float("soft_cap", soft_cap) <= 0:
        raise ValueError(f"soft_cap: expected a positive number, got {soft_cap}")
    if mask_value is not None and not arguments.static_float("mask_value", mask_value) <= NEVER:
        raise ValueError(
            f"mask_value: expected None or at most {NEVER:g} (masked keys weigh nothing here), "
            f"got {mask_value}"
        )
    if debug_mode:
        raise ValueError("debug_mode: expected False, got True: there is no such mode here")

    count, total = kv_lens.shape[0], ql_nope.shape[0]
    if total == 0:
        return ql_nope, cache_kv
    sequences = jnp.clip(distribution[2], 0, count)
    cuts = jnp.where(jnp.arange(count + 1) <= sequences, cu_q_lens, cu_q_lens[sequences])
    pages, words, packing, width = cache_kv.shape
    k_cache = cache_kv.reshape(pages, words * packing, 1, width)
    padding = jnp.zeros((total, width - HEAD_DIM), k_cache.dtype)
    rows = jnp.concatenate([new_kv_c, new_k_pe, padding], axis=-1)
    k_cache = append_packed(k_cache, rows[:, None], block_table, kv_lens, cuts)

    options = {
        "softmax_scale": scale,
        "sliding_window": sliding_window,
        "logits_soft_cap": soft_cap,
    }
    if max_seqlen_q is None:
        sequence, behind, named = ragged.find_tokens(cuts, total)
        ends = jnp.where(named, ragged.take(kv_lens, sequence) - behind, 0)
        q = ql_nope[:, None], q_pe[:, None]
        out, _ = flash_mla_with_kvcache(q, k_cache, block_table[sequence], ends, **options)
        out = out[:, 0]
    else:
        out, _ = flash_mla_with_kvcache(
            (ql_nope, q_pe),
            k_cache,
            block_table,
            kv_lens,
            causal=True,
            cu_seqlens_q=cuts,
            max_seqlen_q=max_seqlen_q,
            **options,
        )
    if v_scale is not None:
        v_scale = arguments.static_finite_float("v_scale", v_scale)
        out = (out.astype(jnp.float32) * v_scale).astype(out.dtype)
    return out, k_cache.reshape(cache_kv.shape)


def check_operands(
    ql_nope, q_pe, new_kv_c, new_k_pe, cache_kv, kv_lens, page_indices, cu_q_lens, distribution
) -> tuple[jax.Array, ...]:
    """These operands as arrays.

    Raises:
      TypeError, ValueError: one is not supported; the message names it.
    """
    ql_nope = arguments.array("ql_nope", ql_nope)
    if ql_nope.dtype not in arguments.QUERY_DTYPES:
        raise TypeError(f"ql_nope: expected dtype bfloat16 or float16, got {ql_nope.dtype}")
    tokens, heads = ql_nope.shape[:2] if ql_nope.ndim == 3 else ("T", "h_q")
    arguments.shape("ql_nope", ql_nope, (tokens, heads, LATENT_DIM))
    if heads == 0:
        raise ValueError("ql_nope: expected at least one head, got h_q 0")
    rows = []
    for name, value, shape, given in (
        ("q_pe", q_pe, (tokens, heads, ROPE_DIM), "T and h_q as ql_nope's"),
        ("new_kv_c", new_kv_c, (tokens, LATENT_DIM), "T as ql_nope's"),
        ("new_k_pe", new_k_pe, (tokens, ROPE_DIM), "T as ql_nope's"),
        ("cache_kv", cache_kv, ("pages", "page_size / packing", "packing", PADDED_DIM), ""),
    ):
        value = arguments.array(name, value)
        if value.dtype != ql_nope.dtype:
            raise TypeError(f"{name}: expected ql_nope's dtype {ql_nope.dtype}, got {value.dtype}")
        arguments.shape(name, value, shape, given)
        rows.append(value)
    pages, words, packing, _ = rows[-1].shape
    if pages == 0:
        raise ValueError("cache_kv: expected at least one page, got pages 0")
    cache_layout.check_page_size("cache_kv", words * packing)
    kv_lens = arguments.int32_array("kv_lens", kv_lens)
    arguments.shape("kv_lens", kv_lens, ("n",))
    count = kv_lens.shape[0]
    if count == 0:
        raise ValueError("kv_lens: expected room for at least one sequence, got shape [0]")
    listed = []
    for name, value, shape in (
        ("page_indices", page_indices, ("num_page_indices",)),
        ("cu_q_lens", cu_q_lens, (count + 1,)),
        ("distribution", distribution, (3,)),
    ):
        listed.append(arguments.int32_array(name, value))
        arguments.shape(name, listed[-1], shape)
    return ql_nope, *rows, kv_lens, *listed


def table_of_equal_rows(page_indices: jax.Array, kv_lens: jax.Array) -> jax.Array:
    """The page table that lies in `page_indices [n * pages_per_seq]`."""
    count, listed = kv_lens.shape[0], page_indices.shape[0]
    if listed == 0 or listed % count:
        raise ValueError(
            f"page_indices: expected a positive multiple of {count} entries (kv_lens's n), got "
            f"{listed}"
        )
    return page_indices.reshape(count, listed // count)
