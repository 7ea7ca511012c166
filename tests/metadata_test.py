"""The plan: properties of the reference, and the CUDA kernel against it, bit for bit."""

import functools
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flashmla import get_mla_metadata, planner
from jax_flashmla.metadata import MAX_NUM_SMS
from tests import support

BATCHES = (1, 2, 3, 7, 31, 32, 33, 128, 255, 256, 257, 600, 1024, 1025, 4095, 4096)
NUM_SMS = (1, 2, 13, 78, 132)
# Each is compiled, for few and for many rows; other ones in every run.
SHAPES = random.sample(list(itertools.product(BATCHES, NUM_SMS)), 10)


@functools.partial(jax.jit, static_argnames=("rows", "heads", "num_sms", "implementation", "fp8"))
def plan(cache_seqlens, rows=16, heads=1, num_sms=132, implementation="xla", fp8=False):
    return get_mla_metadata(
        cache_seqlens,
        rows,
        heads,
        is_fp8_kvcache=fp8,
        num_sms=num_sms,
        implementation=implementation,
    )


def draw_lengths(rng, batch, kind):
    """Lengths of the kinds that planners get wrong."""
    if kind == "equal":
        return np.full(batch, rng.integers(0, 20000))
    if kind == "short":
        return rng.integers(0, 200, batch)
    if kind == "one long":
        lengths = rng.integers(0, 100, batch)
        lengths[rng.integers(batch)] = rng.integers(100_000, 2_000_000)
        return lengths
    if kind == "boundaries":
        return rng.choice([0, 1, 63, 64, 65, 127, 128, 255, 256, 257, 448, 449, 512], batch)
    if kind == "mostly empty":
        return np.where(rng.random(batch) < 0.9, 0, rng.integers(1, 5000, batch))
    assert kind == "spread", kind
    return np.exp(rng.uniform(0, 11, batch)).astype(int)


KINDS = ("equal", "short", "one long", "boundaries", "mostly empty", "spread")


