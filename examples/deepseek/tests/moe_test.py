"""Routing and experts against loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from examples.deepseek import moe
from examples.deepseek.config import parse_config
from examples.deepseek.tests import checkpoints


def choose_in_numpy(logits, bias, config):
    """One token: the experts' weights, zeros for those not chosen."""
    if config.scoring_func == "softmax":
        scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    else:
        scores = 1 / (1 + np.exp(-logits))
    ranked = scores + bias
    allowed = range(len(logits))
    if config.topk_method != "greedy":
        count = 2 if config.topk_method == "noaux_tc" else 1
        groups = np.split(np.arange(len(logits)), config.n_group)
        groups.sort(key=lambda group: -np.sort(ranked[group])[-count:].sum())
        allowed = np.concatenate(groups[: config.topk_group])
    chosen = sorted(allowed, key=lambda e: -ranked[e])[: config.num_experts_per_tok]
    weights = np.zeros_like(scores)
    weights[chosen] = scores[chosen]
    if config.norm_topk_prob:
        weights /= weights.sum()
        if config.topk_method != "noaux_tc":  # V2 does one or the other
            return weights
    return weights * config.routed_scaling_factor


class MoeTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()

    @parameterized.product(
        kind=tuple(checkpoints.FIELDS), shift=(0.0, -2.0), normalised=(True, False)
    )
    def test_choice(self, kind, shift, normalised):
        # Biases far below zero: what is excluded must not win over negative scores.
        config = parse_config(checkpoints.FIELDS[kind] | {"norm_topk_prob": normalised})
        logits = self.rng.standard_normal((50, 16)).astype(np.float32)
        biased = config.topk_method == "noaux_tc"
        bias = (self.rng.standard_normal(16) * biased + shift).astype(np.float32)
        weights, experts = moe.choose_experts(logits, jnp.asarray(bias) if biased else None, config)
        got = np.zeros((50, 16))
        np.put_along_axis(got, np.asarray(experts), np.asarray(weights), axis=-1)
        want = [choose_in_numpy(row.astype(np.float64), bias * biased, config) for row in logits]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)

    @parameterized.parameters(1, 7, 64)
    def test_experts(self, tokens):
        config = parse_config(checkpoints.FIELDS["v3"])
        layer = moe.Moe(config, dtype=jnp.float32, axis=None, rngs=nnx.Rngs(0))
        x = self.rng.standard_normal((tokens, config.hidden_size)).astype(np.float32)
        weights, experts = moe.choose_experts(layer.router(x), layer.bias[...], config)
        want = np.asarray(layer.shared(x), np.float64)
        for token in range(tokens):
            for weight, e in zip(weights[token], experts[token], strict=True):
                gate, up, down = (np.asarray(w[e]) for w in (layer.gate, layer.up, layer.down))
                inner = np.asarray(jax.nn.silu(x[token] @ gate)) * (x[token] @ up)
                want[token] += float(weight) * (inner @ down)
        np.testing.assert_allclose(layer(x), want, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    absltest.main()
