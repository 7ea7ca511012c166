"""Packed queries against the float64 oracle, under jit and vmap, in groups, with bad input."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flashmla import (
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from tests import oracle, problems, support
from tests.problems import pack

LENGTHS = (0, 1, 63, 64, 65, 130, 7, 300)
COVER = problems.pairwise_cover(
    {
        "most": (1, 3, 5),
        "heads": ((1, 1), (7, 1), (12, 3), (64, 1), (128, 1)),
        "dtype": (jnp.bfloat16, jnp.float16),
        "causal": (False, True),
        "window": (None, 40),
        "pair": (False, True),
        "page": (1, 16, 64, None),
    },
    is_valid=lambda case: True,
    cost=lambda case: case["heads"][0] * case["most"] + 400 * (case["page"] == 1),
)
decode = jax.jit(
    flash_mla_with_kvcache,
    static_argnames=("head_dim_v", "causal", "sliding_window", "max_seqlen_q", "implementation"),
)


class DecodeTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()

    def problem(self, most, lengths=LENGTHS, page=64, **options):
        """A problem, its packed queries and their cuts; without a query, nothing may be read."""
        lengths = self.rng.permutation(lengths)
        options["s_q"] = most
        if page is None:
            problem = problems.make_unpaged_problem(self.rng, lengths, 320, **options)
        else:
            problem = problems.make_problem(
                self.rng, lengths, page=page, shared_pages=10**6, **options
            )
        q, cuts = pack(self.rng, problem.q, most)
        for i in np.flatnonzero(cuts[:-1] == cuts[1:]):
            for page_id in problem.block_table[i, : -(-lengths[i] // problem.k_cache.shape[1])]:
                problem.k_cache[page_id] = np.nan
        return problem, q, cuts

    def check(self, problem, q, cuts, got, **options):
        want, plain = (
            oracle.decode_packed(q, *problem.arrays[1:], cuts, rounded_to=rounded, **options)
            for rounded in (None, q.dtype)
        )
        support.assert_packed_decodes_well(self, got, want, plain, q.dtype)

    @parameterized.parameters(*COVER)
    def test_decode(self, most, heads, dtype, causal, window, pair, page):
        h_q, h_kv = heads
        problem, q, cuts = self.problem(most, page=page, h_q=h_q, h_kv=h_kv, dtype=dtype)
        operand = (q[..., :512], q[..., 512:]) if pair else q
        rest = [problem.k_cache, problem.block_table, problem.cache_seqlens]
        if page is None:
            rest[1] = None
        options = dict(causal=causal, sliding_window=window)
        got = decode(operand, *rest, cu_seqlens_q=cuts, max_seqlen_q=most, **options)
        self.assertEqual(got[0].dtype, dtype)
        self.check(problem, q, cuts, got, **options)

    def test_with_a_plan(self):
        problem, q, cuts = self.problem(4, h_q=16)
        packing = dict(cu_seqlens_q=cuts, max_seqlen_q=4)
        for num_sms in (1, 7, 132):
            plan = get_mla_metadata(problem.cache_seqlens, 4 * 16, 1, num_sms=num_sms)
            got = decode(q, *problem.arrays[1:], 512, *plan, causal=True, **packing)
            self.check(problem, q, cuts, got, causal=True)

    def test_as_many_queries_of_each_are_what_decode_takes(self):
        problem = problems.make_problem(self.rng, [5, 100, 64], s_q=3)
        cuts = np.array([0, 3, 6, 9], np.int32)
        want = decode(*problem.arrays, causal=True)
        packed = problem.q.reshape(9, 16, 576)
        got = decode(packed, *problem.arrays[1:], causal=True, cu_seqlens_q=cuts, max_seqlen_q=3)
        support.assert_same_bits(got[0].reshape(want[0].shape), want[0])
        np.testing.assert_array_equal(got[1], jnp.moveaxis(want[1], 0, 1).reshape(16, 9))

    def test_more_room_than_queries(self):
        problem, q, cuts = self.problem(2)
        got = decode(q, *problem.arrays[1:], cu_seqlens_q=cuts, max_seqlen_q=len(q) + 5)
        self.check(problem, q, cuts, got)

    def test_groups(self):
        parts = [self.problem(2) for _ in range(6)]
        total = max(len(q) for _, q, _ in parts)
        spare = [np.resize(q, (total, *q.shape[1:])) for _, q, _ in parts]
        pages = max(len(problem.k_cache) for problem, _, _ in parts)
        pools = [np.resize(x.k_cache, (pages, *x.k_cache.shape[1:])) for x, _, _ in parts]
        operands = spare, pools, *zip(*(x.arrays[2:] for x, _, _ in parts), strict=True)
        columns = max(table.shape[1] for table in operands[2])
        tables = [np.pad(x, ((0, 0), (0, columns - x.shape[1]))) for x in operands[2]]
        operands = spare, pools, tables, operands[3], [cuts for _, _, cuts in parts]
        q, *rest, cuts = (np.stack(x).reshape(2, 3, *x[0].shape) for x in operands)
        out, lse = decode(q, *rest, causal=True, cu_seqlens_q=cuts, max_seqlen_q=2)
        for i, (problem, q, cuts) in enumerate(parts):
            got = out[i // 3, i % 3, : len(q)], lse[i // 3, i % 3, :, : len(q)]
            self.check(problem, q, cuts, got, causal=True)

    @parameterized.parameters(False, True)
    def test_vmap(self, over_pools):
        (problem, q, cuts), axes = self.problem(3), (0, 0 if over_pools else None, None, None, None)
        other = np.where(np.isnan(q), q, -q)
        pools = np.stack([problem.k_cache, problem.k_cache[::-1]])
        one = functools.partial(flash_mla_with_kvcache, causal=True, max_seqlen_q=3)
        mapped = jax.vmap(lambda q, *x: one(q, *x[:-1], cu_seqlens_q=x[-1]), in_axes=axes)
        k_cache = pools if over_pools else problem.k_cache
        got = jax.jit(mapped)(np.stack([q, other]), k_cache, *problem.arrays[2:], cuts)
        self.check(problem, q, cuts, [x[0] for x in got], causal=True)
        if not over_pools:
            self.check(problem, other, cuts, [x[1] for x in got], causal=True)

    def test_vmap_over_cuts(self):
        problem, q, cuts = self.problem(3)
        none = np.zeros_like(cuts)
        one = functools.partial(flash_mla_with_kvcache, max_seqlen_q=3)
        mapped = jax.vmap(lambda cuts: one(q, *problem.arrays[1:], cu_seqlens_q=cuts))
        got = mapped(np.stack([cuts, none]))
        self.check(problem, q, cuts, [x[0] for x in got])
        self.check(problem, q, none, [x[1] for x in got])

    def test_an_export_for_any_number_of_queries(self):
        problem, q, cuts = self.problem(3)
        operands = q, *problem.arrays[1:], cuts
        b, n, m, total = jax.export.symbolic_shape("b, n, m, total")
        shapes = (total, 16, 576), (n, 64, 1, 576), (b, m), (b,), (b + 1,)
        fun = jax.jit(
            lambda *x: flash_mla_with_kvcache(*x[:-1], cu_seqlens_q=x[-1], max_seqlen_q=3)
        )
        exported = jax.export.export(fun, platforms=["cpu"])(
            *(jax.ShapeDtypeStruct(s, x.dtype) for s, x in zip(shapes, operands, strict=True))
        )
        with jax.default_device(jax.devices("cpu")[0]):
            self.check(problem, q, cuts, exported.call(*operands))

    @settings(max_examples=25, deadline=None)
    @given(
        cuts=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 8), min_size=5, max_size=5)
    )
    def test_malformed_cuts(self, cuts):
        # Clamped, and then a query counts where a sequence names it, among its last `most`.
        most, total = 2, 6
        problem = problems.make_problem(self.rng, [3, 70, 0, 64], h_q=1, s_q=most)
        q = self.rng.standard_normal((total, 1, 576)).astype(problem.q.dtype)
        cuts = np.array(cuts, np.int64).astype(np.int32)
        out, lse = decode(q, *problem.arrays[1:], cu_seqlens_q=cuts, max_seqlen_q=most)
        self.assertTrue(np.isfinite(np.asarray(out, np.float32)).all())
        clamped = np.clip(cuts, 0, total)
        spans = list(itertools.pairwise(clamped))
        for t in range(total):
            alone = [
                oracle.decode(q[None, t : t + 1], problem.k_cache, *(x[i : i + 1] for x in rest))
                for rest in [problem.arrays[2:]]
                for i, (start, stop) in enumerate(spans)
                if start <= t < stop
            ]
            results = [lse_of[0, 0, 0] for _, lse_of in alone] + [-np.inf]
            self.assertLess(min(abs(lse[0, t] - x) if lse[0, t] != x else 0 for x in results), 1e-3)

    def test_a_sequence_with_too_many_queries(self):
        problem, cuts = problems.make_problem(self.rng, [100, 70], s_q=5), np.array([0, 5, 7])
        q = problem.q.reshape(10, 16, 576)[:7]
        options = dict(causal=True, cu_seqlens_q=cuts.astype(np.int32))
        few = decode(q, *problem.arrays[1:], max_seqlen_q=3, **options)
        all_of_them = decode(q, *problem.arrays[1:], max_seqlen_q=5, **options)
        np.testing.assert_array_equal(few[0][:2], 0)
        np.testing.assert_array_equal(few[1][:, :2], -np.inf)
        outs = (np.asarray(x[0][2:], np.float32) for x in (few, all_of_them))
        np.testing.assert_allclose(*outs, atol=2e-2)
        np.testing.assert_allclose(few[1][:, 2:], all_of_them[1][:, 2:], atol=1e-4)


Q, POOL = ((6, 4, 576), "bfloat16"), ((3, 64, 2, 576), "bfloat16")
VALID = dict(q=Q, k_cache=POOL, block_table=((2, 5), "int32"), cache_seqlens=((2,), "int32"))
CUTS = ((3,), "int32")


class ErrorsTest(parameterized.TestCase):
    @parameterized.parameters(
        (dict(max_seqlen_q=None), TypeError, "max_seqlen_q: expected a static .*, got NoneType"),
        (dict(max_seqlen_q=0), ValueError, "max_seqlen_q: expected a positive integer, got 0"),
        (
            dict(cu_seqlens_q=None),
            ValueError,
            "cu_seqlens_q: expected an array, since max_seqlen_q",
        ),
        (dict(cu_seqlens_q=((3,), "uint32")), TypeError, "cu_seqlens_q: expected dtype int32, got"),
        (
            dict(cu_seqlens_q=((3, 1), "int32")),
            ValueError,
            r"cu_seqlens_q: .*\[b \+ 1\], got \[3, 1",
        ),
        (dict(cu_seqlens_q=((1,), "int32")), ValueError, "cu_seqlens_q: .*b at least 1, got 1"),
        (dict(cu_seqlens_q=((4,), "int32")), ValueError, r"block_table: .*\(b as cu_seqlens_q's\)"),
        (dict(q=((4, 576), "bfloat16")), ValueError, r"q: expected shape \[\*G, total, h_q, 576\]"),
        (dict(q=((0, 4, 576), "bfloat16")), ValueError, "q: .*one query token, got total 0"),
        (dict(q=((6, 4, 576), "float32")), TypeError, "q: expected dtype bfloat16 or float16"),
        (dict(q=((6, 3, 576), "bfloat16")), ValueError, "got h_q 3 and h_kv 2"),
        (
            dict(q=((7, 6, 4, 576), "bfloat16")),
            ValueError,
            r"cu_seqlens_q: .*\[7, b \+ 1\] \(group",
        ),
        (dict(block_table=None), ValueError, r"k_cache: .*\(b as cu_seqlens_q's\), got \[3, 64"),
    )
    def test_bad_argument(self, change, error, message):
        operands = VALID | dict(cu_seqlens_q=CUTS, max_seqlen_q=4) | change
        operands = {
            name: jnp.zeros(*x) if isinstance(x, tuple) else x for name, x in operands.items()
        }
        with self.assertRaisesRegex(error, message):
            flash_mla_with_kvcache(**operands)


if __name__ == "__main__":
    absltest.main()
