"""Rotary position embedding with YaRN's scaling (arXiv 2309.00071), as DeepSeek publishes it."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from examples.deepseek.config import ROPE_DIM, Config, Yarn


def frequencies(config: Config) -> np.ndarray:
    """Radians per position of each pair of columns, float32 `[32]`.

    YaRN keeps the frequencies that turn more than `beta_fast` times within the training length,
    divides those that turn fewer than `beta_slow` times by `factor`, and goes from one to the
    other along a straight line between.
    """
    theta, yarn = config.rope_theta, config.rope_scaling
    plain = theta ** -(np.arange(0, ROPE_DIM, 2) / ROPE_DIM)
    if yarn is None:
        return plain.astype(np.float32)

    def column(turns):
        """The pair of columns, a fraction, that turns so many times in the training length."""
        length = yarn.original_max_position_embeddings
        return ROPE_DIM * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(column(yarn.beta_fast)), 0)
    high = min(math.ceil(column(yarn.beta_slow)), ROPE_DIM - 1)
    # As published: a ramp of no width gets a very small one.
    ramp = (np.arange(ROPE_DIM // 2) - low) / max(high - low, 0.001)
    interpolated = np.clip(ramp, 0, 1)
    return (plain * (1 - interpolated) + plain / yarn.factor * interpolated).astype(np.float32)


def temperature(factor: float, mscale: float) -> float:
    """YaRN's correction of the softmax's temperature, which grows with a context's extension."""
    return 0.1 * mscale * math.log(factor) + 1


def softmax_scale(config: Config) -> float:
    """What scores are multiplied by: the square root's inverse, times YaRN's correction."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= temperature(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def _amplitude(yarn: Yarn | None) -> float:
    """Of sine and cosine; 1 in all published models, where both `mscale`s are the same."""
    if yarn is None:
        return 1.0
    return temperature(yarn.factor, yarn.mscale) / temperature(yarn.factor, yarn.mscale_all_dim)


def rotate(x: jax.Array, positions: jax.Array, config: Config) -> jax.Array:
    """Rotates each pair of neighbouring columns by its position's angle.

    The published weights have pairs as neighbours: columns 2 i and 2 i + 1. The result has all
    first columns and then all second ones: queries and keys are permuted alike, so that products
    are the same, and no interleaving is written.

    Args:
      x: `[*n, 64]`, any float dtype.
      positions: int32, a shape that broadcasts with `*n`.
      config: of the model.

    Returns:
      `[*n, 64]` in x's dtype; computed in float32.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies(config)
    amplitude = _amplitude(config.rope_scaling)
    cos, sin = jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude
    first, second = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
