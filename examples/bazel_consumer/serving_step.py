"""One step of a server: the newest row goes into the cache, then every sequence attends."""

import functools

import jax

from jax_flashmla import append_kv_cache, flash_mla_with_kvcache, get_mla_metadata


@functools.partial(jax.jit, donate_argnums=1)
def serving_step(q, k_cache, new_kv, block_table, cache_seqlens):
    """Returns the cache, the outputs and their log-sum-exps."""
    k_cache = append_kv_cache(k_cache, new_kv, block_table, cache_seqlens)
    metadata = get_mla_metadata(cache_seqlens, q.shape[1] * q.shape[2], 1)
    out, lse = flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 512, *metadata, causal=True
    )
    return k_cache, out, lse
