"""A case's arrays, and whether an implementation's outputs are right."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import SEED
from jax_flashmla.arguments import HEAD_DIM, LATENT_DIM, PAGE_BLOCK_SIZE

SCALE = HEAD_DIM**-0.5


def make_pool(pages, dtype="bfloat16"):
    """Random pages `[pages, 64, 1, 576]` on the default device."""
    shape = pages, PAGE_BLOCK_SIZE, 1, HEAD_DIM
    return jax.random.normal(jax.random.key(SEED), shape, jnp.dtype(dtype))


def make_operands(case, pool=None, table_tokens=0):
    """Random queries, the pool, a table with pages in random order, the lengths.

    Args:
      case: whose sequences use the first `case.pages` pages of
      pool: by default one that is just large enough. One for all cases spares a compilation each.
      table_tokens: what the table can hold of each sequence, at least; beyond its end are zeros.
    """
    rng = np.random.default_rng(SEED)
    if pool is None:
        pool = make_pool(case.pages, case.dtype)
    widest = math.ceil(max(*case.lengths, table_tokens) / PAGE_BLOCK_SIZE)
    table = np.zeros((case.batch, widest), np.int32)
    ids, used = rng.permutation(case.pages), 0
    for row, length in zip(table, case.lengths, strict=True):
        count = math.ceil(length / PAGE_BLOCK_SIZE)
        row[:count] = ids[used : used + count]
        used += count
    # Made on the host, for the same reason.
    q = rng.standard_normal((case.batch, case.s_q, case.heads, HEAD_DIM), np.float32)
    return (
        jnp.asarray(q.astype(jnp.dtype(case.dtype))),
        pool,
        jnp.asarray(table),
        jnp.asarray(case.lengths, jnp.int32),
    )


def check(case, operands, out, lse=None):
    """Raises unless the outputs are close to float32's for the first and the last sequence.

    And for the shortest and the longest. `out [b, s_q, heads, 512]`; query i sees the keys up to
    `length - s_q + i`. `lse [b, heads, s_q]`, where an implementation has it.
    """
    q, pool, table, _ = operands
    q, table, out = np.asarray(q), np.asarray(table), np.asarray(out)
    order = np.argsort(case.lengths, kind="stable")
    for i in sorted({0, case.batch - 1, int(order[0]), int(order[-1])}):
        length = case.lengths[i]
        keys = np.asarray(pool[table[i]], np.float32)[..., :HEAD_DIM].reshape(-1, HEAD_DIM)
        keys = keys[:length]
        scores = q[i].astype(np.float32) @ keys.T * np.float32(SCALE)  # [s_q, heads, length]
        last = length - case.s_q + np.arange(case.s_q)[:, None, None]
        scores = np.where(np.arange(length) <= last, scores, -np.inf)
        with np.errstate(divide="ignore", invalid="ignore"):  # a query that sees no key
            top = np.maximum(scores.max(axis=-1, keepdims=True), np.finfo(np.float32).min)
            weights = np.exp(scores - top)
            total = weights.sum(axis=-1, keepdims=True)
            want = np.where(total > 0, weights @ keys[:, :LATENT_DIM] / total, 0)
            want_lse = (top + np.log(total))[..., 0]
        error = np.linalg.norm(out[i].astype(np.float32) - want) / np.linalg.norm(want)
        if not error < 1e-2:
            raise AssertionError(f"{case}: sequence {i} has a relative error of {error:.1e}")
        if lse is None:
            continue
        if not np.allclose(np.asarray(lse)[i].T, want_lse, rtol=0, atol=1e-3):
            raise AssertionError(f"{case}: sequence {i} has an lse that is not float32's")
