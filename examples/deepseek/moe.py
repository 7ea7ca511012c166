"""Feed-forward layers: dense, and mixtures of experts with DeepSeek's routing."""

import jax
import jax.numpy as jnp
from flax import nnx

from examples.deepseek.config import Config


def reduce(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum of all devices' parts over a mesh axis; `x` itself where there is no mesh."""
    return x if axis is None else jax.lax.psum(x, axis)


class Mlp(nnx.Module):
    """Gated feed-forward: `down(silu(gate(x)) * up(x))`.

    On a mesh each device has some of the inner columns: what it returns is to be summed.
    """

    def __init__(self, hidden: int, inner: int, *, dtype, rngs: nnx.Rngs):
        """Random weights; `dtype` is that of weights and results."""
        linear = {"use_bias": False, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.gate = nnx.Linear(hidden, inner, **linear)
        self.up = nnx.Linear(hidden, inner, **linear)
        self.down = nnx.Linear(inner, hidden, **linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[*n, hidden]` to `[*n, hidden]`, this device's part of it."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


def choose_experts(logits: jax.Array, bias: jax.Array | None, config: Config):
    """Which experts a token goes to, and with which weights.

    Softmax scores with the best experts of all (`greedy`, V2-Lite) or of the groups with the best
    single expert (`group_limited_greedy`, V2; arXiv 2405.04434, section 2.2). Or sigmoid scores,
    to which a bias is added for the choice alone, and groups are ranked by their best two
    (`noaux_tc`, V3; arXiv 2412.19437, section 2.1.2).

    Args:
      logits: `[n, experts]` float32.
      bias: `[experts]` float32, or None for softmax scores.
      config: of the model.

    Returns:
      weights `[n, k]` float32, experts `[n, k]` int32.
    """
    scores = nnx.softmax(logits) if config.scoring_func == "softmax" else nnx.sigmoid(logits)
    ranked = scores if bias is None else scores + bias
    if config.topk_method != "greedy":
        grouped = ranked.reshape(-1, config.n_group, logits.shape[-1] // config.n_group)
        best = jax.lax.top_k(grouped, min(1 if bias is None else 2, grouped.shape[-1]))[0].sum(-1)
        _, groups = jax.lax.top_k(best, config.topk_group)
        allowed = nnx.one_hot(groups, config.n_group, dtype=bool).any(-2)
        # Not by a score of zero: a bias may make scores negative, which would then lose to it.
        ranked = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(logits.shape)
    _, experts = jax.lax.top_k(ranked, config.num_experts_per_tok)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    normalised = config.norm_topk_prob and config.num_experts_per_tok > 1
    if normalised:
        weights /= weights.sum(-1, keepdims=True) + 1e-20
    # V2's published code does one or the other, V3's both.
    if not normalised or config.scoring_func == "sigmoid":
        weights *= config.routed_scaling_factor
    return weights, experts


class Moe(nnx.Module):
    """Routed and shared experts.

    On a mesh each device has some of the routed experts and some columns of the shared ones, and
    all have the tokens: what a device returns is to be summed.
    """

    def __init__(self, config: Config, *, dtype, axis: str | None, rngs: nnx.Rngs):
        """Random weights, for one device or for all: shards of them take their place."""
        experts, inner = config.n_routed_experts, config.moe_intermediate_size
        draw = nnx.initializers.lecun_normal(batch_axis=0)

        def stack(rows, columns):
            return nnx.Param(draw(rngs.params(), (experts, rows, columns), dtype))

        self.config, self.axis = config, axis
        # In float32, as the published code computes it, on GPUs too: choices are not continuous.
        self.router = nnx.Linear(
            config.hidden_size,
            experts,
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            rngs=rngs,
        )
        biased = config.topk_method == "noaux_tc"
        self.bias = nnx.Param(jnp.zeros(experts)) if biased else nnx.data(None)
        self.gate = stack(config.hidden_size, inner)
        self.up = stack(config.hidden_size, inner)
        self.down = stack(inner, config.hidden_size)
        self.shared = nnx.data(None)
        if config.n_shared_experts:
            width = inner * config.n_shared_experts
            self.shared = Mlp(config.hidden_size, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, hidden]` to `[n, hidden]`, this device's part of it."""
        bias = None if self.bias is None else self.bias[...]
        logits = self.router(x.astype(jnp.float32))
        weights, experts = choose_experts(logits, bias, self.config)
        out = self._routed(x, weights, experts)
        return out if self.shared is None else out + self.shared(x)

    def _routed(self, x, weights, experts):
        """The sum over those of each token's experts that are on this device."""
        gate, up, down = self.gate[...], self.up[...], self.down[...]
        here = gate.shape[0]
        first = 0 if self.axis is None else jax.lax.axis_index(self.axis) * here
        local = experts.reshape(-1) - first  # by their number on this device, 0 to here - 1
        is_here = (local >= 0) & (local < here)
        local = jnp.where(is_here, local, here)  # the others last
        order = jnp.argsort(local)
        sizes = jnp.bincount(local, length=here + 1)[:here].astype(jnp.int32)
        rows = x[order // experts.shape[1]]
        hidden = nnx.silu(jax.lax.ragged_dot(rows, gate, sizes))
        hidden *= jax.lax.ragged_dot(rows, up, sizes)
        out = jax.lax.ragged_dot(hidden, down, sizes)
        # Back to the tokens' order; rows of no group may hold anything.
        out = out[jnp.argsort(order)].reshape(*experts.shape, -1)
        weights = jnp.where(is_here.reshape(experts.shape), weights, 0)[..., None]
        out = jnp.where(weights == 0, 0, out.astype(jnp.float32) * weights)
        return out.sum(1).astype(x.dtype)
