"""Decode against the float64 oracle: a cover of shapes, boundaries, poison, groups."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from absl.testing import absltest, parameterized

import jax_flashmla
from tests import oracle, problems, support

VARIED = "varied"
COVER = problems.pairwise_cover(
    {
        "batch": (1, 2, 6, 64),
        "s_q": (1, 2, 4),
        "keys": (0, 20, 140, 4096, VARIED),
        "h_q": (1, 3, 9, 63, 64, 126, 128),
        "h_kv": (1, 2, 3, 8),
        "causal": (False, True),
        "dtype": ("bfloat16", "float16"),
    },
    is_valid=lambda c: c["h_q"] % c["h_kv"] == 0,
    cost=lambda c: (
        c["batch"] * c["s_q"] * c["h_q"] * (1000 if c["keys"] == VARIED else c["keys"] + 100)
    ),
)


def draw_lengths(rng, batch, keys):
    if keys == VARIED:
        return rng.integers(0, 1500, batch)
    return np.full(batch, keys)


@functools.partial(jax.jit, static_argnames=("softmax_scale", "causal", "implementation"))
def decode(q, k_cache, block_table, cache_seqlens, metadata=(), **options):
    return jax_flashmla.flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 512, *metadata, **options
    )


class DecodeTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()

    def check(self, problem, softmax_scale=576**-0.5, causal=False):
        got = decode(*problem.arrays, softmax_scale=softmax_scale, causal=causal)
        dtype = problem.q.dtype
        want, plain = (
            oracle.decode(*problem.arrays, softmax_scale, causal, rounded)
            for rounded in (None, dtype)
        )
        support.assert_decodes_well(self, got, want, plain, dtype)
        return got

    @parameterized.parameters(*COVER)
    def test_cover(self, batch, s_q, keys, h_q, h_kv, causal, dtype):
        lengths = draw_lengths(self.rng, batch, keys)
        problem = problems.make_problem(
            self.rng, lengths, s_q=s_q, h_q=h_q, h_kv=h_kv, dtype=jnp.dtype(dtype)
        )
        self.check(problem, causal=causal)

    @parameterized.product(s_q=(1, 3), causal=(False, True))
    def test_lengths_around_page_boundaries(self, s_q, causal):
        lengths = [0, 1, 2, 63, 64, 65, 127, 128, 129]
        self.check(problems.make_problem(self.rng, lengths, s_q=s_q), causal=causal)

    def test_table_filled_to_its_last_entry(self):
        self.check(problems.make_problem(self.rng, [256, 255, 193], max_blocks=4))

    def test_a_table_that_is_not_a_multiple_of_the_walk(self):
        self.check(problems.make_problem(self.rng, [6000, 100], max_blocks=101))

    @parameterized.parameters(0.01, 1.0, -0.05)
    def test_softmax_scale(self, softmax_scale):
        self.check(problems.make_problem(self.rng, [70, 300]), softmax_scale=softmax_scale)

    @parameterized.product(sizes=(2.0**-100, 2.0**-20, 2.0**20, 2.0**100, None), h_q=(16, 128))
    def test_values_of_any_size(self, sizes, h_q):
        # Few sequences are split, and the kernel's partial results have 16 bits. None: columns
        # differ.
        if sizes is None:
            sizes = 2.0 ** self.rng.integers(-16, 1, 576)
        problem = problems.make_problem(self.rng, [700, 70], h_q=h_q)
        dtype = problem.q.dtype
        want, plain = (oracle.decode(*problem.arrays, rounded_to=x) for x in (None, dtype))
        problem.resize_keys(sizes)
        out, lse = decode(*problem.arrays)
        out = np.asarray(out, np.float64) / np.broadcast_to(sizes, 576)[:512]
        support.assert_decodes_well(self, (out, lse), want, plain, dtype)

    @parameterized.product(size=(2.0**-60, 1.0, 2.0**90), h_q=(16, 128))
    def test_rows_beside_one_of_nan(self, size, h_q):
        # Rows that are neighbours share a power of two in partial results.
        problem = problems.make_problem(self.rng, [700, 70], h_q=h_q)
        dtype = problem.q.dtype
        want, plain = (oracle.decode(*problem.arrays, rounded_to=x) for x in (None, dtype))
        problem.resize_keys(size)
        problem.q[0, 0, 3, 5] = np.nan
        out, lse = (np.array(x, np.float64) for x in decode(*problem.arrays))
        self.assertTrue(np.isnan(out[0, 0, 3]).all() and np.isnan(lse[0, 3, 0]))
        out[0, 0, 3], lse[0, 3, 0] = want[0][0, 0, 3] * size, want[1][0, 3, 0]
        support.assert_decodes_well(self, (out / size, lse), want, plain, dtype)

    @parameterized.parameters(
        {"h_q": 3},
        {"h_q": 6, "h_kv": 2, "page": 16},
        {"h_q": 128},
        {"h_q": 74, "h_kv": 2, "s_q": 3},
        {"h_q": 40, "s_q": 2, "page": 1},
    )
    def test_half_of_a_batch_is_padding(self, **options):
        # In the narrow and the wide kernel, keys by the copy engine and row by row.
        lengths = self.rng.integers(1, 500, 128)
        lengths[self.rng.permutation(128)[:64]] = 0
        self.check(problems.make_problem(self.rng, lengths, **options))

    @parameterized.parameters(
        {"h_q": 3}, {"h_q": 128}, {"h_q": 74, "h_kv": 2, "s_q": 3}, {"h_q": 40, "page": 16}
    )
    def test_long_sequences_among_short_ones(self, **options):
        # Most have one split or two, these have many.
        lengths = self.rng.integers(0, 200, 40)
        lengths[self.rng.permutation(40)[:3]] = self.rng.integers(3000, 6000, 3)
        self.check(problems.make_problem(self.rng, lengths, **options))

    def test_queries_as_a_pair_give_the_same(self):
        problem = problems.make_problem(self.rng, [5, 200, 0], s_q=2, h_q=6, h_kv=3)
        whole = decode(*problem.arrays, causal=True)
        pair = decode(problem.q_pair, *problem.arrays[1:], causal=True)
        np.testing.assert_array_equal(whole[0].shape, pair[0].shape)
        np.testing.assert_allclose(
            *(np.asarray(x[0], np.float32) for x in (whole, pair)), atol=2e-2, rtol=2e-2
        )
        np.testing.assert_allclose(whole[1], pair[1], atol=1e-4)

    def test_lengths_are_clamped_to_the_table(self):
        problem = problems.make_problem(self.rng, [192, 192, 50], max_blocks=3)
        dtype = problem.q.dtype
        arrays = *problem.arrays[:3], np.array([192, 192, 0])
        want, plain = (oracle.decode(*arrays, rounded_to=rounded) for rounded in (None, dtype))
        problem.cache_seqlens[:] = [193, np.iinfo(np.int32).max, -7]
        support.assert_decodes_well(self, decode(*problem.arrays), want, plain, dtype)

    def test_page_ids_outside_the_pool_read_as_zeros(self):
        problem = problems.make_problem(self.rng, [300, 300, 300])
        problem.block_table[0, 1] = len(problem.k_cache)
        problem.block_table[1, 2] = -1
        problem.block_table[2, 0] = np.iinfo(np.int32).min
        expected = oracle.decode(*problem.arrays)
        problem.k_cache[np.isnan(problem.k_cache.astype(np.float32))] = 0
        out, lse = decode(*problem.arrays)
        np.testing.assert_allclose(np.asarray(out, np.float32), expected[0], atol=2e-2)
        np.testing.assert_allclose(lse, expected[1], atol=1e-4)

    def test_groups_are_independent_pools(self):
        parts = [
            problems.make_problem(self.rng, self.rng.permutation([3, 0, 500, 64]), s_q=2)
            for _ in range(6)
        ]
        grouped = problems.stack(parts)
        arrays = [x.reshape(2, 3, *x.shape[1:]) for x in grouped.arrays]
        out, lse = decode(*arrays, causal=True)
        self.assertEqual(out.shape, (2, 3, 4, 2, 16, 512))
        self.assertEqual(lse.shape, (2, 3, 4, 16, 2))
        for i, part in enumerate(parts):
            plain = oracle.decode(*part.arrays, causal=True, rounded_to=part.q.dtype)
            got = out[i // 3, i % 3], lse[i // 3, i % 3]
            want = oracle.decode(*part.arrays, causal=True)
            support.assert_decodes_well(self, got, want, plain, part.q.dtype)

    def test_page_ids_of_one_group_do_not_reach_into_the_next(self):
        parts = [problems.make_problem(self.rng, [128, 128]) for _ in range(2)]
        for part in parts:
            part.k_cache[np.isnan(part.k_cache.astype(np.float32))] = 7
        grouped = problems.stack(parts)
        grouped.block_table[0, 0, 1] = len(parts[0].k_cache)
        grouped.block_table[1, 0, 1] = -1
        out, _ = decode(*grouped.arrays)
        for i, part in enumerate(parts):
            expected, _ = oracle.decode(part.q, part.k_cache, grouped.block_table[i], [128, 128])
            np.testing.assert_allclose(np.asarray(out[i], np.float32), expected, atol=2e-2)

    @parameterized.parameters({}, {"groups": (0,)}, {"groups": (3,)}, {"groups": (3, 0)})
    def test_an_empty_batch(self, groups=()):
        shapes = ((0, 1, 16, 576), (4, 64, 1, 576), (0, 2), (0,))
        dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.int32)
        arrays = [jnp.zeros((*groups, *s), t) for s, t in zip(shapes, dtypes, strict=True)]
        out, lse = decode(*arrays)
        self.assertEqual(out.shape, (*groups, 0, 1, 16, 512))
        self.assertEqual(lse.shape, (*groups, 0, 16, 1))

    @parameterized.parameters((1, 12000), (2, 2000))
    def test_results_do_not_depend_on_the_plan(self, s_q, longest):
        # From one partition for all sequences to one for each block.
        lengths = [5, 0, longest, 300, 64, *[0] * 70]
        problem = problems.make_problem(self.rng, lengths, s_q=s_q)
        want = oracle.decode(*problem.arrays)
        plain = oracle.decode(*problem.arrays, rounded_to=problem.q.dtype)
        for num_sms in (1, 2, 7, 132, 500):
            metadata = jax_flashmla.get_mla_metadata(
                problem.cache_seqlens, 16 * s_q, 1, num_sms=num_sms
            )
            got = decode(*problem.arrays, metadata)
            support.assert_decodes_well(self, got, want, plain, problem.q.dtype)

    @parameterized.parameters(16, 128)
    def test_a_plan_from_before_a_sequence_began(self, h_q):
        # It has no split of it, as of an empty one.
        problem = problems.make_problem(self.rng, [5, 300, 64, 0], h_q=h_q)
        metadata = jax_flashmla.get_mla_metadata(np.array([0, 300, 0, 7], np.int32), h_q, 1)
        want = oracle.decode(*problem.arrays)
        plain = oracle.decode(*problem.arrays, rounded_to=problem.q.dtype)
        got = decode(*problem.arrays, metadata)
        support.assert_decodes_well(self, got, want, plain, problem.q.dtype)

    @parameterized.parameters((16, 64, 0), (128, 64, 36), (16, 1, 36), (128, 16, 0), (16, 64, 36))
    def test_wrong_metadata_is_harmless(self, h_q, page, others):
        lengths = [5, 0, 900, 300, *[7] * others]
        problem = problems.make_problem(self.rng, lengths, h_q=h_q, page=page)
        metadata = jax_flashmla.get_mla_metadata(problem.cache_seqlens, h_q, 1)
        bounds = np.iinfo(np.int32)
        edges = bounds.min, -1, 0, 1, 2, bounds.max - 1, bounds.max
        draw_any = functools.partial(self.rng.integers, bounds.min, bounds.max)
        draw_edges = functools.partial(self.rng.choice, edges)
        for draw in (draw_any, draw_edges, draw_edges, np.zeros):
            wrong = [draw(x.shape).astype(np.int32) for x in metadata]
            jax.block_until_ready(decode(*problem.arrays, wrong))
        # The device still works, and a valid plan still gives the right result.
        self.check(problem)

    def test_the_same_bits_every_time(self):
        problem = problems.make_problem(self.rng, [777, 64, 0, 12], s_q=2)
        first = decode(*problem.arrays)
        for _ in range(20):
            for a, b in zip(first, decode(*problem.arrays), strict=True):
                np.testing.assert_array_equal(a, b)

    def test_nan_inside_the_valid_part_is_not_hidden(self):
        problem = problems.make_problem(self.rng, [100, 100])
        problem.k_cache[problem.block_table[0, 0], 5] = np.nan
        out, lse = decode(*problem.arrays)
        self.assertTrue(np.isnan(np.asarray(out[0], np.float32)).all())
        self.assertTrue(np.isnan(lse[0]).all())
        self.assertTrue(np.isfinite(np.asarray(out[1], np.float32)).all())

    @parameterized.product(h_q=(1, 16, 17, 128), page=(64, 128))
    def test_sequences_behind_those_of_nan(self, h_q, page):
        # In one partition of the plan. A last block does not come whole: what lies behind its keys
        # in shared memory is what the sequences before have left there.
        lengths = problems.with_neighbours(self.rng, problems.SHORT_ENDS, 4 * page)
        problem = problems.make_problem(self.rng, lengths, h_q=h_q, page=page)
        problem.k_cache[problem.block_table[::2, :4]] = np.nan
        plan = jax_flashmla.get_mla_metadata(lengths, h_q, 1, num_sms=1)
        self.assertEqual(plan.tile_scheduler_metadata.shape[0], 1)
        got = [x[1::2] for x in decode(*problem.arrays, plan)]
        q, k_cache, table, lengths = problem.arrays
        arrays = q[1::2], k_cache, table[1::2], lengths[1::2]
        want, plain = (oracle.decode(*arrays, rounded_to=x) for x in (None, q.dtype))
        support.assert_decodes_well(self, got, want, plain, q.dtype)

    def test_a_pool_of_more_than_2_to_the_31_elements(self):
        num_blocks = 2**31 // (64 * 576) + 100
        needed = num_blocks * 64 * 576 * 2
        if psutil.virtual_memory().available < 2.5 * needed:
            self.skipTest(f"needs {2.5 * needed / 2**30:.0f} GiB of free memory")
        problem = problems.make_problem(self.rng, [300, 64, 130])
        first = num_blocks - len(problem.k_cache)
        named = problem.block_table != problems.UNUSED_TABLE_ENTRY
        far_table = problem.block_table + np.where(named, first, 0).astype(np.int32)
        pool = jnp.zeros((num_blocks, 64, 1, 576), problem.q.dtype)
        move = jax.jit(lambda pool, pages: pool.at[first:].set(pages), donate_argnums=0)
        pool = move(pool, problem.k_cache)
        out, lse = decode(problem.q, pool, far_table, problem.cache_seqlens)
        near = decode(*problem.arrays)
        np.testing.assert_array_equal(out, near[0])
        np.testing.assert_array_equal(lse, near[1])


class CostTest(absltest.TestCase):
    """Memory and work of the XLA implementation."""

    def compile(self, batch, max_blocks):
        pages = batch * max_blocks // 4
        shapes = ((batch, 1, 16, 576), (pages, 64, 1, 576), (batch, max_blocks), (batch,))
        dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.int32)
        args = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, dtypes, strict=True)]
        return decode.lower(*args).compile()

    def test_temporaries_stay_below_an_eighth_of_the_gathered_cache(self):
        batch, max_blocks = 32, 256
        gathered = batch * max_blocks * 64 * 576 * 2
        temporaries = self.compile(batch, max_blocks).memory_analysis().temp_size_in_bytes
        self.assertGreater(temporaries, 0)
        self.assertLess(temporaries, gathered / 8)

    def test_work_follows_the_longest_length(self):
        if jax.default_backend() != "cpu":
            self.skipTest("times a CPU; an accelerator may be shared with other tests")
        batch, max_blocks = 4, 512
        compiled = self.compile(batch, max_blocks)
        rng = np.random.default_rng()
        problem = problems.make_problem(rng, [100] * batch, max_blocks=max_blocks)
        pool = jnp.zeros((batch * max_blocks // 4, 64, 1, 576), jnp.bfloat16)
        table = jnp.zeros_like(problem.block_table)

        def fastest(length):
            lengths = jnp.full(batch, length, jnp.int32)
            jax.block_until_ready(compiled(problem.q, pool, table, lengths))
            times = []
            for _ in range(4):
                begin = time.perf_counter()
                jax.block_until_ready(compiled(problem.q, pool, table, lengths))
                times.append(time.perf_counter() - begin)
            return min(times)

        # 300 times the work; a walk over the whole table would take as long for both.
        self.assertLess(fastest(100) * 4, fastest(max_blocks * 64))


class OnGpuTest(absltest.TestCase):
    def test_the_suite_ran_on_a_gpu(self):
        """With --require-gpu the tests of this file are only worth something on a GPU."""
        support.need_kernel(self, "decode")
        self.assertEqual(jax.default_backend(), "gpu")
        example = problems.make_problem(np.random.default_rng(), [100]).arrays
        self.assertIn("jax_flashmla_decode", decode.lower(*example).as_text())

    def test_more_rows_than_a_grid_dimension_holds(self):
        support.need_kernel(self, "decode")
        rng = np.random.default_rng()
        problem = problems.make_problem(rng, rng.integers(0, 100, 16500), s_q=4, h_q=2)
        got = decode(*problem.arrays, causal=True)
        want = oracle.decode(*problem.arrays, causal=True)
        plain = oracle.decode(*problem.arrays, causal=True, rounded_to=problem.q.dtype)
        support.assert_decodes_well(self, got, want, plain, problem.q.dtype)

    def test_both_implementations_agree(self):
        support.need_kernel(self, "decode")
        rng = np.random.default_rng()
        problem = problems.make_problem(rng, rng.integers(0, 9000, 40), s_q=2, h_q=128)
        want = decode(*problem.arrays, causal=True, implementation="xla")
        got = decode(*problem.arrays, causal=True, implementation="cuda")
        np.testing.assert_allclose(
            *(np.asarray(x[0], np.float32) for x in (got, want)), atol=2e-2, rtol=2e-2
        )
        np.testing.assert_allclose(got[1], want[1], atol=1e-4)


if __name__ == "__main__":
    absltest.main()
