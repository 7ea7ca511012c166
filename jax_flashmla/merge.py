"""`merge_attention_states`: combines attention over disjoint sets of keys."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_flashmla import arguments
from jax_flashmla.promotion import own_promotions


@own_promotions
def merge_attention_states(
    outs: jax.Array | Sequence[jax.Array], lses: jax.Array | Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Combines the results of several decodes of the same queries over disjoint sets of keys.

    The result is what one decode over all of the keys gives: attention is a mean weighted by
    `exp(lse)`. It is how parts of a sequence are joined that lie on several devices (context
    parallelism) or that several sequences share (a common prefix).

    Args:
      outs: `[n, ..., s_q, h_q, d]`, or a sequence of `n` arrays: results of the parts.
      lses: `[n, ..., h_q, s_q]` float32, or a sequence: their log-sum-exps. A part in which a query
        saw no key has -inf there, and its `out` does not matter, NaN included.

    Returns:
      out `[..., s_q, h_q, d]` in the dtype of `outs`, and lse `[..., h_q, s_q]` float32; 0 and -inf
      for a query that saw no key in any part. Computed in float32.

    Raises:
      TypeError, ValueError: the parts do not fit each other.

    Example:
      A part that weighs three times as much as the other:

      >>> outs = jnp.zeros((1, 1, 1, 4)), jnp.ones((1, 1, 1, 4))
      >>> lses = jnp.zeros((1, 1, 1)), jnp.full((1, 1, 1), jnp.log(3.0))
      >>> out, lse = merge_attention_states(outs, lses)
      >>> print(f"{out[0, 0, 0, 0]:.2f} {jnp.exp(lse[0, 0, 0]):.2f}")
      0.75 4.00
    """
    outs, lses = _stack("outs", outs), _stack("lses", lses)
    if outs.ndim < 4:
        raise ValueError(f"outs: expected shape [n, ..., s_q, h_q, d], got {list(outs.shape)}")
    n, *leading, s_q, h_q, _ = outs.shape
    if n == 0:
        raise ValueError("outs: expected at least one part, got none")
    if not jnp.issubdtype(outs.dtype, jnp.floating):
        raise TypeError(f"outs: expected a floating dtype, got {outs.dtype}")
    if lses.dtype != jnp.float32:
        raise TypeError(f"lses: expected dtype float32, got {lses.dtype}")
    arguments.shape("lses", lses, (n, *leading, h_q, s_q), "n, s_q and h_q as outs'")

    top = lses.max(axis=0)
    base = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(lses - base)
    total = weights.sum(axis=0)
    lse = jnp.log(total) + base
    shares = jnp.swapaxes(weights / jnp.where(total == 0, 1, total), -1, -2)[..., None]
    parts = jnp.where(shares == 0, 0, shares * outs.astype(jnp.float32))
    return parts.sum(axis=0).astype(outs.dtype), lse


def _stack(name: str, parts) -> jax.Array:
    if not isinstance(parts, (tuple, list)):
        return arguments.array(name, parts)
    if not parts:
        raise ValueError(f"{name}: expected at least one part, got none")
    parts = [arguments.array(name, part) for part in parts]
    for part in parts:
        if part.shape != parts[0].shape or part.dtype != parts[0].dtype:
            raise ValueError(
                f"{name}: expected parts of the same shape and dtype, got "
                f"{parts[0].dtype}{list(parts[0].shape)} and {part.dtype}{list(part.shape)}"
            )
    return jnp.stack(parts)
