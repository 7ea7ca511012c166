"""append_kv_cache against a loop in NumPy, and in place."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flashmla import append_kv_cache, flash_mla_with_kvcache
from tests import oracle, problems
from tests.oracle import append as append_in_numpy
from tests.support import assert_same_bits, skip_if_scatters_copy

PAGE = 64


def draw(rng, shape, dtype=jnp.bfloat16):
    return rng.standard_normal(shape, np.float32).astype(dtype)


class AppendTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()

    def operands(self, lengths, s_q, h_kv=1, dtype=jnp.bfloat16, max_blocks=4):
        batch = len(lengths)
        pages = batch * max_blocks + 3
        table = self.rng.permutation(pages)[: batch * max_blocks].reshape(batch, max_blocks)
        k_cache = draw(self.rng, (pages, PAGE, h_kv, 576), dtype)
        k_cache[self.rng.integers(pages)] = np.nan  # old rows may be anything
        new_kv = draw(self.rng, (batch, s_q, h_kv, 576), dtype)
        return k_cache, new_kv, table.astype(np.int32), np.asarray(lengths, np.int32)

    @parameterized.product(
        s_q=(1, 2, 5, 70), h_kv=(1, 3), dtype=("bfloat16", "float16"), jit=(True, False)
    )
    def test_rows_around_page_boundaries(self, s_q, h_kv, dtype, jit):
        lengths = [0, 1, 2, 63, 64, 65, 128, 130, 256, 257, 300, -5]
        operands = self.operands(lengths, s_q, h_kv, jnp.dtype(dtype))
        append = jax.jit(append_kv_cache) if jit else append_kv_cache
        assert_same_bits(append(*operands), append_in_numpy(*operands))

    @settings(max_examples=30, deadline=None)
    @given(
        lengths=st.lists(
            st.integers(-(2**31), 2**31 - 1) | st.integers(0, 300), min_size=6, max_size=6
        ),
        pages=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=6, max_size=6),
    )
    def test_absurd_lengths_and_pages_are_skipped(self, lengths, pages):
        k_cache, new_kv, table, seqlens = self.operands(lengths, 2)
        table[:, 1] = [page if not 0 <= page < len(k_cache) else -1 for page in pages]
        operands = (k_cache, new_kv, table, seqlens)
        assert_same_bits(jax.jit(append_kv_cache)(*operands), append_in_numpy(*operands))

    def test_groups_are_independent_pools(self):
        parts = [self.operands([3, 0, 200, 64], 3) for _ in range(6)]
        stacked = [np.stack(x).reshape(2, 3, *x[0].shape) for x in zip(*parts, strict=True)]
        got = append_kv_cache(*stacked)
        for i, part in enumerate(parts):
            assert_same_bits(got[i // 3, i % 3], append_in_numpy(*part))

    def test_vmap_over_pools_and_over_rows(self):
        parts = [self.operands([3, 0, 200, 64], 1) for _ in range(2)]
        stacked = [jnp.stack(x) for x in zip(*parts, strict=True)]
        got = jax.vmap(append_kv_cache)(*stacked)
        for i, part in enumerate(parts):
            assert_same_bits(got[i], append_in_numpy(*part))
        rows = jax.vmap(append_kv_cache, in_axes=(None, 0, None, None))
        got = rows(parts[0][0], jnp.stack([parts[0][1], parts[1][1]]), *parts[0][2:])
        assert_same_bits(got[1], append_in_numpy(parts[0][0], parts[1][1], *parts[0][2:]))

    def test_vmap_of_an_unpaged_cache(self):
        pools, new_kv = draw(self.rng, (2, 3, 80, 1, 576)), draw(self.rng, (2, 3, 2, 1, 576))
        lengths = np.array([[0, 1, 80], [65, 81, 17]], np.int32)
        table = np.arange(3)[:, None]
        mapped = jax.vmap(lambda *x: append_kv_cache(x[0], x[1], None, x[2]))
        got = mapped(pools, new_kv, lengths)
        rows = jax.vmap(lambda x: append_kv_cache(pools[0], x, None, lengths[0]))(new_kv)
        for i in range(2):
            assert_same_bits(got[i], append_in_numpy(pools[i], new_kv[i], table, lengths[i]))
            assert_same_bits(rows[i], append_in_numpy(pools[0], new_kv[i], table, lengths[0]))

    def test_an_empty_batch(self):
        k_cache = draw(self.rng, (2, PAGE, 1, 576))
        empty = jnp.zeros((0, 1, 1, 576), k_cache.dtype), jnp.zeros((0, 3), jnp.int32)
        got = append_kv_cache(k_cache, *empty, jnp.zeros(0, jnp.int32))
        assert_same_bits(got, k_cache)

    def test_append_then_decode(self):
        # A cache that is filled row by row, as a server does, gives what a full one gives.
        problem = problems.make_problem(self.rng, [150, 64, 0, 7], s_q=3)
        pool = jnp.full(problem.k_cache.shape, jnp.nan, problem.k_cache.dtype)
        for end in range(3, 153, 3):
            lengths = np.minimum(end, problem.cache_seqlens)
            rows = np.zeros((4, 3, 1, 576), pool.dtype)
            for i, length in enumerate(lengths):
                for token, position in enumerate(range(length - 3, length)):
                    if position >= 0:
                        page = problem.block_table[i, position // PAGE]
                        rows[i, token] = problem.k_cache[page, position % PAGE]
            pool = append_kv_cache(pool, rows, problem.block_table, lengths)
        got = flash_mla_with_kvcache(
            problem.q, pool, problem.block_table, problem.cache_seqlens, causal=True
        )
        want = oracle.decode(*problem.arrays, causal=True)
        np.testing.assert_allclose(np.asarray(got[0], np.float32), want[0], atol=2e-2)
        np.testing.assert_allclose(got[1], want[1], atol=1e-4)


class InPlaceTest(absltest.TestCase):
    def test_no_copy_of_a_donated_pool(self):
        skip_if_scatters_copy(self)
        pool = jnp.zeros((500, PAGE, 1, 576), jnp.bfloat16)
        shapes = ((8, 2, 1, 576), (8, 60), (8,))
        dtypes = (jnp.bfloat16, jnp.int32, jnp.int32)
        rest = [jnp.ones(s, t) for s, t in zip(shapes, dtypes, strict=True)]
        append = jax.jit(append_kv_cache, donate_argnums=0).lower(pool, *rest).compile()
        memory = append.memory_analysis()
        self.assertEqual(memory.alias_size_in_bytes, pool.nbytes)
        self.assertLess(memory.temp_size_in_bytes, pool.nbytes / 100)
        before = pool.unsafe_buffer_pointer()
        self.assertEqual(append(pool, *rest).unsafe_buffer_pointer(), before)


class ErrorsTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("pool_dtype", 0, (9, 64, 1, 576), jnp.float32, TypeError, "k_cache: expected dtype"),
        ("pool_rank", 0, (64, 1, 576), jnp.bfloat16, ValueError, "k_cache: expected shape"),
        (
            "page_size",
            0,
            (9, 48, 1, 576),
            jnp.bfloat16,
            ValueError,
            "k_cache: expected pages of 1, 16, .* or 1024 tokens, got 48",
        ),
        ("width", 0, (9, 64, 1, 577), jnp.bfloat16, ValueError, "k_cache: .*of 8, got width 577"),
        ("rows_dtype", 1, (5, 1, 1, 576), jnp.float16, TypeError, "new_kv: expected k_cache's"),
        ("rows_heads", 1, (5, 1, 2, 576), jnp.bfloat16, ValueError, r"new_kv: .*got \[5, 1, 2"),
        ("rows_rank", 1, (5, 1, 576), jnp.bfloat16, ValueError, "new_kv: expected shape"),
        ("table_batch", 2, (4, 7), jnp.int32, ValueError, r"block_table: .*\[5, max_blocks\]"),
        ("table_dtype", 2, (5, 7), jnp.uint32, TypeError, "block_table: expected dtype int32"),
        ("table_empty", 2, (5, 0), jnp.int32, ValueError, "block_table: .*one column"),
        ("unpaged_batch", 2, None, None, ValueError, r"new_kv: .*\[9, s_q, 1, 576\] \(all but s_q"),
        ("lengths", 3, (4,), jnp.int32, ValueError, r"cache_seqlens: expected shape \[5\]"),
    )
    def test_bad_argument(self, index, shape, dtype, error, message):
        shapes = [(9, 64, 1, 576), (5, 1, 1, 576), (5, 7), (5,)]
        dtypes = [jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.int32]
        shapes[index], dtypes[index] = shape, dtype
        operands = [
            None if s is None else jax.ShapeDtypeStruct(s, t)
            for s, t in zip(shapes, dtypes, strict=True)
        ]
        with self.assertRaisesRegex(error, message):
            jax.eval_shape(append_kv_cache, *operands)


if __name__ == "__main__":
    absltest.main()