def blocks_of(lengths):
    return [-(-max(int(length), 0) // planner.BLOCK_TOKENS) for length in lengths]


def check_plan(test_case, lengths, metadata, num_splits, rows=16, fp8=False):
    """Walks the partitions as a kernel would and checks every documented property."""
    overhead, least = planner.overhead_blocks(rows, fp8), planner.min_split_blocks(rows)
    metadata, num_splits = np.asarray(metadata), np.asarray(num_splits)
    batch, parts = len(lengths), len(metadata)
    blocks = blocks_of(lengths)
    test_case.assertEqual(metadata.shape, (parts, planner.METADATA_COLUMNS))
    test_case.assertEqual(num_splits.shape, (batch + 1,))
    np.testing.assert_array_equal(metadata[:, 5:], 0)

    done = [0] * batch  # blocks of each sequence that earlier partitions computed
    splits = [0] * batch
    cost = np.zeros(parts, np.int64)
    shortest_split = [np.inf] * batch
    begun_in = [[] for _ in lengths]  # by each partition in which a sequence goes on
    expected_begin = (0, 0)
    for part, (seq, block, end_seq, end_block, split, *_) in enumerate(metadata.tolist()):
        test_case.assertEqual((seq, block), expected_begin)
        test_case.assertLessEqual((seq, block), (end_seq, end_block))
        expected_begin = (end_seq, end_block)
        if seq < batch and (seq, block) < (end_seq, end_block):
            test_case.assertEqual(split, splits[seq])
        if split > 0:
            begun_in[seq].append(part - split)
        while (seq, block) < (end_seq, end_block):
            stop = end_block if seq == end_seq else blocks[seq]
            test_case.assertEqual(block, done[seq])
            test_case.assertTrue(stop > block or blocks[seq] == 0)
            shortest_split[seq] = min(shortest_split[seq], stop - block)
            cost[part] += stop - block + overhead if blocks[seq] else 1
            done[seq] = stop
            splits[seq] += blocks[seq] > 0
            seq, block = seq + 1, 0
    test_case.assertEqual(expected_begin, (batch, 0))
    test_case.assertEqual(done, blocks)
    np.testing.assert_array_equal(num_splits, np.concatenate([[0], np.cumsum(splits)]))
    test_case.assertEqual([count >= 1 for count in splits], [count > 0 for count in blocks])
    test_case.assertLess(num_splits[-1], batch + parts)
    for count, begun in zip(splits, begun_in, strict=True):
        test_case.assertEqual(begun, begun[:1] * max(count - 1, 0))

    total = sum(b + overhead if b else 1 for b in blocks)
    mean = max(-(-total // parts), least)
    slack = max(2 * (least - 1), planner.SPLIT_COST_BLOCKS)
    slack += overhead
    test_case.assertLessEqual(cost.max(initial=0), mean + slack)
    for count, shortest in zip(splits, shortest_split, strict=True):
        if count > 1:
            test_case.assertGreaterEqual(shortest, least)


class PlanTest(parameterized.TestCase):
    @settings(max_examples=150, deadline=None)
    @given(
        shape=st.sampled_from(SHAPES),
        kind=st.sampled_from(KINDS),
        seed=st.integers(0, 2**32 - 1),
        rows=st.sampled_from((16, 64)),
        fp8=st.booleans(),
    )
    def test_properties(self, shape, kind, seed, rows, fp8):
        batch, num_sms = shape
        lengths = draw_lengths(np.random.default_rng(seed), batch, kind)
        results = plan(jnp.asarray(lengths, jnp.int32), rows, num_sms=num_sms, fp8=fp8)
        check_plan(self, lengths, *results, rows, fp8)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, 3000), min_size=5, max_size=5), st.sampled_from((3, 8, 20)))
    def test_properties_of_chosen_lengths(self, lengths, num_sms):
        check_plan(self, lengths, *plan(jnp.asarray(lengths, jnp.int32), num_sms=num_sms))

    def test_the_longest_sequences_over_the_most_partitions(self):
        lengths = [2**31 - 1] * 20 + [1, 0]
        results = plan(jnp.asarray(lengths, jnp.int32), num_sms=MAX_NUM_SMS)
        check_plan(self, lengths, *results)

    def test_negative_lengths_count_as_empty(self):
        negative = plan(jnp.asarray([-1, 300, np.iinfo(np.int32).min], jnp.int32))
        for got, want in zip(negative, plan(jnp.asarray([0, 300, 0], jnp.int32)), strict=True):
            np.testing.assert_array_equal(got, want)

    @parameterized.parameters(1, 3, 4096)
    def test_absurd_lengths_do_not_overflow(self, batch):
        lengths = jnp.full(batch, np.iinfo(np.int32).max, jnp.int32)
        metadata, num_splits = (np.asarray(x) for x in plan(lengths))
        begins, ends = metadata[:, :2].tolist(), metadata[:, 2:4].tolist()
        self.assertEqual(begins, sorted(begins))
        self.assertEqual([*begins[1:], [batch, 0]], ends)
        self.assertTrue((np.diff(num_splits) >= 1).all())
        self.assertLess(num_splits[-1], batch + len(metadata))

    @parameterized.parameters(
        (1, 64, 64),
        (1, 64, 32, 64),
        (8, 64, 16),
        (32, 64, 4),
        (64, 65, 2),
        (64, 128, 2),
        (128, 64, 1),
    )
    def test_equal_lengths_get_equal_pieces(self, batch, blocks, pieces, rows=16):
        metadata, num_splits = plan(jnp.full(batch, 64 * blocks, jnp.int32), rows)
        np.testing.assert_array_equal(num_splits, np.arange(batch + 1) * pieces)
        begin, end = np.asarray(metadata)[: batch * pieces].reshape(-1, 4, 2).swapaxes(0, 1)[:2]
        seqs, firsts = begin.T
        np.testing.assert_array_equal(seqs, np.repeat(np.arange(batch), pieces))
        lasts = np.where(end[:, 0] == seqs, end[:, 1], blocks)
        self.assertLessEqual(np.ptp(lasts - firsts), 1)

    def test_equal_lengths_are_dealt_out_whole(self):
        # 66 partitions: two sequences for 64 of them, none for two, rather than 66 split ones.
        metadata, num_splits = plan(jnp.full(128, 4096, jnp.int32), rows=128)
        np.testing.assert_array_equal(num_splits, np.arange(129))
        np.testing.assert_array_equal(np.asarray(metadata)[:64, 0], np.arange(0, 128, 2))
        np.testing.assert_array_equal(np.asarray(metadata)[64:, :4], [[128, 0, 128, 0]] * 2)

    def test_equal_lengths_are_split_where_whole_ones_leave_too_many_idle(self):
        _, num_splits = plan(jnp.full(100, 64 * 200, jnp.int32))
        self.assertGreater(int(num_splits[-1]), 100)

    @parameterized.parameters((16, 1, 132), (64, 1, 132), (65, 1, 66), (128, 2, 33), (9000, 8, 1))
    def test_partitions_fill_the_sms_once(self, rows, heads, parts):
        metadata, _ = plan(jnp.zeros(3, jnp.int32), rows, heads)
        self.assertEqual(metadata.shape, (parts, 8))

    @parameterized.parameters((), (2,), (2, 3), (0,))
    def test_groups_are_planned_one_by_one(self, *groups):
        rng = np.random.default_rng()
        lengths = rng.integers(0, 2000, (*groups, 5)).astype(np.int32)
        metadata, num_splits = plan(lengths, num_sms=7)
        self.assertEqual(metadata.shape, (*groups, 7, 8))
        self.assertEqual(num_splits.shape, (*groups, 6))
        for index in np.ndindex(*groups):
            check_plan(self, lengths[index], metadata[index], num_splits[index])

    def test_an_empty_batch(self):
        metadata, num_splits = plan(jnp.zeros(0, jnp.int32), num_sms=4)
        np.testing.assert_array_equal(metadata, np.zeros((4, 8)))
        np.testing.assert_array_equal(num_splits, [0])

    @parameterized.parameters(0, 1, -1)
    def test_vmap(self, axis):
        lengths = np.random.default_rng().integers(0, 2000, (3, 3)).astype(np.int32)
        mapped = jax.vmap(plan, in_axes=axis)(lengths)
        for got, row in zip(zip(*mapped, strict=True), np.moveaxis(lengths, axis, 0), strict=True):
            for a, b in zip(got, plan(row), strict=True):
                np.testing.assert_array_equal(a, b)

    def test_results_have_names(self):
        metadata = get_mla_metadata(jnp.asarray([60], jnp.int32), 16, 1)
        np.testing.assert_array_equal(metadata.num_splits, [0, 1])
        self.assertEqual(metadata.tile_scheduler_metadata.dtype, jnp.int32)


class PlanKernelTest(parameterized.TestCase):
    """The kernel gives the reference's bits."""

    def setUp(self):
        super().setUp()
        support.need_kernel(self, "plan")
        self.rng = np.random.default_rng()

    def check(self, lengths, num_sms=132):
        lengths = jnp.asarray(lengths, jnp.int32)
        for rows in (16, 64):
            want = plan(lengths, rows, num_sms=num_sms, implementation="xla")
            got = plan(lengths, rows, num_sms=num_sms, implementation="cuda")
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)

    @parameterized.parameters(*BATCHES)
    def test_equals_reference(self, batch):
        for num_sms, kind in itertools.product(NUM_SMS, KINDS):
            self.check(draw_lengths(self.rng, batch, kind), num_sms)

    @parameterized.parameters(20_000, 131_072)
    def test_very_large_batches(self, batch):
        self.check(draw_lengths(self.rng, batch, "short"))

    def test_more_partitions_than_threads(self):
        self.check(draw_lengths(self.rng, 50, "one long"), num_sms=5000)

    def test_absurd_and_negative_lengths(self):
        bounds = np.iinfo(np.int32)
        self.check(self.rng.choice([bounds.min, -1, 0, 1, 64, bounds.max - 5, bounds.max], 300))

    def test_groups_and_vmap(self):
        lengths = self.rng.integers(0, 3000, (4, 3, 70))
        self.check(lengths)
        self.check(np.zeros((2, 0)))
        mapped = jax.vmap(functools.partial(plan, implementation="cuda"), in_axes=1)(
            jnp.asarray(lengths, jnp.int32)
        )
        want = plan(jnp.asarray(lengths.swapaxes(0, 1), jnp.int32))
        for a, b in zip(mapped, want, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_is_the_default(self):
        lowered = jax.jit(lambda x: get_mla_metadata(x, 16, 1)).lower(jnp.zeros(4, jnp.int32))
        self.assertIn("jax_flashmla_plan", lowered.as_text())

    def test_the_same_bits_inside_a_longer_program(self):
        lengths = jnp.asarray(draw_lengths(self.rng, 200, "spread"), jnp.int32)

        @jax.jit
        def steps(lengths):
            return jax.lax.map(
                lambda step: get_mla_metadata(lengths + step, 16, 1, implementation="cuda"),
                jnp.arange(20, dtype=jnp.int32),
            )

        plans = steps(lengths)
        for step in range(20):
            want = plan(lengths + step)
            np.testing.assert_array_equal(plans.tile_scheduler_metadata[step], want[0])
            np.testing.assert_array_equal(plans.num_splits[step], want[1])


if __name__ == "__main__":
    absltest.main()
