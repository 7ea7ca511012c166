"""FP8 caches and the decode kernel: what it is given, and what it gives on a GPU."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jax_flashmla import cache_layout, flash_mla_with_kvcache, get_mla_metadata, native
from tests import fp8, problems, support

NAMES = tuple(fp8.FORMATS)


def cover_on_gpu(**factors):
    """Every case is compiled there, and with its reference."""
    factors = {"name": NAMES} | factors
    return problems.pairwise_cover(factors, is_valid=lambda c: True, cost=lambda c: 1)


class KernelTest(parameterized.TestCase):
    """Which FP8 caches the kernel takes, asked as if it could run here."""

    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()
        if native.why_no_kernel("decode") is not None:
            self.enterContext(mock.patch.object(native, "why_no_kernel", return_value=None))

    def lower(self, name, implementation, page=64):
        """The call of the kernel, or nothing."""
        problem = fp8.make_problem(self.rng, [3, 70], name, page=page)
        fun = functools.partial(flash_mla_with_kvcache, implementation=implementation)
        traced = jax.jit(fun).trace(*problem.arrays, k_scale=problem.k_scale)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return "".join(line for line in text.splitlines() if "@jax_flashmla_decode(" in line)

    @parameterized.product(name=NAMES, implementation=(None, "cuda"), page=(1, 64))
    def test_operands(self, name, implementation, page):
        call = self.lower(name, implementation, page)
        cache, scale = ("576xf8E4M3FN", "1xf32") if name == "fp8_per_tensor" else ("656xui8", "0xf")
        pattern = rf"bf16>, tensor<1x\d+x{page}x1x{cache}>, tensor<{scale}.*>, tensor<1x2"
        self.assertRegex(call, pattern)

    def test_no_scale_of_a_16_bit_cache(self):
        problem = problems.make_problem(self.rng, [3, 70])
        traced = jax.jit(flash_mla_with_kvcache).trace(*problem.arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        self.assertRegex(text, r"x64x1x576xbf16>, tensor<0xf32>, tensor<1x2x\d+xi32>")


class OnGpuTest(parameterized.TestCase):
    """On a GPU: the kernel, and XLA."""

    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()
        support.need_kernel(self, "decode")

    def check_on_gpu(self, problem, unpaged=False, implementation="cuda"):
        """Results are held to the same computation in 16 bits, keys rounded to q's dtype too."""
        run = jax.jit(
            functools.partial(flash_mla_with_kvcache, causal=True, implementation=implementation)
        )
        q, k_cache, table, lengths = problem.arrays
        table_operand = None if unpaged else table
        got = run(q, k_cache, table_operand, lengths, k_scale=problem.k_scale)
        want = self.plain(problem, jnp.float32, None)
        plain = self.plain(problem, None, q.dtype)
        want = [np.asarray(x, np.float64) for x in want]
        finite = np.isfinite(want[1])
        dtype, lse_slack = fp8.tolerance(q, problem.values)
        slack = lse_slack + 2 * np.abs(np.asarray(plain[1])[finite] - want[1][finite]).max(
            initial=0
        )
        np.testing.assert_allclose(
            np.asarray(got[1])[finite], want[1][finite], rtol=1e-5, atol=1e-4 + slack
        )
        support.assert_decodes_well(self, (got[0], want[1]), want, plain, dtype)

    def plain(self, problem, weights, keys_dtype):
        """In float32 on dequantized keys, or on these rounded to 16 bits; fp8_per_tensor: exact."""
        values = np.nan_to_num(problem.values).astype(np.float32)
        if keys_dtype is not None and problem.k_scale is None:
            values = values.astype(keys_dtype).astype(np.float32)
        arrays = problem.q, values, problem.block_table, problem.cache_seqlens
        return support.decode_in_low_precision(arrays, 576**-0.5, True, weights)

    @parameterized.parameters(
        *cover_on_gpu(
            implementation=("cuda", "xla"),
            page=cache_layout.PAGE_SIZES,
            padding=(0, 48),
            h_q=(3, 16, 64, 126),
            s_q=(1, 3),
        )
    )
    def test_paged(self, name, implementation, page, padding, h_q, s_q):
        lengths = [*[0, 1, page - 1, page, page + 1, 63, 64, 65], *self.rng.integers(0, 5000, 20)]
        problem = fp8.make_problem(
            self.rng, lengths, name, s_q=s_q, h_q=h_q, page=page, padding=padding
        )
        self.check_on_gpu(problem, implementation=implementation)

    @parameterized.parameters(*cover_on_gpu(h_kv=(2, 3, 8), s_q=(1, 2, 4)))
    def test_kv_heads(self, name, h_kv, s_q):
        lengths = [0, 1, 63, 64, 65, *self.rng.integers(0, 2000, 20)]
        problem = fp8.make_problem(self.rng, lengths, name, s_q=s_q, h_q=3 * h_kv, h_kv=h_kv)
        self.check_on_gpu(problem)

    @parameterized.product(name=NAMES, max_len=(64, 80, 1024, 6144), h_q=(16, 128))
    def test_unpaged(self, name, max_len, h_q):
        lengths = self.rng.integers(0, max_len + 1, 20)
        problem = fp8.make_problem(self.rng, lengths, name, max_len=max_len, s_q=2, h_q=h_q)
        self.check_on_gpu(problem, unpaged=True)

    @parameterized.product(name=NAMES, h_q=(16, 32, 128), padding=(0, 48))
    def test_sequences_behind_those_of_nan(self, name, h_q, padding):
        # In one partition of the plan, so that a sequence's last block lies where those of NaN did.
        lengths = problems.with_neighbours(self.rng, problems.SHORT_ENDS, 300)
        problem = fp8.make_problem(self.rng, lengths, name, h_q=h_q, padding=padding)
        plan = get_mla_metadata(lengths, h_q, 1, num_sms=1)
        options = {"k_scale": problem.k_scale, **plan._asdict()}
        run = jax.jit(functools.partial(flash_mla_with_kvcache, implementation="cuda"))
        want = jax.block_until_ready(run(*problem.arrays, **options))
        pages = problem.block_table[::2, :5]
        problem.k_cache.view(np.uint8)[pages] = fp8.POISON[name]
        got = run(*problem.arrays, **options)
        for a, b in zip(got, want, strict=True):
            self.assertTrue(np.isnan(np.asarray(a[::2], np.float32)).all())
            self.assertTrue(np.isfinite(np.asarray(b, np.float32)).all())
            np.testing.assert_array_equal(a[1::2], b[1::2])

    @parameterized.parameters(
        *cover_on_gpu(batch=(1, 64), keys=(20, 140, 4096), h_q=(1, 9, 63, 128))
    )
    def test_batches(self, name, batch, keys, h_q):
        problem = fp8.make_problem(
            self.rng, np.full(batch, keys), name, h_q=h_q, dtype=jnp.float16, power_of_two=True
        )
        self.check_on_gpu(problem)


if __name__ == "__main__":
    absltest.main()
