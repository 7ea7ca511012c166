"""No program of appends and decodes copies a pool: from the compiled program's memory."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

from jax_flashmla import append_kv_cache, flash_mla_with_kvcache, get_mla_metadata
from tests import oracle, problems, support

LAYERS, PAGES, BATCH = 4, 1000, 4
POOL_BYTES = PAGES * 64 * 576 * 2  # of a layer


def decode(pool, q, block_table, cache_seqlens):
    metadata = get_mla_metadata(cache_seqlens, q.shape[-2], 1)
    return flash_mla_with_kvcache(q, pool, block_table, cache_seqlens, 512, *metadata)


def append_and_decode(pool, q, new_kv, block_table, cache_seqlens):
    pool = append_kv_cache(pool, new_kv, block_table, cache_seqlens)
    return pool, *decode(pool, q, block_table, cache_seqlens)


def scan_over_layers(pool, q, new_kv, block_table, cache_seqlens):
    """All layers' pages in one pool: a layer's pages are the table's, moved on."""

    def layer(carry, number):
        pool, q = carry
        table = block_table + number * (pool.shape[0] // LAYERS)
        pool, out, lse = append_and_decode(pool, q, new_kv, table, cache_seqlens)
        return (pool, q.at[..., :512].set(out)), lse

    (pool, q), lses = lax.scan(layer, (pool, q), jnp.arange(LAYERS, dtype=jnp.int32))
    return pool, q, lses


def unrolled_layers(pools, q, new_kv, block_table, cache_seqlens):
    """A pool for each layer."""
    new_pools = []
    for pool in pools:
        pool, out, _ = append_and_decode(pool, q, new_kv, block_table, cache_seqlens)
        q = q.at[..., :512].set(out)
        new_pools.append(pool)
    return new_pools, q


def operands(pages):
    shapes = (pages, 64, 1, 576), (BATCH, 1, 16, 576), (BATCH, 1, 1, 576), (BATCH, 20), (BATCH,)
    dtypes = jnp.bfloat16, jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.int32
    return [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes, strict=True)]


def as_it_is(pool, *rest):
    return pool, *rest


def packed(pool, *rest):
    """Pages as JAX servers pack them, two tokens to 32 bits: `[pages, page / 2, 2, 640]`."""
    pages, pairs, _, width = pool.shape
    return pool.reshape(pages, 2 * pairs, 1, width), *rest


def unpaged(pool, q, table, lengths):
    del table
    return pool, q, None, lengths


LAYOUTS = (
    (as_it_is, (PAGES, 64, 1, 576)),
    (as_it_is, (PAGES * 64, 1, 1, 576)),
    (as_it_is, (PAGES // 8, 512, 1, 576)),
    (as_it_is, (PAGES, 64, 1, 640)),
    (packed, (PAGES, 32, 2, 640)),
    (packed, (PAGES * 4, 8, 2, 640)),
    (unpaged, (BATCH, PAGES * 16, 1, 576)),
    (unpaged, (BATCH, PAGES * 16 + 7, 1, 640)),
)


class MemoryTest(parameterized.TestCase):
    def check_donated(self, fun, args):
        support.skip_if_scatters_copy(self)
        memory = jax.jit(fun, donate_argnums=0).lower(*args).compile().memory_analysis()
        pool = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args[0]))
        self.assertEqual(memory.alias_size_in_bytes, pool)
        self.assertLess(memory.temp_size_in_bytes, POOL_BYTES / 4)

    @parameterized.parameters(*LAYOUTS)
    def test_decode(self, layout, shape):
        _, q, _, table, lengths = operands(PAGES)
        pool = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        fun = jax.jit(lambda *operands: decode(*layout(*operands)))
        memory = fun.lower(pool, q, table, lengths).compile().memory_analysis()
        self.assertGreaterEqual(memory.argument_size_in_bytes, POOL_BYTES)
        self.assertLess(memory.temp_size_in_bytes, POOL_BYTES / 4)

    @parameterized.parameters(*LAYOUTS)
    def test_append_and_decode(self, layout, shape):
        def step(pool, q, new_kv, table, lengths):
            cache, q, table, lengths = layout(pool, q, table, lengths)
            cache, *results = append_and_decode(cache, q, new_kv, table, lengths)
            return cache.reshape(pool.shape), *results

        _, *rest = operands(PAGES)
        self.check_donated(step, (jax.ShapeDtypeStruct(shape, jnp.bfloat16), *rest))

    def test_scan_over_layers(self):
        self.check_donated(scan_over_layers, operands(LAYERS * PAGES))

    def test_unrolled_layers(self):
        pool, *rest = operands(PAGES)
        self.check_donated(unrolled_layers, ([pool] * LAYERS, *rest))

    def test_the_scan_is_right(self):
        rng = np.random.default_rng()
        problem = problems.make_problem(rng, [3, 0, 200, 64])
        # Keys that become smaller: rounded outputs are the next layer's queries. With keys of full
        # size, rounding a weight could move a later sum by 0.2.
        pools = np.concatenate([problem.k_cache / (2 + i) for i in range(LAYERS)])
        new_kv = (rng.standard_normal((BATCH, 1, 1, 576)) / 2).astype(pools.dtype)
        got = jax.jit(scan_over_layers)(pools, problem.q, new_kv, *problem.arrays[2:])
        q = problem.q
        for i, pool in enumerate(np.split(np.asarray(got[0]), LAYERS)):
            out, lse = oracle.decode(q, pool, *problem.arrays[2:])
            np.testing.assert_allclose(got[2][i], lse, atol=3e-2, rtol=1e-2)
            q = q.copy()
            q[..., :512] = out.astype(q.dtype)
        np.testing.assert_allclose(
            np.asarray(got[1], np.float32), q.astype(np.float32), atol=5e-2, rtol=5e-2
        )


if __name__ == "__main__":
    absltest.main()
