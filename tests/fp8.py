"""FP8 caches in NumPy: written and read plainly, and decode problems with all else poisoned."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_flashmla import FP8_BLOCK, FP8_PER_TENSOR
from tests import oracle, problems

E4M3 = ml_dtypes.float8_e4m3fn
FORMATS = {"fp8_per_tensor": FP8_PER_TENSOR, "fp8_block": FP8_BLOCK}
POISON = {"fp8_per_tensor": 0x7F, "fp8_block": 0xFF}  # bytes of which every number is NaN


def scales_of(largest, power_of_two=False):
    """float32 scales of values of these magnitudes, by the rule of the documentation."""
    scales = np.maximum(np.float32(largest) * np.float32(1 / 448), np.float32(2.0**-117))
    if power_of_two:
        mantissa, exponent = np.frexp(scales)
        scales = np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)
    return np.where(largest < np.float32(2.0**-126), np.float32(1), scales)


def largest_finite(x, axis):
    x = np.abs(np.asarray(x, np.float32))
    return np.where(np.isfinite(x), x, 0).max(axis=axis, initial=0)


def to_e4m3(x, scales):
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.asarray(x, np.float32) * (np.float32(1) / scales)
    return np.clip(scaled, -448, 448).astype(E4M3)


def quantize(rows, name, k_scale=None, power_of_two=False):
    """`rows [.., 576]`; `k_scale` is to be broadcast to them."""
    if name == "fp8_per_tensor":
        return to_e4m3(rows, np.float32(k_scale))
    *leading, _ = rows.shape
    packed = np.empty((*leading, 656), np.uint8)
    for start in range(0, 512, 128):
        block = rows[..., start : start + 128]
        scale = scales_of(largest_finite(block, -1), power_of_two)[..., None]
        packed[..., start : start + 128] = to_e4m3(block, scale).view(np.uint8)
        at = 512 + start // 32
        packed[..., at : at + 4] = scale.astype("<f4").view(np.uint8)
    packed[..., 528:] = np.ascontiguousarray(rows[..., 512:].astype(jnp.bfloat16)).view(np.uint8)
    return packed


def dequantize(cache, name, k_scale=None):
    """float64 values `[.., 576]`."""
    cache = np.asarray(cache)
    with np.errstate(invalid="ignore"):
        if name == "fp8_per_tensor":
            return cache[..., :576].astype(np.float64) * np.asarray(k_scale, np.float64)
        packed = np.ascontiguousarray(cache[..., :656])
        values = np.empty((*packed.shape[:-1], 576))
        scales = np.ascontiguousarray(packed[..., 512:528]).view("<f4")
        latent = np.ascontiguousarray(packed[..., :512]).view(E4M3).astype(np.float64)
        values[..., :512] = latent * np.repeat(scales.astype(np.float64), 128, axis=-1)
        rope = np.ascontiguousarray(packed[..., 528:]).view(jnp.bfloat16)
        values[..., 512:] = rope.astype(np.float64)
    return values


def tolerance(q, values):
    """The dtype whose rounding errors may have, and what is allowed of lse beyond 16-bit caches.

    The kernel multiplies eight bits of a query with e4m3, and the tensor cores add some 14 bits:
    a score has an error of 2**-13 of the root of its products' squares, of float16 queries 2**-10.
    Some are far larger: where a few products are most of a score. This allows the largest of many.
    """
    if jax.default_backend() != "gpu":
        return q.dtype, 0.0
    rows = (np.asarray(x, np.float64) for x in (q, values))
    norms = (np.linalg.norm(np.where(np.isfinite(x), x, 0), axis=-1) for x in rows)
    products = np.prod([norm.max(initial=0) for norm in norms]) / 576
    return jnp.dtype(jnp.bfloat16), products * (2**-8 if q.dtype == jnp.bfloat16 else 2**-7)


@dataclasses.dataclass
class Fp8Problem:
    """Operands of one decode, and what the cache holds."""

    q: np.ndarray
    k_cache: np.ndarray
    k_scale: np.ndarray | None
    block_table: np.ndarray
    cache_seqlens: np.ndarray
    values: np.ndarray  # float64

    @property
    def arrays(self):
        """Decode's operands, but for the scale."""
        return self.q, self.k_cache, self.block_table, self.cache_seqlens

    def reference(self, **options):
        """out and lse by the oracle."""
        return oracle.decode(self.q, self.values, self.block_table, self.cache_seqlens, **options)

    def packed_reference(self, q, cuts, **options):
        """The same for packed queries of its sequences."""
        operands = q, self.values, self.block_table, self.cache_seqlens, cuts
        return oracle.decode_packed(*operands, **options)


def make_problem(rng, lengths, name, *, max_len=None, padding=0, power_of_two=False, **options):
    """As `problems.make_problem`, or with `max_len` as `make_unpaged_problem`.

    Blocks of latent values have magnitudes of their own. `padding` is what rows are wider by.
    """
    if max_len is None:
        plain = problems.make_problem(rng, lengths, **options)
    else:
        plain = problems.make_unpaged_problem(rng, lengths, max_len, **options)
    rows = plain.k_cache.astype(np.float32)
    rows[..., :512] *= np.repeat(rng.lognormal(0, 0.7, (*rows.shape[:-1], 4)), 128, axis=-1)
    k_scale = None
    if name == "fp8_per_tensor":
        k_scale = np.float32(np.nanmax(np.abs(rows), initial=1) / 448 * rng.uniform(0.8, 2))
    cache = quantize(np.nan_to_num(rows), name, k_scale, power_of_two)
    values = dequantize(cache, name, k_scale)
    width = cache.shape[-1] + padding
    padded = np.full((*cache.shape[:-1], width), POISON[name], np.uint8)
    padded[..., : cache.shape[-1]] = cache.view(np.uint8)
    unread = np.isnan(rows[..., 0])
    padded[unread], values[unread] = POISON[name], np.nan
    k_cache = padded.view(FORMATS[name].dtype)
    return Fp8Problem(plain.q, k_cache, k_scale, plain.block_table, plain.cache_seqlens, values)


def stack(parts):
    """Problems of equal shapes as one with a leading group axis."""
    names = [field.name for field in dataclasses.fields(Fp8Problem)]
    columns = {name: [getattr(part, name) for part in parts] for name in names}
    return Fp8Problem(**{k: None if v[0] is None else np.stack(v) for k, v in columns.items()})


def append(problem, name, new_kv, power_of_two=False, cuts=None):
    """The problem's cache with new rows in it, row by row; bytes that are not written stay.

    With `cuts` the rows are packed.
    """
    rows = quantize(new_kv, name, problem.k_scale, power_of_two)
    operands = problem.k_cache, rows, problem.block_table, problem.cache_seqlens
    return oracle.append(*operands) if cuts is None else oracle.append_packed(*operands, cuts)


def draw_rows(rng, problem, dtype=jnp.bfloat16):
    """New rows for the last tokens of every sequence."""
    batch, s_q = problem.q.shape[:2]
    shape = batch, s_q, problem.k_cache.shape[-2], 576
    return rng.standard_normal(shape, np.float32).astype(dtype)


def assert_next_to(got, want):
    """The same bytes, but for a few, which may be the next number's."""
    got, want = (np.asarray(x).view(np.uint8).astype(int) for x in (got, want))
    np.testing.assert_array_less(np.abs(got - want), 2)
    np.testing.assert_array_less((got != want).mean(), 1e-3)


def assert_same_bytes(got, want):
    np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (got, want)))
