"""The FP8 formats and their quantizer: bytes, rounding, and what is not an ordinary number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jax_flashmla import FP8_BLOCK, FP8_PER_TENSOR, dequantize_kv_cache, quantize_kv_cache
from tests import fp8

BOTH = parameterized.parameters("fp8_per_tensor", "fp8_block")
POWERS = parameterized.product(name=("fp8_per_tensor", "fp8_block"), power_of_two=(False, True))


def as_cache(rows):
    """Rows `[n, 576]` as a cache of one page."""
    return jnp.asarray(rows)[None, :, None]


def quantize(rows, name, **options):
    """Rows `[n, 576]` through the library: the cache's rows and its scale."""
    k_cache, k_scale = quantize_kv_cache(as_cache(rows), fp8.FORMATS[name], **options)
    return np.asarray(k_cache)[0, :, 0], None if k_scale is None else np.asarray(k_scale)


def dequantize(rows, k_scale, dtype=jnp.float32):
    return np.asarray(dequantize_kv_cache(as_cache(rows), k_scale, dtype))[0, :, 0]


def scales_in(rows):
    """The float32 scales of fp8_block rows `[n, 656]`."""
    return np.ascontiguousarray(rows[:, 512:528]).view("<f4")


class FormatTest(absltest.TestCase):
    def test_sizes(self):
        self.assertEqual(FP8_PER_TENSOR.dtype, jnp.float8_e4m3fn)
        self.assertEqual(FP8_BLOCK.dtype, jnp.uint8)
        for kind, size in ((FP8_PER_TENSOR, 576), (FP8_BLOCK, 656)):
            self.assertEqual((kind.row_bytes, kind.row_width), (size, size))
            self.assertEqual(kind.width_multiple, 16)

    def test_where_the_bytes_are(self):
        parts = FP8_BLOCK.latent_bytes, FP8_BLOCK.scale_bytes, FP8_BLOCK.rope_bytes
        self.assertEqual(parts, (slice(0, 512), slice(512, 528), slice(528, 656)))
        parts = FP8_PER_TENSOR.latent_bytes, FP8_PER_TENSOR.scale_bytes, FP8_PER_TENSOR.rope_bytes
        self.assertEqual(parts, (slice(0, 512), slice(512, 512), slice(512, 576)))

    def test_a_row_written_by_hand(self):
        row = np.zeros(656, np.uint8)
        row[[0, 127, 128, 511]] = 0x38, 0xB8, 0x7E, 0x01  # 1, -1, 448, 2**-9
        row[512:528] = np.array([2, 0.5, 3, 1 / 3], "<f4").view(np.uint8)
        row[528:530], row[654:656] = (0x80, 0x3F), (0x49, 0xC0)  # 1, -3.140625
        values = dequantize(row[None], None)[0]
        want = np.zeros(576, np.float32)
        want[[0, 127, 128, 511]] = 2, -2, 224, np.float32(1 / 3) * 2**-9
        want[[512, 575]] = 1, -3.140625
        np.testing.assert_array_equal(values, want)


class QuantizeTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()

    def draw(self, count=50, dtype=jnp.bfloat16):
        rows = self.rng.standard_normal((count, 576), np.float32)
        return (rows * self.rng.lognormal(0, 2, (count, 1))).astype(dtype)

    @parameterized.product(
        name=("fp8_per_tensor", "fp8_block"),
        power_of_two=(False, True),
        dtype=("bfloat16", "float16", "float32"),
    )
    def test_bytes(self, name, power_of_two, dtype):
        rows = self.draw(dtype=jnp.dtype(dtype))
        got, k_scale = quantize(rows, name, power_of_two_scales=power_of_two)
        if name == "fp8_per_tensor":
            want = fp8.scales_of(fp8.largest_finite(rows, None), power_of_two)
            np.testing.assert_array_equal(k_scale, want)
        want = fp8.quantize(rows, name, k_scale, power_of_two)
        if jax.default_backend() == "gpu":  # whose reciprocals are not always the nearest
            fp8.assert_next_to(got, want)
        else:
            fp8.assert_same_bytes(got, want)
        values = dequantize(got, k_scale)
        want = fp8.dequantize(got, name, k_scale).astype(np.float32)
        np.testing.assert_array_equal(values, want)
        # Three bits of mantissa, and subnormal numbers below 2**-6 of the scale.
        scales = np.full((50, 576), k_scale)
        if name == "fp8_block":
            scales = np.repeat(scales_in(got), 128, axis=1)
        rows = rows.astype(np.float32)[:, : scales.shape[1]]
        error = np.abs(values[:, : scales.shape[1]] - rows)
        self.assertTrue((error <= np.maximum(np.abs(rows) / 16, scales * 2**-10) * 1.0001).all())

    @parameterized.parameters("float32", "bfloat16", "float16")
    def test_rounds_to_nearest_even(self, dtype):
        exact = np.arange(127, dtype=np.uint8).view(fp8.E4M3).astype(np.float32)
        middle = (exact[1:] + exact[:-1]) / 2
        beside = [np.nextafter(middle, np.float32(x)) for x in (0, 1000)]
        values = np.concatenate([exact, middle, *beside]).astype(jnp.dtype(dtype))
        values = np.concatenate([values, -values])
        rows = np.resize(values, (-(-values.size // 576), 576))
        got, _ = quantize(rows, "fp8_per_tensor", scale=1.0)
        fp8.assert_same_bytes(got, rows.astype(fp8.E4M3))

    def test_powers_of_two(self):
        for factor in (1.0, 448.0, 449.0, 447.0, 7e-3, 3e37, 2.0**-100):
            rows = np.zeros((1, 576), np.float32)
            rows[0, [3, 130, 300, 511, 575]] = np.array([1, -0.5, 0.7, 0.01, 0.5]) * factor
            _, k_scale = quantize(rows, "fp8_per_tensor", power_of_two_scales=True)
            scales = scales_in(quantize(rows, "fp8_block", power_of_two_scales=True)[0])
            for scale, largest in zip(
                [k_scale, *scales[0]], np.float32([1, 1, 0.5, 0.7, 0.01]) * factor, strict=True
            ):
                self.assertEqual(np.frexp(scale)[0], 0.5)
                self.assertLessEqual(largest / 448, scale * (1 + 1e-6))
                self.assertGreater(largest / 448, scale / 2)

    def test_power_of_two_scales_make_exact_bfloat16(self):
        for name in fp8.FORMATS:
            got, k_scale = quantize(self.draw(), name, power_of_two_scales=True)
            exact, rounded = (dequantize(got, k_scale, t) for t in (jnp.float32, jnp.bfloat16))
            np.testing.assert_array_equal(exact, rounded.astype(np.float32))

    @POWERS
    def test_saturates(self, name, power_of_two):
        rows = self.draw(2, jnp.float32)
        rows[0, [0, 200]], rows[1, [3, 400]] = (np.inf, -np.inf), (-np.inf, np.inf)
        got, k_scale = quantize(rows, name, power_of_two_scales=power_of_two)
        fp8.assert_same_bytes(got, fp8.quantize(rows, name, k_scale, power_of_two))
        values = dequantize(got, k_scale)
        self.assertTrue(np.isfinite(values).all())
        scales = np.full((2, 4), k_scale) if name == "fp8_per_tensor" else scales_in(got)
        self.assertEqual(values[0, 0], 448 * scales[0, 0])
        self.assertEqual(values[0, 200], -448 * scales[0, 1])
        self.assertEqual(values[1, 400], 448 * scales[1, 3])

    def test_saturates_beyond_a_given_scale(self):
        rows = np.zeros((1, 576), np.float32)
        rows[0, :6] = 447, 448, 449, 1e30, -465, -3e38
        got, k_scale = quantize(rows, "fp8_per_tensor", scale=0.5)
        want = 224, 224, 224, 224, -224, -224
        np.testing.assert_array_equal(dequantize(got, k_scale)[0, :6], want)

    @POWERS
    def test_nan_stays_where_it_is(self, name, power_of_two):
        rows = self.draw(3)
        clean, _ = quantize(rows, name, power_of_two_scales=power_of_two)
        where = np.zeros(rows.shape, bool)
        where[0, [0, 575]] = where[1, 128:256] = True
        # A NaN changes no scale, unless it takes the place of the largest value.
        rows[0, 0] = rows[0, 575] = rows[0, 5] = 0
        rows[0, 5] = np.abs(rows.astype(np.float32)).max()
        _, want_scale = quantize(rows, name, power_of_two_scales=power_of_two)
        rows[where] = np.nan
        got, k_scale = quantize(rows, name, power_of_two_scales=power_of_two)
        values = dequantize(got, k_scale)
        np.testing.assert_array_equal(np.isnan(values), where)
        np.testing.assert_array_equal(k_scale, want_scale)
        if name == "fp8_per_tensor":
            self.assertContainsSubset(got[where].view(np.uint8), {0x7F, 0xFF})
        else:
            self.assertEqual(scales_in(got)[1, 1], 1)  # of 128 that are all NaN
            fp8.assert_same_bytes(got[2], clean[2])

    @BOTH
    def test_zeros(self, name):
        rows = self.draw(3)
        rows[1] = 0
        rows[2, ::2] = -0.0
        rows[2, 128:256] = 0
        got, k_scale = quantize(rows, name)
        values = dequantize(got, k_scale)
        np.testing.assert_array_equal(values[1], 0)
        np.testing.assert_array_equal(values[2, 128:256], 0)
        self.assertTrue(np.signbit(values[2, :128:2]).all())
        if name == "fp8_block":
            np.testing.assert_array_equal(scales_in(got)[1], 1)
        got, k_scale = quantize(0 * rows, name)
        np.testing.assert_array_equal(dequantize(got, k_scale), 0)
        self.assertIn(k_scale, (None, np.float32(1)))

    @POWERS
    def test_tiny_rows(self, name, power_of_two):
        options = dict(power_of_two_scales=power_of_two)
        rows = np.full((1, 576), 2.0**-110, np.float32)  # whose scale would be below the smallest
        rows[0, 1::2] = -(2.0**-125)
        got, k_scale = quantize(rows, name, **options)
        scales = [k_scale] if name == "fp8_per_tensor" else scales_in(got)[0]
        np.testing.assert_array_equal(scales, np.float32(2.0**-117))
        np.testing.assert_array_equal(dequantize(got, k_scale)[0, :512], rows[0, :512])
        # Subnormal numbers are zeros, and need no scale.
        rows = np.full((1, 576), 2.0**-127, np.float32)
        got, k_scale = quantize(rows, name, **options)
        scales = [k_scale] if name == "fp8_per_tensor" else scales_in(got)[0]
        np.testing.assert_array_equal(scales, np.float32(1))
        np.testing.assert_array_equal(dequantize(got, k_scale)[0, :512], 0)

    @BOTH
    def test_the_largest_numbers(self, name):
        rows = np.full((1, 576), np.finfo(np.float32).max, np.float32)
        rows[0, 512:] = 1
        got, k_scale = quantize(rows, name)
        np.testing.assert_allclose(dequantize(got, k_scale)[0, :512], rows[0, :512], rtol=1e-6)

    def test_rotary_values_of_fp8_block_are_bfloat16(self):
        rows = self.draw(2, jnp.float32)
        rows[0, 512:516] = np.inf, -np.inf, np.nan, 1e6
        got, _ = quantize(rows, "fp8_block")
        want = rows[:, 512:].astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(dequantize(got, None)[:, 512:], want)

    @POWERS
    def test_groups(self, name, power_of_two):
        rows = self.rng.standard_normal((2, 3, 4, 16, 2, 600), np.float32)
        rows *= self.rng.lognormal(0, 2, (2, 3, 1, 1, 1, 1))
        kind = fp8.FORMATS[name]
        quantize = functools.partial(quantize_kv_cache, power_of_two_scales=power_of_two)
        got, k_scale = quantize(rows, kind)
        values = dequantize_kv_cache(got, k_scale)
        self.assertEqual(values.shape, (2, 3, 4, 16, 2, 576))
        mapped, mapped_scale = jax.vmap(jax.vmap(lambda x: quantize(x, kind)))(rows)
        fp8.assert_same_bytes(got, mapped)
        for where in np.ndindex(2, 3):
            one, one_scale = quantize(rows[where], kind)
            fp8.assert_same_bytes(got[where], one)
            fp8.assert_same_bytes(values[where], dequantize_kv_cache(one, one_scale))
            if name == "fp8_per_tensor":
                self.assertEqual(k_scale.shape, (2, 3))
                self.assertEqual(k_scale[where], one_scale)
                self.assertEqual(mapped_scale[where], one_scale)

    @BOTH
    def test_padding_is_not_read(self, name):
        rows = self.draw(2)
        got, k_scale = quantize(rows, name)
        poison = np.full((2, 32), fp8.POISON[name], np.uint8).view(got.dtype)
        wider = np.concatenate([got, poison], axis=1)
        fp8.assert_same_bytes(dequantize(wider, k_scale), dequantize(got, k_scale))

    @BOTH
    def test_no_rows(self, name):
        k_cache, k_scale = quantize_kv_cache(jnp.zeros((0, 64, 1, 576)), fp8.FORMATS[name])
        self.assertEqual(k_cache.shape[:3], (0, 64, 1))
        self.assertEqual(dequantize_kv_cache(k_cache, k_scale).shape, (0, 64, 1, 576))


ROWS = jnp.zeros((3, 64, 1, 576), jnp.bfloat16)
E4M3 = jnp.zeros((3, 64, 1, 576), jnp.float8_e4m3fn)
BYTES = jnp.zeros((3, 64, 1, 656), jnp.uint8)


class ErrorsTest(parameterized.TestCase):
    @parameterized.parameters(
        (dict(kv=ROWS.astype(jnp.int8)), TypeError, "kv: expected dtype bfloat16, float16 or"),
        (dict(kv=ROWS[0]), ValueError, r"kv: expected shape \[\*G, num_blocks, .*got \[64, 1, 576"),
        (dict(kv=ROWS[..., :512]), ValueError, "kv: expected rows of at least 576 columns, got 51"),
        (dict(format="fp8"), TypeError, "format: expected FP8_PER_TENSOR or FP8_BLOCK, got fp8"),
        (dict(power_of_two_scales=1), TypeError, "power_of_two_scales: expected a static Python b"),
        (dict(scale=jnp.ones(1)), ValueError, r"scale: expected shape \[\], got \[1\]"),
        (dict(scale=jnp.int32(1)), TypeError, "scale: expected dtype float32, got int32"),
        (dict(scale=1.0, power_of_two_scales=True), ValueError, "scale: expected None with power"),
        (dict(scale=1.0, format=FP8_BLOCK), ValueError, "scale: expected None for a cache of form"),
    )
    def test_quantize(self, change, error, message):
        arguments = dict(kv=ROWS, format=FP8_PER_TENSOR) | change
        with self.assertRaisesRegex(error, message):
            quantize_kv_cache(arguments.pop("kv"), arguments.pop("format"), **arguments)

    @parameterized.parameters(
        ((ROWS,), TypeError, "k_cache: expected dtype float8_e4m3fn or uint8, got bfloat16"),
        ((ROWS.astype(jnp.float8_e5m2),), TypeError, "k_cache: expected dtype .*got float8_e5m2"),
        ((BYTES[..., :576],), ValueError, r"k_cache: expected rows of 656 bytes \(fp8_block\)"),
        ((BYTES[0],), ValueError, r"k_cache: expected shape \[\*G, num_blocks, .*\[64, 1, 656\]"),
        ((E4M3,), ValueError, "k_scale: expected the float32 scale of the float8_e4m3fn cache"),
        ((E4M3, jnp.ones(2)), ValueError, r"k_scale: expected shape \[\], got \[2\]"),
        ((BYTES, 1.0), ValueError, "k_scale: expected None for a cache of format fp8_block"),
        ((BYTES, None, jnp.int8), TypeError, "dtype: expected bfloat16, float16 or float32"),
    )
    def test_dequantize(self, arguments, error, message):
        with self.assertRaisesRegex(error, message):
            dequantize_kv_cache(*arguments)


if __name__ == "__main__":
    absltest.main()
