"""What several test files share: when to skip, and what counts as close enough."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax

from jax_flashmla import native

gpu_required = False  # set by conftest.py


def need_kernel(test_case, operation):
    """Skips the test where `operation` has no CUDA kernel; with --require-gpu, fails it."""
    reason = native.why_no_kernel(operation)
    if reason is not None:
        (test_case.fail if gpu_required else test_case.skipTest)(reason)


def skip_if_scatters_copy(test_case):
    """Skips where XLA copies a 16-bit pool to write rows into it."""
    version = tuple(map(int, jaxlib.__version__.split(".")[:2]))
    if jax.default_backend() == "cpu" and version < (0, 11):
        test_case.skipTest("XLA:CPU of jaxlib 0.10 scatters 16-bit floats through a float32 copy")


@contextlib.contextmanager
def strict_promotions():
    """As strict as a user's program can be about operands of different ranks and dtypes."""
    strict = {"jax_numpy_rank_promotion": "raise", "jax_numpy_dtype_promotion": "strict"}
    before = {name: getattr(jax.config, name) for name in strict}
    try:
        for name, value in strict.items():  # in all threads: XLA has one that partitions
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def assert_same_bits(got, want):
    """Compares 16-bit arrays, NaN included."""
    np.testing.assert_array_equal(*(np.asarray(x).view(np.uint16) for x in (got, want)))


@functools.partial(jax.jit, static_argnames="weights_dtype")
def decode_in_low_precision(problem_arrays, softmax_scale, causal, weights_dtype=None):
    """The same computation, written plainly: inputs and weights in 16 bits, sums in float32.

    With `weights_dtype=float32`, weights and results are kept in float32: the reference for cases
    that are too large for float64 in NumPy.

    Sets the scale for errors: a 16-bit result cannot be held to float64. A few sequences at a
    time, so that large cases fit in memory. Pages that must not be read are replaced by zeros
    first. Products of 16-bit values are exact in float32, so multiplying upcast operands is the
    same.
    """
    q, k_cache, block_table, cache_seqlens = problem_arrays
    _, s_q, h_q, _ = q.shape
    num_blocks, page, h_kv, _ = k_cache.shape
    tokens = block_table.shape[1] * page
    heads_per_kv = h_q // h_kv

    def product(subscripts, *operands):
        operands = [x.astype(jnp.float32) for x in operands]
        return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST)

    def decode_one(args):
        q, pages, length = args
        positions = jnp.arange(tokens)
        valid = positions < length
        keys = k_cache[jnp.clip(pages, 0, num_blocks - 1)][..., :576]
        keys = keys.reshape(tokens, h_kv, 576)
        keys = jnp.where(valid[:, None, None], keys, 0)
        rows = q.reshape(s_q, h_kv, heads_per_kv, -1)
        scores = softmax_scale * product("sghd,tgd->ghst", rows, keys)
        visible = length - jnp.where(causal, s_q - 1 - jnp.arange(s_q), 0)
        scores = jnp.where(positions < visible[:, None], scores, -jnp.inf)
        top = jnp.maximum(scores.max(-1, keepdims=True), -1e30)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1)
        out = product("ghst,tgv->ghsv", weights.astype(weights_dtype or q.dtype), keys[..., :512])
        out = jnp.where(total[..., None] > 0, out / total[..., None], 0)
        lse = jnp.log(total) + top[..., 0]
        out = out.transpose(2, 0, 1, 3).reshape(s_q, h_q, -1).astype(weights_dtype or q.dtype)
        return out, lse.reshape(h_q, s_q)

    return lax.map(decode_one, (q, block_table, cache_seqlens), batch_size=8)


def assert_decodes_well(test_case, got, want, plain, dtype, lse_slack=0.0):
    """Compares `(out, lse)` with the float64 oracle's.

    The error may be at most twice that of `plain`, the same computation written plainly, above the
    rounding of one result to `dtype`. That of lse may be larger by `lse_slack`.
    """
    out, lse = (np.asarray(x, np.float64) for x in got)
    want_out, want_lse = want
    plain_out = np.asarray(plain[0], np.float64)
    test_case.assertEqual(out.shape, want_out.shape)
    test_case.assertEqual(lse.shape, want_lse.shape)
    test_case.assertTrue(np.isfinite(out).all(), "out has NaN or infinity")

    rounding = float(jnp.finfo(dtype).eps)
    for norm in (_rms, _largest):
        limit = 2 * norm(plain_out - want_out) + rounding * norm(want_out)
        test_case.assertLessEqual(norm(out - want_out), limit, norm.__name__)

    empty = np.isneginf(want_lse)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    np.testing.assert_allclose(lse[~empty], want_lse[~empty], rtol=1e-5, atol=1e-4 + lse_slack)
    zero_rows = empty.swapaxes(-1, -2)
    np.testing.assert_array_equal(out[zero_rows], 0)


def assert_packed_decodes_well(test_case, got, want, plain, dtype, lse_slack=0.0):
    """The same for results of packed queries: out [total, h_q, 512] and lse [h_q, total]."""
    # Every query is a sequence of one.
    unpacked = (
        (np.asarray(out)[:, None], np.asarray(lse).T[:, :, None]) for out, lse in (got, want, plain)
    )
    assert_decodes_well(test_case, *unpacked, dtype, lse_slack)


def _rms(x):
    return np.sqrt(np.mean(np.square(x))) if x.size else 0.0


def _largest(x):
    return np.abs(x).max(initial=0.0)
