"""Rotary embedding and YaRN against the published formulas, without PyTorch."""

import math

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from examples.deepseek import rope
from examples.deepseek.config import parse_config
from examples.deepseek.tests import checkpoints

LONG = {"original_max_position_embeddings": 4096}
V3 = {"qk_nope_head_dim": 128, "v_head_dim": 128}


def config(kind="v3", **changes):
    fields = checkpoints.FIELDS[kind] | V3
    return parse_config(fields | {"rope_scaling": fields["rope_scaling"] | LONG | changes})


class RopeTest(parameterized.TestCase):
    def test_published_frequencies(self):
        # 32 turns in 4,096 tokens are at pair 10.5, one is at 22.5: outwards to 10 and 23.
        plain = 10000.0 ** -(np.arange(32) / 32)
        share = np.clip((np.arange(32) - 10) / 13, 0, 1)
        want = plain * (1 - share) + plain / 40 * share
        np.testing.assert_allclose(rope.frequencies(config()), want, rtol=1e-6)
        without = parse_config(checkpoints.FIELDS["v3"] | {"rope_scaling": None})
        np.testing.assert_allclose(rope.frequencies(without), plain, rtol=1e-6)

    @parameterized.parameters(("v3", 1.0), ("v2_lite", 0.707))
    def test_published_softmax_scales(self, kind, mscale):
        want = 192**-0.5 * (0.1 * mscale * math.log(40) + 1) ** 2
        self.assertAlmostEqual(rope.softmax_scale(config(kind)), want, places=12)
        self.assertAlmostEqual(rope.softmax_scale(config(mscale_all_dim=0)), 192**-0.5, places=12)
        without = parse_config(checkpoints.FIELDS[kind] | V3 | {"rope_scaling": None})
        self.assertAlmostEqual(rope.softmax_scale(without), 192**-0.5, places=12)

    @parameterized.parameters(1.0, 0.5)
    def test_rotation(self, mscale):
        model = config(mscale=mscale)
        rng = np.random.default_rng(0)
        x, positions = rng.standard_normal((5, 64), np.float32), np.array([0, 1, 63, 64, 5000])
        pairs = x[:, 0::2] + 1j * x[:, 1::2]
        pairs = pairs * np.exp(1j * positions[:, None] * rope.frequencies(model).astype(np.float64))
        pairs *= (0.1 * mscale * math.log(40) + 1) / (0.1 * math.log(40) + 1)
        got = rope.rotate(jnp.asarray(x), jnp.asarray(positions), model)
        want = np.concatenate([pairs.real, pairs.imag], axis=-1)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    absltest.main()
