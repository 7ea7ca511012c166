"""The decoder of DeepSeek-V2, V3 and R1."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from examples.deepseek.attention import (
    PAGE,
    Attention,
    Step,
    append,
    attend_to_pages,
    attend_to_sequence,
)
from examples.deepseek.config import Config
from examples.deepseek.moe import Mlp, Moe, reduce
from examples.deepseek.rope import softmax_scale


class Layer(nnx.Module):
    """Attention and feed-forward, each behind a norm and added to what goes in."""

    def __init__(self, config: Config, number: int, *, dtype, axis: str | None, rngs: nnx.Rngs):
        """Random weights for layer `number`."""
        norm = functools.partial(
            nnx.RMSNorm,
            config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.input_norm, self.post_norm = norm(), norm()
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        if config.is_moe(number):
            self.mlp = Moe(config, dtype=dtype, axis=axis, rngs=rngs)
        else:
            self.mlp = Mlp(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)


class Model(nnx.Module):
    """The decoder; see `decode`, `prefill` and `__call__`, which differ in their attention.

    Its methods are what one device computes. `axis` names the mesh axis over which heads, experts
    and the columns of feed-forwards and logits are divided (None: they are not); the methods are
    then called in a `jax.shard_map`, with this device's part of the weights. Two sums over the axis
    in each layer are all that is exchanged. Pools and sequences are divided over another axis,
    which needs no name here: nothing is exchanged over it.
    """

    def __init__(self, config: Config, *, dtype, axis: str | None = None, rngs: nnx.Rngs):
        """Random weights, whole; those that a device has take their place (`bind`)."""
        self.config, self.axis = config, axis
        self.embed = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List(
            Layer(config, number, dtype=dtype, axis=axis, rngs=rngs)
            for number in range(config.num_hidden_layers)
        )
        self.norm = nnx.RMSNorm(
            config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.head = nnx.Linear(
            config.hidden_size,
            config.vocab_size,
            use_bias=False,
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )

    def decode(self, tokens: jax.Array, pools: list[jax.Array], step: Step, attend):
        """One new token of each sequence, by absorbed attention.

        Args:
          tokens: `[g, b]` int32, for each of `g` pools.
          pools: per layer, `[g, num_pages, 64, 1, 576]`.
          step: table, lengths and plan; sequences of length 0 are padding.
          attend: `(q, pool, step, scale) -> weighted latents`, as `attend_with_flash_mla`.

        Returns:
          float32 logits `[g, b, vocabulary]` (this device's columns), and the pools.
        """
        groups = tokens.shape
        positions = jnp.maximum(step.cache_seqlens - 1, 0).reshape(-1)
        scale = softmax_scale(self.config)

        def attention(part, x, pool):
            q_nope, q_rope = part.queries(x, positions)
            rows = part.rows(x, positions).reshape(*groups, 1, -1)
            pool = append(pool, rows, step.block_table, step.cache_seqlens)
            latents = attend((part.absorb(q_nope), q_rope), pool, step, scale)
            return part.project(part.values(latents)), pool

        x, pools = self._layers(self.embed(tokens.reshape(-1)), pools, attention)
        return self._logits(x).reshape(*groups, -1), pools

    def prefill(self, tokens, start, length, pools, block_table):
        """The tokens of one sequence from position `start` to `length - 1`.

        Each of the `g` pools does the same work, on the pages that its row of the table names:
        none, where all entries are -1.

        Args:
          tokens: `[t]` int32; those from `length - start` on are padding.
          start: int32, the position of the first.
          length: int32, above `start`.
          pools: per layer, `[g, num_pages, 64, 1, 576]`.
          block_table: `[g, max_blocks]` int32.

        Returns:
          float32 logits after the last token `[g, vocabulary]` (this device's columns), and the
          pools.
        """
        groups, count = block_table.shape[0], tokens.shape[0]
        positions = start + jnp.arange(count)
        # Padding would be written to the next pages, which the sequence does not have.
        has_page = jnp.arange(block_table.shape[1]) * PAGE < length
        own_pages = jnp.where(has_page, block_table, -1)
        end = jnp.full((groups, 1), start + count, jnp.int32)

        def attention(part, x, pool):
            x = x.reshape(groups, count, -1)
            q = jnp.concatenate(part.queries(x, positions), axis=-1)
            rows = part.rows(x, positions)
            pool = append(pool, rows[:, None], own_pages[:, None], end)
            attend = functools.partial(attend_to_pages, part, start=start, length=length)
            values = jax.vmap(attend)(q, pool, block_table)
            return part.project(values).reshape(groups * count, -1), pool

        x = jnp.tile(self.embed(tokens), (groups, 1))
        x, pools = self._layers(x, pools, attention)
        last = jnp.arange(groups) * count + length - start - 1
        return self._logits(x[last]), pools

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Whole sequences `[b, t]` int32 to float32 logits `[b, t, vocabulary]`: for training."""
        batch = tokens.shape

        def attention(part, x, _):
            return attend_to_sequence(part, x.reshape(*batch, -1)).reshape(x.shape), None

        x, _ = self._layers(
            self.embed(tokens.reshape(-1)), [None] * self.config.num_hidden_layers, attention
        )
        return self._logits(x).reshape(*batch, -1)

    def _layers(self, x, pools, attention):
        """`x [n, hidden]` through all layers; `attention(part, x, pool) -> (x, pool)`."""
        pools = list(pools)
        for number, layer in enumerate(self.layers):
            attended, pools[number] = attention(layer.attention, layer.input_norm(x), pools[number])
            x = x + reduce(attended, self.axis)
            x = x + reduce(layer.mlp(layer.post_norm(x)), self.axis)
        return x, pools

    def _logits(self, x):
        return self.head(self.norm(x)).astype(jnp.float32)


def join(path) -> str:
    """The name of a parameter: its path in the model, with slashes."""
    return "/".join(map(str, path))


@functools.cache
def abstract_model(config: Config, dtype, axis: str | None = None):
    """The model's structure, and its parameters' shapes and dtypes by name, without any array."""
    model = nnx.eval_shape(lambda: Model(config, dtype=dtype, axis=axis, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    shapes = {
        join(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()
    }
    return graph, tuple(flat), shapes


def bind(config: Config, params: dict[str, jax.Array], axis: str | None = None) -> Model:
    """The model with these parameters, whole or a device's part of them, by name."""
    dtype = params["embed/embedding"].dtype
    graph, paths, _ = abstract_model(config, dtype, axis)
    leaves = [(path, nnx.Param(params[join(path)])) for path in paths]
    return nnx.merge(graph, nnx.from_flat_state(leaves))
