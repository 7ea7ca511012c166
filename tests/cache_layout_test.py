"""Decode and append over the ways that caches lie in memory: page sizes, padded rows, no pages.

What must not be read is NaN, what must not be written is compared bit for bit.
"""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jax_flashmla import (
    append_kv_cache,
    cache_layout,
    flash_mla_with_kvcache,
    get_mla_metadata,
    native,
)
from tests import oracle, problems, support

PAGE_SIZES = 1, 16, 32, 64, 128, 256, 512, 1024
WIDTHS = 576, 584, 640
MAX_LENS = 64, 80, 100, 1024  # the kernel does not take 100


def cover(**factors):
    return problems.pairwise_cover(
        factors
        | {
            "width": WIDTHS,
            "s_q": (1, 3),
            "causal": (False, True),
            "h_kv": (1, 2),
            "dtype": ("bfloat16", "float16"),
        },
        is_valid=lambda c: True,
        cost=lambda c: c.get("page", 1) * c["h_kv"] * c["s_q"],
    )


def cover_of_append(**factors):
    """Those with several rows, which has fewer ways to go wrong than decode."""
    cases = [case for case in cover(**factors) if case["s_q"] > 1]
    return [{name: case[name] for name in case if name != "causal"} for case in cases]


@functools.partial(jax.jit, static_argnames=("causal", "planned"))
def decode(q, k_cache, block_table, cache_seqlens, causal=False, planned=False):
    metadata = ()
    if planned:
        h_kv = k_cache.shape[-2]
        metadata = get_mla_metadata(cache_seqlens, q.shape[-3] * q.shape[-2] // h_kv, h_kv)
    return flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 512, *metadata, causal=causal
    )


append = jax.jit(append_kv_cache)


def lengths_around(page):
    """Of no token, of one page and its neighbours, of one block of 64, of several pages."""
    return [0, 1, page - 1, page, page + 1, 63, 64, 65, 2 * page + 70]


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
    @parameterized.parameters(*cover(page=PAGE_SIZES))
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

    @parameterized.parameters(*cover_of_append(page=PAGE_SIZES))
    def test_append(self, page, width, s_q, h_kv, dtype):
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
        support.assert_same_bits(got, oracle.append(*operands))

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

    def test_packed_pages_of_four_axes(self):
        # As JAX servers keep them, two tokens to 32 bits: the same bytes.
        problem = problems.make_problem(self.rng, lengths_around(16), page=16, width=640, s_q=2)
        q, k_cache, *rest = problem.arrays
        new_kv = self.draw_rows(problem)
        k_cache = oracle.append(k_cache, new_kv, *rest)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(packed, new_kv):
            pages, pairs, _, width = packed.shape
            pool = append_kv_cache(packed.reshape(pages, 2 * pairs, 1, width), new_kv, *rest)
            return pool.reshape(packed.shape), flash_mla_with_kvcache(q, pool, *rest)

        packed, got = step(problem.k_cache.reshape(-1, 8, 2, 640), new_kv)
        support.assert_same_bits(packed.reshape(k_cache.shape), k_cache)
        self.check_decode(got, dataclasses.replace(problem, k_cache=k_cache), False)

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


