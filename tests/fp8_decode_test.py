"""Decode and append of FP8 caches, against the oracle on what the cache holds.

What must not be read is NaN, scales included; what must not be written is compared byte for byte.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jax_flashmla import append_kv_cache, flash_mla_with_kvcache, get_mla_metadata
from tests import fp8, problems, support

NAMES = tuple(fp8.FORMATS)
BOTH = parameterized.parameters(*NAMES)
PAGE_SIZES = 1, 16, 32, 64, 128, 256, 512, 1024


def cover(**factors):
    return problems.pairwise_cover(
        {"name": NAMES}
        | factors
        | {
            "padding": (0, 16, 48),
            "s_q": (1, 3),
            "causal": (False, True),
            "heads": ((2, 2), (5, 1), (9, 3), (16, 1)),
            "dtype": ("bfloat16", "float16"),
            "power_of_two": (False, True),
        },
        is_valid=lambda c: not (c["power_of_two"] and c["name"] == "fp8_per_tensor"),
        cost=lambda c: c.get("page", 1) * c["heads"][1] * c["s_q"],
    )


def cover_of_append(**factors):
    """Those with several rows, and not every number of query heads."""
    cases = [case for case in cover(**factors) if case["s_q"] > 1]
    return [{k: v for k, v in case.items() if k not in ("causal", "dtype")} for case in cases]


@functools.partial(jax.jit, static_argnames=("causal", "planned", "pair", "window", "cap"))
def decode(
    q, k_cache, block_table, lengths, k_scale, causal=False, planned=False, pair=False, **options
):
    metadata = ()
    if planned:
        h_kv = k_cache.shape[-2]
        metadata = get_mla_metadata(lengths, q.shape[-3] * q.shape[-2] // h_kv, h_kv)
    q = (q[..., :512], q[..., 512:]) if pair else q
    return flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        lengths,
        512,
        *metadata,
        k_scale=k_scale,
        causal=causal,
        sliding_window=options.get("window"),
        logits_soft_cap=options.get("cap"),
    )


append = jax.jit(append_kv_cache, static_argnames="power_of_two_scales")


def lengths_around(page):
    """Of no token, of one page and its neighbours, of one block of 64, of several pages."""
    return [0, 1, page - 1, page, page + 1, 63, 64, 65, 2 * page + 70]


class Fp8Test(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()

    def check(self, got, problem, **options):
        dtype = problem.q.dtype
        want, plain = (problem.reference(rounded_to=t, **options) for t in (None, dtype))
        tolerance = fp8.tolerance(problem.q, problem.values)
        support.assert_decodes_well(self, got, want, plain, *tolerance)


class PagedTest(Fp8Test):
    @parameterized.parameters(*cover(page=PAGE_SIZES))
    def test_decode(self, name, page, padding, s_q, causal, heads, dtype, power_of_two):
        problem = fp8.make_problem(
            self.rng,
            lengths_around(page),
            name,
            s_q=s_q,
            h_q=heads[0],
            h_kv=heads[1],
            dtype=jnp.dtype(dtype),
            page=page,
            padding=padding,
            power_of_two=power_of_two,
        )
        got = decode(*problem.arrays, problem.k_scale, causal=causal, planned=s_q > 1)
        self.check(got, problem, causal=causal)

    @parameterized.parameters(*cover_of_append(page=PAGE_SIZES))
    def test_append(self, name, page, padding, s_q, heads, power_of_two):
        problem = fp8.make_problem(
            self.rng, lengths_around(page), name, s_q=s_q, h_kv=heads[1], page=page, padding=padding
        )
        dtype = self.rng.choice(["bfloat16", "float16", "float32"])
        new_kv = fp8.draw_rows(self.rng, problem, jnp.dtype(dtype))
        got = append(
            problem.k_cache,
            new_kv,
            *problem.arrays[2:],
            k_scale=problem.k_scale,
            power_of_two_scales=power_of_two,
        )
        fp8.assert_same_bytes(got, fp8.append(problem, name, new_kv, power_of_two))

    @BOTH
    def test_groups(self, name):
        parts = [
            fp8.make_problem(
                self.rng, self.rng.permutation([3, 0, 300, 128]), name, page=128, padding=16, s_q=2
            )
            for _ in range(6)
        ]
        stacked = fp8.stack(parts)
        q, k_cache, table, lengths = (x.reshape(2, 3, *x.shape[1:]) for x in stacked.arrays)
        k_scale = None if stacked.k_scale is None else stacked.k_scale.reshape(2, 3)
        out, lse = decode(q, k_cache, table, lengths, k_scale, causal=True, planned=True)
        new_kv = np.stack([fp8.draw_rows(self.rng, part) for part in parts])
        appended = append(
            k_cache, new_kv.reshape(2, 3, *new_kv.shape[1:]), table, lengths, k_scale=k_scale
        )
        for i, part in enumerate(parts):
            where = divmod(i, 3)
            self.check((out[where], lse[where]), part, causal=True)
            fp8.assert_same_bytes(appended[where], fp8.append(part, name, new_kv[i]))

    @parameterized.product(name=NAMES, pair=(False, True), cap=(None, 2.0), window=(1, 50, 100))
    def test_windows_caps_and_pairs(self, name, pair, cap, window):
        lengths = [0, 1, 49, 50, 51, 64, 200]
        problem = fp8.make_problem(self.rng, lengths, name, s_q=2, h_q=6)
        # What is before every query's window is not read either.
        for table, length in zip(problem.block_table, lengths, strict=True):
            table[: max(0, length - 1 - window) // 64] = problems.UNUSED_TABLE_ENTRY
        options = {"causal": True, "window": window, "cap": cap}
        got = decode(*problem.arrays, problem.k_scale, pair=pair, **options)
        self.check(got, problem, causal=True, sliding_window=window, logits_soft_cap=cap)

    @parameterized.product(name=NAMES, page=(16, 64), h_q=(8, 16, 40))
    def test_rows_beside_some_of_nan(self, name, page, h_q):
        # What has no maximum yet is not rescaled; the others' maxima rise from block to block.
        problem = fp8.make_problem(self.rng, [700], name, h_q=h_q, page=page)
        problem.q[:] *= 8
        dtype = problem.q.dtype
        want, plain = (problem.reference(rounded_to=t) for t in (None, dtype))
        tolerance = fp8.tolerance(problem.q, problem.values)
        heads = [head for head in (0, 1, 8, 9) if head < h_q / 2]
        problem.q[0, 0, heads, 5] = np.nan
        out, lse = (np.array(x, np.float64) for x in decode(*problem.arrays, problem.k_scale))
        self.assertTrue(np.isnan(out[0, 0, heads]).all() and np.isnan(lse[0, heads, 0]).all())
        out[0, 0, heads], lse[0, heads, 0] = want[0][0, 0, heads], want[1][0, heads, 0]
        support.assert_decodes_well(self, (out, lse), want, plain, *tolerance)

    @BOTH
    def test_page_ids_outside_the_pool_read_as_zeros(self, name):
        problem = fp8.make_problem(self.rng, [49] * 3, name, page=16, h_q=2)
        problem.block_table[0, 1] = len(problem.k_cache)
        problem.block_table[1, 2] = -1
        problem.block_table[2, 0] = np.iinfo(np.int32).min
        self.check(decode(*problem.arrays, problem.k_scale), problem)

    @BOTH
    def test_lengths_are_clamped_to_the_table(self, name):
        problem = fp8.make_problem(self.rng, [48, 48, 0], name, max_blocks=3, page=16, h_q=2)
        longer = np.array([49, np.iinfo(np.int32).max, -3], np.int32)
        self.check(decode(*problem.arrays[:3], longer, problem.k_scale), problem)

    @parameterized.product(h_q=(4, 24, 64), softmax_scale=(0.05, 0.0, -0.05), sign=(1, -1))
    def test_signs_of_scales(self, h_q, softmax_scale, sign):
        problem = fp8.make_problem(self.rng, [0, 63, 300], "fp8_per_tensor", h_q=h_q)
        problem.k_scale *= sign
        problem.values *= sign
        got = jax.jit(functools.partial(flash_mla_with_kvcache, softmax_scale=softmax_scale))(
            *problem.arrays, k_scale=problem.k_scale
        )
        self.check(got, problem, softmax_scale=softmax_scale)

    @parameterized.parameters(2.0**-100, 2.0**-20, 2.0**60)
    def test_scales_far_from_1(self, factor):
        problem = fp8.make_problem(self.rng, [0, 1, 100], "fp8_per_tensor", h_q=4)
        scale = 576**-0.5 / factor
        got = jax.jit(functools.partial(flash_mla_with_kvcache, softmax_scale=scale))(
            *problem.arrays, k_scale=np.float32(problem.k_scale * factor)
        )
        self.check((np.asarray(got[0], np.float64) / factor, got[1]), problem)

    @parameterized.parameters(
        lambda token: np.where(token % 5, 2.0**-40, 0),
        lambda token: np.where(token < 70, 0, 2.0**-40),
        lambda token: np.where(token < 130, 2.0**-20, 1),
        lambda token: np.where(token < 130, 1, 2.0**-20),
        lambda token: 2.0 ** (token // 50 * 8 - 100),
    )
    def test_rows_of_all_sizes(self, size_of):
        # A row of zeros has a scale of 1, whatever its neighbours have.
        problem = fp8.make_problem(self.rng, [300], "fp8_block", h_q=16)
        rows = np.nan_to_num(problem.values).astype(np.float32)
        pages = problem.block_table[0, :5]
        sizes = size_of(np.arange(320)).reshape(5, 64, 1, 1)
        rows[pages, ..., :512] = (rows[pages, ..., :512] * sizes).astype(np.float32)
        problem.k_cache[pages, ..., :656] = fp8.quantize(rows[pages], "fp8_block")
        problem.values[:] = fp8.dequantize(problem.k_cache, "fp8_block")
        self.check(decode(*problem.arrays, problem.k_scale), problem)

    @BOTH
    def test_append_then_decode(self, name):
        # A cache that is filled row by row, as a server does, is the one that is written at once.
        problem = fp8.make_problem(self.rng, [150, 64, 0, 7], name, s_q=3)
        rows = np.nan_to_num(problem.values).astype(np.float32)  # quantized once more, the same
        pool = np.full(problem.k_cache.shape, fp8.POISON[name], np.uint8).view(
            problem.k_cache.dtype
        )
        for end in range(3, 153, 3):
            lengths = np.minimum(end, problem.cache_seqlens)
            new_kv = np.zeros((4, 3, 1, 576), np.float32)
            for i, length in enumerate(lengths):
                for token, position in enumerate(range(length - 3, length)):
                    if position >= 0:
                        page = problem.block_table[i, position // 64]
                        new_kv[i, token] = rows[page, position % 64]
            pool = append(pool, new_kv, problem.block_table, lengths, k_scale=problem.k_scale)
        self.assertTrue(np.isnan(fp8.dequantize(pool, name, problem.k_scale)).any())
        got = decode(problem.q, pool, *problem.arrays[2:], problem.k_scale, causal=True)
        self.check(got, problem, causal=True)

    @BOTH
    def test_append_skips_what_has_no_place(self, name):
        problem = fp8.make_problem(self.rng, [100] * 6, name, s_q=2)
        problem.cache_seqlens[:] = [-5, 0, 1, 64 * 5 + 1, np.iinfo(np.int32).max, 100]
        problem.block_table[5, 1] = len(problem.k_cache)
        new_kv = fp8.draw_rows(self.rng, problem)
        got = append(problem.k_cache, new_kv, *problem.arrays[2:], k_scale=problem.k_scale)
        fp8.assert_same_bytes(got, fp8.append(problem, name, new_kv))

    @BOTH
    def test_append_under_x64(self, name):
        problem = fp8.make_problem(self.rng, [100, 65, 0], name, s_q=2)
        new_kv = fp8.draw_rows(self.rng, problem)
        with jax.enable_x64(True):
            got = append(problem.k_cache, new_kv, *problem.arrays[2:], k_scale=problem.k_scale)
        fp8.assert_same_bytes(got, fp8.append(problem, name, new_kv))

    @BOTH
    def test_append_to_a_pool_without_a_page(self, name):
        kind = fp8.FORMATS[name]
        k_cache = jnp.zeros((0, 64, 1, kind.row_width), kind.dtype)
        new_kv = jnp.ones((2, 1, 1, 576), jnp.bfloat16)
        table, lengths = jnp.zeros((2, 2), jnp.int32), jnp.array([1, 65], jnp.int32)
        k_scale = 1.0 if kind.scale_per_cache else None
        got = append(k_cache, new_kv, table, lengths, k_scale=k_scale)
        self.assertEqual((got.shape, got.dtype), (k_cache.shape, k_cache.dtype))

    @parameterized.product(name=NAMES, unpaged=(False, True))
    def test_an_empty_batch(self, name, unpaged):
        kind = fp8.FORMATS[name]
        k_cache = jnp.zeros((0 if unpaged else 3, 64, 1, kind.row_width), kind.dtype)
        k_scale = 1.0 if kind.scale_per_cache else None
        table = None if unpaged else jnp.zeros((0, 2), jnp.int32)
        q, new_kv = (jnp.zeros((0, 1, h, 576), jnp.bfloat16) for h in (4, 1))
        lengths = jnp.zeros(0, jnp.int32)
        out, lse = flash_mla_with_kvcache(q, k_cache, table, lengths, k_scale=k_scale)
        self.assertEqual((out.shape, lse.shape), ((0, 1, 4, 512), (0, 4, 1)))
        got = append(k_cache, new_kv, table, lengths, k_scale=k_scale)
        fp8.assert_same_bytes(got, k_cache)


class UnpagedTest(Fp8Test):
    @parameterized.parameters(*cover(max_len=(64, 80, 97)))
    def test_decode_and_append(
        self, name, max_len, padding, s_q, causal, heads, dtype, power_of_two
    ):
        problem = fp8.make_problem(
            self.rng,
            np.minimum([0, 1, 63, 64, 65, max_len - 1, max_len], max_len),
            name,
            max_len=max_len,
            s_q=s_q,
            h_q=heads[0],
            h_kv=heads[1],
            dtype=jnp.dtype(dtype),
            padding=padding,
            power_of_two=power_of_two,
        )
        q, k_cache, _, lengths = problem.arrays
        got = decode(q, k_cache, None, lengths, problem.k_scale, causal=causal, planned=s_q > 1)
        self.check(got, problem, causal=causal)
        lengths[-1] = max_len + 1
        new_kv = fp8.draw_rows(self.rng, problem)
        got = append(k_cache, new_kv, None, lengths, k_scale=problem.k_scale)
        fp8.assert_same_bytes(got, fp8.append(problem, name, new_kv))


if __name__ == "__main__":
    absltest.main()
