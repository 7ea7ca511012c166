"""Packed new rows, and tables in CSR form: against loops in NumPy, and in place."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flashmla import append_kv_cache, block_table_from_csr, flash_mla_with_kvcache
from tests import oracle, problems, support
from tests.problems import pack

LENGTHS = (0, 1, 63, 64, 65, 130, 7, 300)


class AppendTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()

    def draw(self, *shape):
        return self.rng.standard_normal(shape, np.float32).astype(jnp.bfloat16)

    def operands(self, lengths=LENGTHS, most=5, h_kv=1, page=64, width=576, blocks=6):
        batch = len(lengths)
        pages = batch * blocks + 3
        table = self.rng.permutation(pages)[: batch * blocks].reshape(batch, blocks)
        rows, cuts = pack(self.rng, self.draw(batch, most, h_kv, 576), most)
        k_cache = self.draw(pages, page, h_kv, width)
        return k_cache, rows, table.astype(np.int32), np.asarray(lengths, np.int32), cuts

    @parameterized.product(most=(1, 5, 70), h_kv=(1, 3), page=(1, 16, 64), width=(576, 640))
    def test_append(self, most, h_kv, page, width):
        lengths = (*LENGTHS, 384, 385, 400, -5)  # some past the table
        k_cache, rows, table, lengths, cuts = self.operands(lengths, most, h_kv, page, width)
        got = jax.jit(append_kv_cache)(k_cache, rows, table, lengths, cu_seqlens_q=cuts)
        want = oracle.append_packed(k_cache, rows, table, lengths, cuts)
        support.assert_same_bits(got, want)

    def test_pages_outside_of_the_pool_are_skipped(self):
        k_cache, rows, table, lengths, cuts = self.operands()
        table[::2, 0] = [-1, len(k_cache), 2**31 - 1, -(2**31)]
        got = append_kv_cache(k_cache, rows, table, lengths, cu_seqlens_q=cuts)
        want = oracle.append_packed(k_cache, rows, table, lengths, cuts)
        support.assert_same_bits(got, want)

    def test_unpaged(self):
        lengths = np.array([0, 1, 80, 81, 17, 79], np.int32)
        k_cache = self.draw(6, 80, 2, 640)
        rows, cuts = pack(self.rng, self.draw(6, 3, 2, 576), 3)
        got = append_kv_cache(k_cache, rows, None, lengths, cu_seqlens_q=cuts)
        table = np.arange(6)[:, None]
        support.assert_same_bits(got, oracle.append_packed(k_cache, rows, table, lengths, cuts))

    def test_groups_and_vmap(self):
        parts = [self.operands() for _ in range(2)]
        total = max(len(x[1]) for x in parts)
        parts = [(x[0], np.resize(x[1], (total, 1, 576)), *x[2:]) for x in parts]
        *stacked, cuts = (np.stack(x) for x in zip(*parts, strict=True))
        groups = append_kv_cache(*stacked, cu_seqlens_q=cuts)
        mapped = jax.vmap(lambda *x: append_kv_cache(*x[:4], cu_seqlens_q=x[4]))(*stacked, cuts)
        for i, part in enumerate(parts):
            want = oracle.append_packed(*part)
            support.assert_same_bits(groups[i], want)
            support.assert_same_bits(mapped[i], want)

    @settings(max_examples=25, deadline=None)
    @given(
        cuts=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 8), min_size=5, max_size=5)
    )
    def test_malformed_cuts(self, cuts):
        # Rows go to some sequence that names them, or nowhere; the rest of the pool stays.
        k_cache, _, table, lengths, _ = self.operands((3, 70, 0, 64))
        rows, cuts = self.draw(6, 1, 576), np.array(cuts, np.int64).astype(np.int32)
        got = np.asarray(append_kv_cache(k_cache, rows, table, lengths, cu_seqlens_q=cuts))
        changed = (got.view(np.uint16) != k_cache.view(np.uint16)).any((-1, -2))
        clamped = np.clip(cuts, 0, 6)
        allowed = {}
        for i, (start, stop) in enumerate(itertools.pairwise(clamped)):
            for t in range(start, stop):
                position = lengths[i] - stop + t
                if position >= 0:
                    place = int(table[i, position // 64]), int(position % 64)
                    allowed.setdefault(place, []).append(rows[t].view(np.uint16))
        for place in zip(*np.nonzero(changed), strict=True):
            self.assertIn(place, allowed)
            written = got[place].view(np.uint16)
            self.assertTrue(any((written == row).all() for row in allowed[place]))

    def test_append_then_decode(self):
        problem = problems.make_problem(self.rng, LENGTHS, s_q=4, shared_pages=10**6)
        q, cuts = pack(self.rng, problem.q, 4)
        rows = np.full((len(q), 1, 576), np.nan, q.dtype)
        pool = problem.k_cache.copy()
        for i, length in enumerate(problem.cache_seqlens):
            for t in range(cuts[i], cuts[i + 1]):
                position = length - cuts[i + 1] + t
                if position >= 0:
                    place = problem.block_table[i, position // 64], position % 64
                    rows[t], pool[place] = pool[place], np.nan

        @jax.jit
        def step(pool, q, rows, table, lengths, cuts):
            pool = append_kv_cache(pool, rows, table, lengths, cu_seqlens_q=cuts)
            return flash_mla_with_kvcache(
                q, pool, table, lengths, causal=True, cu_seqlens_q=cuts, max_seqlen_q=4
            )

        out, lse = step(pool, q, rows, *problem.arrays[2:], cuts)
        want = oracle.decode_packed(q, *problem.arrays[1:], cuts, causal=True)
        np.testing.assert_allclose(np.asarray(out, np.float32), want[0], atol=2e-2)
        np.testing.assert_allclose(lse, want[1], atol=1e-4)


class CsrTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()

    @parameterized.product(spare=(0, 5), max_blocks=(1, 4, 9), jit=(False, True))
    def test_table(self, spare, max_blocks, jit):
        counts = np.array([3, 0, 1, 7, 0])
        kv_indptr = np.append(0, np.cumsum(counts)).astype(np.int32)
        pages = self.rng.permutation(50)[: counts.sum()].astype(np.int32)
        kv_indices = np.append(pages, np.full(spare, -1, np.int32))
        make = jax.jit(block_table_from_csr, static_argnums=2) if jit else block_table_from_csr
        got = make(kv_indptr, kv_indices, max_blocks)
        want = np.full((5, max_blocks), -1)
        for i, (start, stop) in enumerate(itertools.pairwise(kv_indptr)):
            named = pages[start:stop][:max_blocks]
            want[i, : len(named)] = named
        np.testing.assert_array_equal(got, want)
        self.assertEqual(got.dtype, jnp.int32)

    @settings(max_examples=50, deadline=None)
    @given(
        kv_indptr=st.lists(
            st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 9), min_size=1, max_size=5
        ),
        listed=st.integers(0, 6),
    )
    def test_nothing_outside_is_read(self, kv_indptr, listed):
        pages = np.arange(100, 100 + listed, dtype=np.int32)
        got = block_table_from_csr(np.array(kv_indptr, np.int64).astype(np.int32), pages, 4)
        for row, start, stop in zip(got, kv_indptr[:-1], kv_indptr[1:], strict=True):
            for j, entry in enumerate(row):
                inside = start >= 0 and start + j < min(stop, listed)
                self.assertEqual(entry, 100 + start + j if inside else -1)

    def test_groups_and_vmap(self):
        kv_indptr = np.array([[0, 2, 3], [1, 1, 4]], np.int32)
        kv_indices = self.rng.integers(0, 99, (2, 4)).astype(np.int32)
        groups = block_table_from_csr(kv_indptr, kv_indices, 3)
        mapped = jax.vmap(lambda *x: block_table_from_csr(*x, 3))(kv_indptr, kv_indices)
        for i in range(2):
            want = block_table_from_csr(kv_indptr[i], kv_indices[i], 3)
            np.testing.assert_array_equal(groups[i], want)
            np.testing.assert_array_equal(mapped[i], want)

    def test_decode_of_a_csr_table(self):
        problem = problems.make_problem(self.rng, LENGTHS)
        counts = -(-problem.cache_seqlens // 64)
        listed = [row[:n] for row, n in zip(problem.block_table, counts, strict=True)]
        kv_indptr = np.append(0, np.cumsum(counts)).astype(np.int32)
        table = block_table_from_csr(kv_indptr, np.concatenate(listed), 9)
        got = flash_mla_with_kvcache(problem.q, problem.k_cache, table, problem.cache_seqlens)
        want = flash_mla_with_kvcache(*problem.arrays)
        support.assert_same_bits(got[0], want[0])


class InPlaceTest(parameterized.TestCase):
    @parameterized.parameters((False, 576), (False, 640), (True, 576))
    def test_no_copy_of_a_donated_pool(self, unpaged, width):
        support.skip_if_scatters_copy(self)
        pool = jnp.zeros((8, 4000, 1, width) if unpaged else (500, 64, 1, width), jnp.bfloat16)
        rows = jnp.ones((20, 1, 576), jnp.bfloat16)
        table = None if unpaged else jnp.ones((8, 60), jnp.int32)
        cuts = jnp.array([0, 1, 1, 5, 6, 7, 8, 12, 20], jnp.int32)
        rest = rows, table, jnp.full(8, 100, jnp.int32), cuts
        fun = jax.jit(lambda *x: append_kv_cache(*x[:-1], cu_seqlens_q=x[-1]), donate_argnums=0)
        append = fun.lower(pool, *rest).compile()
        memory = append.memory_analysis()
        self.assertEqual(memory.alias_size_in_bytes, pool.nbytes)
        self.assertLess(memory.temp_size_in_bytes, pool.nbytes / 100)
        before = pool.unsafe_buffer_pointer()
        self.assertEqual(append(pool, *rest).unsafe_buffer_pointer(), before)


class ErrorsTest(parameterized.TestCase):
    @parameterized.parameters(
        (1, (5, 1, 1, 576), jnp.bfloat16, ValueError, r"new_kv: .*\[total, 1, 576\] \(group axes"),
        (1, (5, 2, 576), jnp.bfloat16, ValueError, r"new_kv: .*\[total, 1, 576\]"),
        (2, (4, 7), jnp.int32, ValueError, r"block_table: .*\[3, max_blocks\] \(b as cu_seqlens_q"),
        (3, (4,), jnp.int32, ValueError, r"cache_seqlens: .*\[3\] \(b as cu_seqlens_q's\)"),
        (
            4,
            (4, 1),
            jnp.int32,
            ValueError,
            r"cu_seqlens_q: expected shape \[b \+ 1\], got \[4, 1\]",
        ),
        (4, (4,), jnp.uint32, TypeError, "cu_seqlens_q: expected dtype int32, got uint32"),
        (4, (1,), jnp.int32, ValueError, "cu_seqlens_q: .*b at least 1, got 1"),
        (2, None, None, ValueError, r"cu_seqlens_q: expected shape \[10\] .*, got \[4\]"),
    )
    def test_append(self, index, shape, dtype, error, message):
        shapes = [(9, 64, 1, 576), (5, 1, 576), (3, 7), (3,), (4,)]
        dtypes = [jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.int32, jnp.int32]
        shapes[index], dtypes[index] = shape, dtype
        operands = [
            None if s is None else jax.ShapeDtypeStruct(s, t)
            for s, t in zip(shapes, dtypes, strict=True)
        ]
        with self.assertRaisesRegex(error, message):
            jax.eval_shape(lambda *x: append_kv_cache(*x[:4], cu_seqlens_q=x[4]), *operands)

    @parameterized.parameters(
        ((), (3,), 2, ValueError, r"kv_indptr: expected shape \[\*G, b \+ 1\], got \[\]"),
        ((0,), (3,), 2, ValueError, r"kv_indptr: expected shape \[\*G, b \+ 1\], got \[0\]"),
        ((3,), (2, 3), 2, ValueError, r"kv_indices: expected shape \[n\], got \[2, 3\]"),
        ((2, 3), (3,), 2, ValueError, r"kv_indices: .*\[2, n\] \(group axes as kv_indptr's\)"),
        ((3,), (3,), 0, ValueError, "max_blocks: expected a positive integer, got 0"),
        ((3,), (3,), 2.0, TypeError, "max_blocks: expected a static Python integer, got float"),
    )
    def test_csr(self, kv_indptr, kv_indices, max_blocks, error, message):
        operands = (jax.ShapeDtypeStruct(s, jnp.int32) for s in (kv_indptr, kv_indices))
        with self.assertRaisesRegex(error, message):
            jax.eval_shape(lambda *x: block_table_from_csr(*x, max_blocks), *operands)

    def test_csr_dtype(self):
        with self.assertRaisesRegex(TypeError, "kv_indices: expected dtype int32, got float32"):
            block_table_from_csr(jnp.zeros(3, jnp.int32), jnp.zeros(3), 2)


if __name__ == "__main__":
    absltest.main()