class UnpagedTest(LayoutTest):
    def draw(self, max_len, lengths=None, **options):
        if lengths is None:
            lengths = np.minimum([0, 1, 63, 64, 65, max_len - 1, max_len, max_len // 2], max_len)
        return problems.make_unpaged_problem(self.rng, lengths, max_len, **options)

    @parameterized.parameters(*cover(max_len=MAX_LENS))
    def test_decode(self, max_len, width, s_q, causal, h_kv, dtype):
        problem = self.draw(
            max_len, s_q=s_q, h_q=2 * h_kv, h_kv=h_kv, dtype=jnp.dtype(dtype), width=width
        )
        q, k_cache, _, lengths = problem.arrays
        got = decode(q, k_cache, None, lengths, causal=causal, planned=s_q > 1)
        self.check_decode(got, problem, causal)

    @parameterized.parameters(*cover_of_append(max_len=MAX_LENS))
    def test_append(self, max_len, width, s_q, h_kv, dtype):
        problem = self.draw(max_len, s_q=s_q, h_kv=h_kv, dtype=jnp.dtype(dtype), width=width)
        _, k_cache, table, lengths = problem.arrays
        lengths[-1] = self.rng.choice([-5, max_len + 1, max_len + s_q, np.iinfo(np.int32).max])
        new_kv = self.draw_rows(problem)
        got = append(k_cache, new_kv, None, lengths)
        support.assert_same_bits(got, oracle.append(k_cache, new_kv, table, lengths))

    @parameterized.parameters(1, 7, 97, 4099)
    def test_any_max_len(self, max_len):
        problem = self.draw(max_len, [0, 1, max_len], h_q=2)
        q, k_cache, _, lengths = problem.arrays
        self.check_decode(decode(q, k_cache, None, lengths), problem, False)

    def test_lengths_are_clamped_to_max_len(self):
        problem = self.draw(80, [80, 80, 0], h_q=2)
        q, k_cache, *_ = problem.arrays
        longer = np.array([81, np.iinfo(np.int32).max, -3], np.int32)
        self.check_decode(decode(q, k_cache, None, longer), problem, False)

    def test_groups(self):
        parts = [
            self.draw(80, self.rng.permutation([3, 0, 80, 64]), width=640, s_q=2) for _ in range(6)
        ]
        grouped = problems.stack(parts)
        q, k_cache, _, lengths = (x.reshape(2, 3, *x.shape[1:]) for x in grouped.arrays)
        out, lse = decode(q, k_cache, None, lengths, causal=True)
        new_kv = np.stack([self.draw_rows(part) for part in parts])
        appended = append(k_cache, new_kv.reshape(2, 3, *new_kv.shape[1:]), None, lengths)
        for i, part in enumerate(parts):
            where = divmod(i, 3)
            self.check_decode((out[where], lse[where]), part, True)
            _, pool, *table = part.arrays
            want = oracle.append(pool, new_kv[i], *table)
            support.assert_same_bits(appended[where], want)

    @parameterized.parameters({}, {"groups": (0,)}, {"groups": (3,)})
    def test_an_empty_batch(self, groups=()):
        shapes = (0, 1, 16, 576), (0, 80, 1, 576), (0, 1, 1, 576)
        q, k_cache, new_kv = (jnp.zeros((*groups, *shape), jnp.bfloat16) for shape in shapes)
        lengths = jnp.zeros((*groups, 0), jnp.int32)
        out, lse = decode(q, k_cache, None, lengths)
        self.assertEqual(out.shape, (*groups, 0, 1, 16, 512))
        self.assertEqual(lse.shape, (*groups, 0, 16, 1))
        self.assertEqual(append(k_cache, new_kv, None, lengths).shape, k_cache.shape)


class KernelTest(LayoutTest):
    """Which caches the kernel takes, asked as if it could run here."""

    def setUp(self):
        super().setUp()
        if native.why_no_kernel("decode") is not None:
            self.enterContext(mock.patch.object(native, "why_no_kernel", return_value=None))

    def lower(self, cache_shape, paged, implementation):
        """The call of the kernel, or nothing."""
        arrays = jnp.zeros((3, 1, 4, 576), jnp.bfloat16), jnp.zeros(cache_shape, jnp.bfloat16)
        table, lengths = jnp.zeros((3, 5), jnp.int32), jnp.zeros(3, jnp.int32)
        fun = functools.partial(flash_mla_with_kvcache, implementation=implementation)
        traced = jax.jit(fun).trace(*arrays, table if paged else None, lengths)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return "".join(line for line in text.splitlines() if "@jax_flashmla_decode(" in line)

    @parameterized.product(page=PAGE_SIZES, implementation=(None, "cuda"))
    def test_page_sizes(self, page, implementation):
        call = self.lower((7, page, 1, 640), True, implementation)
        self.assertIn(f"tensor<1x7x{page}x1x640xbf16>", call)
        self.assertIn("tensor<1x3x5xi32>", call)

    @parameterized.product(
        seen_as=(
            (64, 1, 64),
            (80, 5, 16),
            (100, 25, 4),
            (65, 65, 1),
            (1024, 1, 1024),
            (6144, 6, 1024),
        ),
        implementation=(None, "cuda"),
    )
    def test_unpaged(self, seen_as, implementation):
        max_len, pages, page = seen_as
        call = self.lower((3, max_len, 1, 640), False, implementation)
        self.assertIn(f"tensor<1x{3 * pages}x{page}x1x640xbf16>", call)
        self.assertIn(f"tensor<1x3x{pages}xi32>", call)

    @parameterized.parameters(80, 75, 2048)
    def test_an_unpaged_cache_cut_into_pages_is_the_same(self, max_len):
        lengths = [0, 1, max_len, max_len // 2 + 1]
        problem = problems.make_unpaged_problem(self.rng, lengths, max_len, h_q=1)
        cut = cache_layout.cut_for_kernel(problem.k_cache[None], problem.block_table[None])
        k_cache, block_table = (np.asarray(x[0]) for x in cut)
        self.assertEqual(max_len % k_cache.shape[1], 0)
        self.assertEqual(1024 % k_cache.shape[1], 0)
        same = dataclasses.replace(problem, k_cache=k_cache, block_table=block_table)
        for x, y in zip(oracle.decode(*same.arrays), oracle.decode(*problem.arrays), strict=True):
            np.testing.assert_array_equal(x, y)


class OnGpuTest(LayoutTest):
    """The kernel on larger problems."""

    def setUp(self):
        super().setUp()
        support.need_kernel(self, "decode")

    def check(self, problem, paged=True):
        q, k_cache, table, lengths = (jnp.asarray(x) for x in problem.arrays)
        fun = jax.jit(functools.partial(flash_mla_with_kvcache, causal=True, implementation="cuda"))
        operands = q, k_cache, table if paged else None, lengths
        self.assertIn("jax_flashmla_decode", fun.lower(*operands).as_text())
        want, plain = (
            support.decode_in_low_precision((q, k_cache, table, lengths), 576**-0.5, True, weights)
            for weights in (jnp.float32, None)
        )
        want = [np.asarray(x) for x in want]
        support.assert_decodes_well(self, fun(*operands), want, plain, q.dtype)

    @parameterized.parameters("packed", "unpaged")
    def test_other_layouts_are_not_copied(self, layout):
        @jax.jit
        def run(q, k_cache, table, lengths):
            if layout == "packed":
                pages, pairs, _, width = k_cache.shape
                k_cache = k_cache.reshape(pages, 2 * pairs, 1, width)
            return flash_mla_with_kvcache(q, k_cache, table, lengths, implementation="cuda")

        shape = (5000, 16, 2, 640) if layout == "packed" else (8, 20000, 1, 640)
        k_cache, q = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (shape, (8, 1, 16, 576)))
        lengths = jax.ShapeDtypeStruct((8,), jnp.int32)
        table = jax.ShapeDtypeStruct((8, 100), jnp.int32) if layout == "packed" else None
        memory = run.lower(q, k_cache, table, lengths).compile().memory_analysis()
        self.assertLess(memory.temp_size_in_bytes, memory.argument_size_in_bytes / 10)

    @parameterized.product(page=PAGE_SIZES, width=WIDTHS)
    def test_paged(self, page, width):
        lengths = self.rng.integers(0, 9000, 40)
        self.check(problems.make_problem(self.rng, lengths, s_q=2, h_q=128, page=page, width=width))

    @parameterized.product(max_len=(64, 75, 80, 1024, 6144), width=WIDTHS)
    def test_unpaged(self, max_len, width):
        lengths = self.rng.integers(0, max_len + 1, 40)
        problem = problems.make_unpaged_problem(
            self.rng, lengths, max_len, s_q=2, h_q=128, width=width
        )
        self.check(problem, paged=False)


if __name__ == "__main__":
    absltest.main()
