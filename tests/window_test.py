"""Decode with a sliding window and with capped scores, against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata
from tests import oracle, problems, support

PAGE = problems.PAGE
# Around blocks, and with windows that begin inside the first block, at its end, behind many.
LENGTHS = (0, 1, 5, 63, 64, 65, 130, 191, 192, 193, 900)
COVER = problems.pairwise_cover(
    {
        "window": (1, 63, 64, 65, 200, 5000),
        "s_q": (1, 3),
        "h_q": (4, 20, 64),
        "causal": (False, True),
    },
    is_valid=lambda case: True,
    cost=lambda case: case["h_q"] * case["s_q"],
)

decode = jax.jit(
    flash_mla_with_kvcache,
    static_argnames=(
        *("head_dim_v", "softmax_scale", "causal", "sliding_window", "logits_soft_cap"),
        "implementation",
    ),
)


def poison_before_window(problem, window, hidden):
    """NaN into all rows that no query sees, and absurd ids into the table for whole pages of them.

    `hidden`: keys at the end that the first query does not see.
    """
    for i, length in enumerate(problem.cache_seqlens):
        first = max(0, length - hidden - window)
        pages, rows = divmod(first, PAGE)
        if rows:
            page = problem.k_cache[problem.block_table[i, pages]].copy()
            page[:rows] = np.nan
            problem.k_cache[problem.block_table[i, pages]] = page
        problem.block_table[i, :pages] = problems.UNUSED_TABLE_ENTRY


class WindowTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()

    def problem(self, lengths=LENGTHS, **options):
        # No page is shared: what one sequence no longer sees, another might.
        return problems.make_problem(self.rng, lengths, shared_pages=10**6, **options)

    def check(self, problem, plans=((),), lse_slack=0.0, **options):
        """Checks the decodes with all `plans`; returns the first."""
        want, plain = (
            oracle.decode(*problem.arrays, rounded_to=rounded, **options)
            for rounded in (None, problem.q.dtype)
        )
        results = [decode(*problem.arrays, 512, *plan, **options) for plan in plans]
        for got in results:
            support.assert_decodes_well(self, got, want, plain, problem.q.dtype, lse_slack)
        return results[0]

    @parameterized.parameters(*COVER)
    def test_window(self, window, s_q, h_q, causal):
        problem = self.problem(s_q=s_q, h_q=h_q)
        poison_before_window(problem, window, s_q - 1 if causal else 0)
        self.check(problem, causal=causal, sliding_window=window)

    @parameterized.parameters((1, 16), (2, 64))
    def test_window_with_a_plan(self, s_q, h_q):
        problem = self.problem(s_q=s_q, h_q=h_q)
        poison_before_window(problem, 300, s_q - 1)
        plans = [
            get_mla_metadata(
                problem.cache_seqlens, s_q * h_q, 1, sliding_window=planned_for, num_sms=num_sms
            )
            for num_sms in (1, 7, 132)
            for planned_for in (300, None)  # a plan for whole sequences is as right
        ]
        self.check(problem, plans, causal=True, sliding_window=300)

    def test_a_plan_for_a_window_leaves_out_what_is_not_seen(self):
        lengths = np.array([100, 300, 64 * 100 + 7], np.int32)
        plan = get_mla_metadata(lengths, 16, 1, sliding_window=300)
        # The third begins at 64 * 100 + 7 - 300 = 95 * 64 + 27, inside block 95.
        want = get_mla_metadata(lengths - np.array([0, 0, 95 * 64], np.int32), 16, 1)
        for x, y in zip(plan, want, strict=True):
            np.testing.assert_array_equal(x, y)

    def test_a_plan_for_a_window_of_lengths_below_zero(self):
        lengths = np.array([np.iinfo(np.int32).min, -1, 100], np.int32)
        plan = get_mla_metadata(lengths, 16, 1, sliding_window=10)
        want = get_mla_metadata(np.array([0, 0, 100 - 64], np.int32), 16, 1)
        for x, y in zip(plan, want, strict=True):
            np.testing.assert_array_equal(x, y)

    @parameterized.product(cap=(0.5, 30.0), h_q=(16, 64), softmax_scale=(576**-0.5, -0.3))
    def test_soft_cap(self, cap, h_q, softmax_scale):
        problem = self.problem((0, 1, 64, 700), s_q=2, h_q=h_q)
        got = self.check(problem, causal=True, softmax_scale=softmax_scale, logits_soft_cap=cap)
        uncapped = decode(*problem.arrays, causal=True, softmax_scale=softmax_scale)
        self.assertGreater(np.abs(got[1][3] - uncapped[1][3]).max(), 1e-3)

    def test_soft_cap_of_large_scores(self):
        problem = self.problem((0, 1, 64, 700))
        # The cap hides no error of a score near zero, and the lse of one key is its score: the
        # scale times a rounding of float32 at |q| |k|, about 576 (seen: a twentieth of that).
        slack = 100.0 * 2.0**-24 * 576
        self.check(problem, lse_slack=slack, softmax_scale=100.0, logits_soft_cap=2.0)

    @parameterized.parameters((30.0, 0.0), (1e-44, 1.0))
    def test_soft_cap_of_scores_that_are_nothing(self, cap, softmax_scale):
        problem = self.problem((0, 1, 64, 700))
        self.check(problem, softmax_scale=softmax_scale, logits_soft_cap=cap)

    @parameterized.parameters(1e4, 1e38)
    def test_soft_cap_that_caps_nothing(self, cap):
        problem = self.problem((0, 1, 64, 700))
        got = decode(*problem.arrays, logits_soft_cap=cap)
        want = decode(*problem.arrays)
        np.testing.assert_allclose(got[0].astype(np.float32), want[0].astype(np.float32), atol=1e-2)
        np.testing.assert_allclose(got[1], want[1], atol=1e-4)

    @parameterized.parameters(jnp.bfloat16, jnp.float16)
    def test_window_and_soft_cap(self, dtype):
        problem = self.problem(s_q=2, h_q=32, h_kv=2, dtype=dtype)
        poison_before_window(problem, 100, 1)
        self.check(problem, causal=True, sliding_window=100, logits_soft_cap=20.0)

    def test_vmap(self):
        problem = self.problem((130, 5, 700))
        one = functools.partial(flash_mla_with_kvcache, sliding_window=70, logits_soft_cap=10.0)
        q = np.stack([problem.q, 2 * problem.q])
        got = jax.jit(jax.vmap(one, in_axes=(0, None, None, None)))(q, *problem.arrays[1:])
        for i in range(2):
            want = one(q[i], *problem.arrays[1:])
            np.testing.assert_allclose(
                *(np.asarray(x, np.float32) for x in (got[0][i], want[0])), atol=2e-2, rtol=2e-2
            )
            np.testing.assert_allclose(got[1][i], want[1], atol=1e-4)

    @parameterized.parameters(
        ({"sliding_window": 0}, ValueError, "sliding_window: expected a positive integer, got 0"),
        ({"sliding_window": 1.5}, TypeError, "sliding_window: expected a static Python integer"),
        ({"logits_soft_cap": 0}, ValueError, "logits_soft_cap: expected a positive number, got 0"),
        ({"logits_soft_cap": float("nan")}, ValueError, "logits_soft_cap: expected a finite"),
    )
    def test_bad_input(self, options, error, message):
        problem = self.problem((100,))
        with self.assertRaisesRegex(error, message):
            flash_mla_with_kvcache(*problem.arrays, **options)


if __name__ == "__main__":
    absltest.main()
