"""What is refused of FP8 caches: the argument's name, what was expected, what came."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jax_flashmla import (
    FP8_BLOCK,
    append_kv_cache,
    flash_mla_with_kvcache,
    quantize_kv_cache,
)

BF16 = jnp.bfloat16
E4M3 = dict(k_cache=jnp.zeros((3, 64, 2, 576), jnp.float8_e4m3fn), k_scale=jnp.float32(1))
BYTES = dict(k_cache=jnp.zeros((3, 64, 2, 656), jnp.uint8))
DECODE = dict(
    q=jnp.zeros((2, 1, 4, 576), BF16),
    block_table=jnp.zeros((2, 5), jnp.int32),
    cache_seqlens=jnp.zeros(2, jnp.int32),
)
GROUPED = {name: jnp.stack([x] * 7) for name, x in (E4M3 | DECODE).items()}
APPEND = {name: x for name, x in DECODE.items() if name != "q"} | dict(
    new_kv=jnp.zeros((2, 1, 2, 576), BF16)
)
SUPPORTED = r"bfloat16 or float16, or float8_e4m3fn \(fp8_per_tensor\) or uint8 \(fp8_block\)"

ERRORS_OF_THE_CACHE = [
    *[
        (dict(k_cache=E4M3["k_cache"].astype(dtype)), TypeError, f"k_cache: .*{SUPPORTED}, got")
        for dtype in (jnp.float8_e5m2, jnp.float8_e4m3b11fnuz, jnp.int8, jnp.float32)
    ],
    (
        E4M3 | dict(k_cache=E4M3["k_cache"][..., :568]),
        ValueError,
        r"rows of 576 columns \(fp8_per_tensor\), or of more .* of 16, got width 568$",
    ),
    (
        BYTES | dict(k_cache=BYTES["k_cache"][..., :576]),
        ValueError,
        r"k_cache: expected rows of 656 bytes \(fp8_block\), or of more .* of 16, got width 576$",
    ),
    (
        BYTES | dict(k_cache=jnp.zeros((3, 64, 2, 664), jnp.uint8)),
        ValueError,
        "a multiple of 16, got width 664$",
    ),
    (
        E4M3 | dict(k_cache=E4M3["k_cache"][:, :48]),
        ValueError,
        "k_cache: expected pages of 1, 16, .* got 48$",
    ),
    (
        E4M3 | dict(k_scale=None),
        ValueError,
        r"k_scale: expected the float32 scale of the float8_e4m3fn cache, shape \[\*G\], got None$",
    ),
    (E4M3 | dict(k_scale=jnp.ones(2)), ValueError, r"k_scale: expected shape \[\], got \[2\]$"),
    (
        E4M3 | dict(k_scale=jnp.ones((), BF16)),
        TypeError,
        "k_scale: expected dtype float32, got bfloat16$",
    ),
    (E4M3 | dict(k_scale="one"), TypeError, "k_scale: expected an array, got str$"),
    (
        BYTES | dict(k_scale=1.0),
        ValueError,
        "k_scale: expected None for a cache of format fp8_block, got a scale$",
    ),
]


class ErrorsTest(parameterized.TestCase):
    def test_valid_calls_are_valid(self):
        for cache in (E4M3, BYTES, E4M3 | dict(k_scale=1.0)):
            flash_mla_with_kvcache(**DECODE, **cache)
            append_kv_cache(**APPEND, **cache)
        flash_mla_with_kvcache(**GROUPED)
        flash_mla_with_kvcache(**(GROUPED | dict(k_scale=np.ones(7, np.float32))))

    @parameterized.parameters(*ERRORS_OF_THE_CACHE)
    def test_cache(self, change, error, message):
        with self.assertRaisesRegex(error, message):
            flash_mla_with_kvcache(**DECODE, **change)
        with self.assertRaisesRegex(error, message):
            append_kv_cache(**APPEND, **change)

    def test_a_scale_of_a_16_bit_cache(self):
        k_cache = jnp.zeros((3, 64, 2, 576), BF16)
        message = "k_scale: expected None for a cache of format bfloat16, got a scale"
        with self.assertRaisesRegex(ValueError, message):
            flash_mla_with_kvcache(**DECODE, k_cache=k_cache, k_scale=1.0)

    @parameterized.product(shape=((), (6,), (7, 1)))
    def test_scales_of_groups(self, shape):
        k_scale = jnp.ones(shape)
        message = r"k_scale: expected shape \[7\] \(group axes as q's\), got"
        with self.assertRaisesRegex(ValueError, message):
            flash_mla_with_kvcache(**(GROUPED | dict(k_scale=k_scale)))

    @parameterized.parameters(
        (
            E4M3 | dict(power_of_two_scales=True),
            ValueError,
            "power_of_two_scales: expected Fa",
        ),
        (
            BYTES | dict(power_of_two_scales=1),
            TypeError,
            "power_of_two_scales: expected a st",
        ),
        (
            BYTES | dict(new_kv=jnp.zeros((2, 1, 2, 576), jnp.int8)),
            TypeError,
            "new_kv: expected",
        ),
        (E4M3 | dict(new_kv=jnp.zeros((2, 1, 2, 656))), ValueError, r"new_kv: .*2, 576\] \(gr"),
    )
    def test_append(self, change, error, message):
        with self.assertRaisesRegex(error, message):
            append_kv_cache(**(APPEND | change))

    def test_derivatives_are_refused(self):
        def loss(k_scale):
            return flash_mla_with_kvcache(**DECODE, **(E4M3 | dict(k_scale=k_scale)))[1].sum()

        with self.assertRaisesRegex(NotImplementedError, "mla_decode has no derivative"):
            jax.grad(loss)(jnp.float32(1))

    def test_derivatives_of_what_becomes_bytes_are_refused(self):
        one_token = dict(cache_seqlens=jnp.ones(2, jnp.int32))
        append, decode = APPEND | BYTES | one_token, DECODE | one_token

        def of_append(new_kv):
            k_cache = append_kv_cache(**(append | dict(new_kv=new_kv)))
            return flash_mla_with_kvcache(**decode, k_cache=k_cache)[1].sum()

        def of_quantize(kv):
            k_cache, _ = quantize_kv_cache(kv, FP8_BLOCK)
            return flash_mla_with_kvcache(**decode, k_cache=k_cache)[1].sum()

        message = "quantization to fp8_block has no derivative"
        for loss, shape in ((of_append, (2, 1, 2, 576)), (of_quantize, (3, 64, 2, 576))):
            rows = jnp.ones(shape)
            self.assertTrue(np.isfinite(jax.jit(jax.vmap(loss))(rows[None])).all())
            for grad in (jax.grad(loss), jax.jit(jax.grad(loss))):
                with self.assertRaisesRegex(NotImplementedError, message):
                    grad(rows)

    def test_traced_while_lowering(self):
        step = functools.partial(flash_mla_with_kvcache, **DECODE)
        with self.assertRaisesRegex(ValueError, "k_scale: expected the float32 scale"):
            jax.jit(step).lower(k_cache=E4M3["k_cache"])


if __name__ == "__main__":
    absltest.main()
