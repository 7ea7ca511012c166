"""Decode and append over the ways that caches lie in memory: page sizes, padded rows.

What must not be read is NaN, what must not be written is compared bit for bit.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jax_flashmla import append_kv_cache, flash_mla_with_kvcache, get_mla_metadata, native
from tests import oracle, problems, support

PAGE_SIZES = 1, 16, 32, 64, 128, 256, 512, 1024
WIDTHS = 576, 584, 640
COVER = problems.pairwise_cover(
    {
        "page": PAGE_SIZES,
        "width": WIDTHS,
        "s_q": (1, 3),
        "causal": (False, True),
        "h_kv": (1, 2),
        "dtype": ("bfloat16", "float16"),
    },
    is_valid=lambda c: True,
    cost=lambda c: c["page"] * c["h_kv"] * c["s_q"],
)


@functools.partial(jax.jit, static_argnames=("causal", "planned"))
def decode(q, k_cache, block_table, cache_seqlens, causal=False, planned=False):
    metadata = ()
    if planned:
        rows = q.shape[-3] * q.shape[-2] // k_cache.shape[-2]
        metadata = get_mla_metadata(cache_seqlens, rows, k_cache.shape[-2])
    return flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 512, *metadata, causal=causal
    )


append = jax.jit(append_kv_cache)


def lengths_around(page):
    """Of no token, of one page and its neighbours, of one block of 64, of several pages."""
    return [0, 1, page - 1, page, page + 1, 63, 64, 65, 2 * page + 70]


def append_in_numpy(k_cache, new_kv, block_table, cache_seqlens):
    """One group: the contract, row by row."""
    k_cache = k_cache.copy()
    page_size = k_cache.shape[1]
    batch, s_q = new_kv.shape[:2]
    for i in range(batch):
        for token in range(s_q):
            position = int(cache_seqlens[i]) - s_q + token
            if 0 <= position < block_table.shape[1] * page_size:
                page = block_table[i, position // page_size]
                if 0 <= page < len(k_cache):
                    k_cache[page, position % page_size, :, :576] = new_kv[i, token]
    return k_cache


class LayoutTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()

    def check_decode(self, got, problem, causal):
        dtype = problem.q.dtype
        want, plain = (
            oracle.decode(*problem.arrays, causal=causal, rounded_to=rounded)
            for rounded in (None, dtype)
        )
        support.assert_decodes_well(self, got, want, plain, dtype)

    def draw_rows(self, problem):
        """New rows for the last tokens of every sequence."""
        batch, s_q = problem.q.shape[:2]
        shape = batch, s_q, problem.k_cache.shape[-2], 576
        return self.rng.standard_normal(shape, np.float32).astype(problem.q.dtype)


class PagedTest(LayoutTest):
    @parameterized.parameters(*COVER)
    def test_decode(self, page, width, s_q, causal, h_kv, dtype):
        problem = problems.make_problem(
            self.rng,
            lengths_around(page),
            s_q=s_q,
            h_q=2 * h_kv,
            h_kv=h_kv,
            dtype=jnp.dtype(dtype),
            page=page,
            width=width,
        )
        got = decode(*problem.arrays, causal=causal, planned=s_q > 1)
        self.check_decode(got, problem, causal)

    @parameterized.parameters(*COVER)
    def test_append(self, page, width, s_q, causal, h_kv, dtype):
        del causal
        problem = problems.make_problem(
            self.rng,
            lengths_around(page),
            s_q=s_q,
            h_kv=h_kv,
            dtype=jnp.dtype(dtype),
            page=page,
            width=width,
        )
        _, *operands = problem.arrays
        operands.insert(1, self.draw_rows(problem))
        got = np.asarray(append(*operands))
        support.assert_same_bits(got, append_in_numpy(*operands))

    def test_groups(self):
        parts = [
            problems.make_problem(
                self.rng, self.rng.permutation([3, 0, 500, 256]), page=256, width=640
            )
            for _ in range(3)
        ]
        out, lse = decode(*problems.stack(parts).arrays)
        for i, part in enumerate(parts):
            self.check_decode((out[i], lse[i]), part, False)

    @parameterized.parameters(1, 16, 256)
    def test_page_ids_outside_the_pool_read_as_zeros(self, page):
        lengths = [3 * page + 1] * 3
        problem = problems.make_problem(self.rng, lengths, page=page, h_q=2)
        problem.block_table[0, 1] = len(problem.k_cache)
        problem.block_table[1, 2] = -1
        problem.block_table[2, 0] = np.iinfo(np.int32).min
        want = oracle.decode(*problem.arrays)
        out, lse = decode(*problem.arrays)
        np.testing.assert_allclose(np.asarray(out, np.float32), want[0], atol=2e-2)
        np.testing.assert_allclose(lse, want[1], atol=1e-4)

    @parameterized.parameters(1, 16, 1024)
    def test_lengths_are_clamped_to_the_table(self, page):
        problem = problems.make_problem(
            self.rng, [3 * page, 3 * page, 1], max_blocks=3, page=page, h_q=2
        )
        want = oracle.decode(*problem.arrays)
        longer = np.array([3 * page + 1, np.iinfo(np.int32).max, 1], np.int32)
        out, lse = decode(*problem.arrays[:3], longer)
        np.testing.assert_allclose(np.asarray(out, np.float32), want[0], atol=2e-2)
        np.testing.assert_allclose(lse, want[1], atol=1e-4)


class KernelTest(LayoutTest):
    """Which caches the kernel takes, asked as if it could run here."""

    def setUp(self):
        super().setUp()
        if native.why_no_kernel("decode") is not None:
            self.enterContext(mock.patch.object(native, "why_no_kernel", return_value=None))

    def lower(self, page, implementation, width=576):
        problem = problems.make_problem(self.rng, [3, 70], page=page, width=width)
        fun = functools.partial(flash_mla_with_kvcache, implementation=implementation)
        lowered = jax.jit(fun).trace(*problem.arrays).lower(lowering_platforms=("cuda",))
        return lowered.as_text()

    @parameterized.product(page=PAGE_SIZES[1:], implementation=(None, "cuda"))
    def test_page_sizes_that_it_has(self, page, implementation):
        self.assertIn("@jax_flashmla_decode(", self.lower(page, implementation, 640))

    def test_page_size_1_goes_through_xla(self):
        self.assertNotIn("jax_flashmla_decode", self.lower(1, None))
        with self.assertRaisesRegex(
            RuntimeError,
            "cannot run: the kernel takes pages of 16, 32, .* or 1024 tokens, and k_cache has 1$",
        ):
            self.lower(1, "cuda")


class OnGpuTest(LayoutTest):
    @parameterized.parameters(*PAGE_SIZES[1:])
    def test_the_kernel_on_large_problems(self, page):
        support.need_kernel(self, "decode")
        lengths = self.rng.integers(0, 9000, 40)
        for width in WIDTHS:
            problem = problems.make_problem(
                self.rng, lengths, s_q=2, h_q=128, page=page, width=width
            )
            fun = jax.jit(functools.partial(flash_mla_with_kvcache, causal=True))
            self.assertIn("jax_flashmla_decode", fun.lower(*problem.arrays).as_text())
            got = fun(*problem.arrays)
            want, plain = (
                support.decode_in_low_precision(problem.arrays, 576**-0.5, True, weights)
                for weights in (jnp.float32, None)
            )
            want = [np.asarray(x) for x in want]
            support.assert_decodes_well(self, got, want, plain, problem.q.dtype)


if __name__ == "__main__":
    absltest.main()
