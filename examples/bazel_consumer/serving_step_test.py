"""A sequence of one token attends to that token alone."""

import jax
import jax.numpy as jnp
import numpy as np
from serving_step import serving_step


def test_the_first_token_is_its_own_output():
    """Whatever its query is."""
    keys = jax.random.split(jax.random.key(0), 2)
    q = jax.random.normal(keys[0], (2, 1, 16, 576), jnp.bfloat16)
    new_kv = jax.random.normal(keys[1], (2, 1, 1, 576), jnp.bfloat16)
    k_cache = jnp.full((3, 64, 1, 576), jnp.nan, jnp.bfloat16)
    block_table = jnp.array([[2], [0]], jnp.int32)
    cache_seqlens = jnp.ones(2, jnp.int32)

    k_cache, out, lse = serving_step(q, k_cache, new_kv, block_table, cache_seqlens)

    np.testing.assert_array_equal(k_cache[2, 0, 0], new_kv[0, 0, 0])
    want = np.broadcast_to(np.asarray(new_kv)[:, :, :, :512], out.shape)
    np.testing.assert_array_equal(out, want)
    scores = jnp.einsum("bshd,bsgd->bhs", q.astype(jnp.float32), new_kv.astype(jnp.float32))
    np.testing.assert_allclose(lse, scores / 24, rtol=1e-2, atol=1e-2)
