"""`quantize_kv_cache` and `dequantize_kv_cache`: between numbers and the FP8 cache formats."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_flashmla import arguments
from jax_flashmla.arguments import HEAD_DIM, LATENT_DIM
from jax_flashmla.cache_formats import (
    E4M3,
    E4M3_MAX,
    FP8_FORMATS,
    CacheFormat,
    described,
    format_of,
)
from jax_flashmla.cache_layout import check_scale
from jax_flashmla.primitive import without_derivative
from jax_flashmla.promotion import own_promotions

ROW_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
# The smallest scale: with it the smallest e4m3 value, 2**-9, is float32's smallest normal number,
# so that no platform flushes a dequantized value to zero and another does not.
MIN_SCALE = 2.0**-117


@own_promotions
def quantize_kv_cache(
    kv: jax.Array,
    format: CacheFormat,
    *,
    scale: jax.Array | float | None = None,
    power_of_two_scales: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Writes a cache, or rows of one, in an FP8 format.

    A scale is the largest finite magnitude of what it scales, divided by 448; at least 2**-117, and
    1 where that magnitude is below 2**-126. Values times its reciprocal, in float32, are rounded to
    the nearest e4m3 number, ties to even. Beyond the range, infinities included, they become the
    largest, 448 times the scale, with their sign. NaN stays NaN, and no scale depends on it. Rotary
    values of `FP8_BLOCK` are rounded to bfloat16, no more.

    `*G` stands for any number of leading group axes.

    Args:
      kv: `[*G, num_blocks, page_block_size, h_kv, width]`, or any other two axes before `h_kv`,
        bfloat16, float16 or float32: rows of 576 columns; what follows them is dropped.
      format: `FP8_PER_TENSOR` or `FP8_BLOCK`.
      scale: `[*G]` float32, positive: the scales of `FP8_PER_TENSOR`. `None`: computed from `kv`.
      power_of_two_scales: round computed scales up to powers of two. Dequantized values are then
        exact in bfloat16; of e4m3's range up to half is not used.

    Returns:
      The cache `[.., 576]` float8_e4m3fn and its scale `[*G]` float32, or the cache `[.., 656]`
      uint8 and `None`: the `k_cache` and `k_scale` of `flash_mla_with_kvcache`.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype, shape or value.

    Example:
      One page of 64 tokens, all values 3:

      >>> kv = jnp.full((1, 64, 1, 576), 3, jnp.bfloat16)
      >>> k_cache, k_scale = quantize_kv_cache(kv, FP8_PER_TENSOR)
      >>> k_cache.dtype.name, k_cache.shape, f"{k_scale:.6f}"
      ('float8_e4m3fn', (1, 64, 1, 576), '0.006696')
      >>> dequantize_kv_cache(k_cache, k_scale)[0, 0, 0, 0]
      Array(3, dtype=bfloat16)
    """
    if format not in FP8_FORMATS:
        names = " or ".join(f"{kind}".upper() for kind in FP8_FORMATS)
        raise TypeError(f"format: expected {names}, got {format}")
    kv = rows_array("kv", kv)
    groups = kv.shape[:-4] if kv.ndim >= 4 else ("*G",)
    names = "num_blocks", "page_block_size", "h_kv"
    arguments.shape("kv", kv, (*groups, *names, "width"))
    if kv.shape[-1] < HEAD_DIM:
        raise ValueError(f"kv: expected rows of at least {HEAD_DIM} columns, got {kv.shape[-1]}")
    arguments.static_bool("power_of_two_scales", power_of_two_scales)
    if scale is not None:
        if power_of_two_scales:
            raise ValueError("scale: expected None with power_of_two_scales, got a scale")
        scale = check_scale("scale", scale, format, groups, "group axes as kv's")
    return _quantize(kv, scale, format=format, power_of_two_scales=power_of_two_scales)


@own_promotions
def dequantize_kv_cache(
    k_cache: jax.Array, k_scale: jax.Array | float | None = None, dtype=jnp.bfloat16
) -> jax.Array:
    """The values of an FP8 cache, or of rows of one.

    Args:
      k_cache: `[*G, num_blocks, page_block_size, h_kv, width]`, or any other two axes before
        `h_kv`, float8_e4m3fn or uint8: the dtype says which format it is.
      k_scale: `[*G]` float32, the scales of a float8_e4m3fn cache; `None` for others.
      dtype: of the result, bfloat16, float16 or float32. Products with scales are computed in
        float32.

    Returns:
      `[.., 576]` in `dtype`.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    k_cache = arguments.array("k_cache", k_cache)
    format = format_of(k_cache)
    if format not in FP8_FORMATS:
        raise TypeError(f"k_cache: expected dtype float8_e4m3fn or uint8, got {k_cache.dtype}")
    groups = k_cache.shape[:-4] if k_cache.ndim >= 4 else ("*G",)
    names = "num_blocks", "page_block_size", "h_kv"
    arguments.shape("k_cache", k_cache, (*groups, *names, "width"))
    if k_cache.shape[-1] < format.row_width:
        raise ValueError(f"k_cache: expected rows of {described(format)}, got {k_cache.shape[-1]}")
    k_scale = check_scale("k_scale", k_scale, format, groups, "group axes as k_cache's")
    if jnp.dtype(dtype) not in ROW_DTYPES:
        raise TypeError(f"dtype: expected bfloat16, float16 or float32, got {jnp.dtype(dtype)}")
    return _dequantize(k_cache, k_scale, dtype=jnp.dtype(dtype))


def rows_array(name: str, value) -> jax.Array:
    """`value` as an array that can be quantized."""
    value = arguments.array(name, value)
    if value.dtype not in ROW_DTYPES:
        raise TypeError(f"{name}: expected dtype bfloat16, float16 or float32, got {value.dtype}")
    return value


@functools.partial(jax.jit, static_argnames=("format", "power_of_two_scales"))
def _quantize(kv, scale, *, format, power_of_two_scales):
    kv = kv[..., :HEAD_DIM]
    if format.scale_per_cache and scale is None:
        largest = _finite_magnitudes(kv).max(axis=(-4, -3, -2, -1), initial=0)
        scale = _scales(largest, power_of_two_scales)
    return quantize_rows(kv, format, scale, power_of_two_scales), scale


@functools.partial(jax.jit, static_argnames=("format", "power_of_two_scales"))
def quantize_rows(rows, format, k_scale=None, power_of_two_scales=False):
    """Rows `[*G, .., 576]` in an FP8 format; `k_scale [*G]` is that of `FP8_PER_TENSOR`."""
    if format.scale_per_cache:
        return _to_e4m3(rows.astype(jnp.float32), _beside(k_scale, rows))
    rows = without_derivative(f"quantization to {format}", rows)
    *leading, _ = rows.shape
    blocks = rows[..., :LATENT_DIM].astype(jnp.float32)
    blocks = blocks.reshape(*leading, format.scales_per_row, format.scale_block)
    scales = _scales(_finite_magnitudes(blocks).max(axis=-1), power_of_two_scales)
    latent = _to_e4m3(blocks, scales[..., None])
    rope = rows[..., LATENT_DIM:HEAD_DIM].astype(format.rope_dtype)
    return jnp.concatenate([_to_bytes(x, leading) for x in (latent, scales, rope)], axis=-1)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(k_cache, k_scale, *, dtype):
    return dequantize_rows(k_cache, k_scale).astype(dtype)


def dequantize_rows(rows, k_scale=None):
    """Rows `[*G, .., 576]` in float32, of a cache of any format; `k_scale` as the format has."""
    values = unpack_rows(rows, jnp.float32)
    return values if k_scale is None else values * _beside(k_scale, values)


def unpack_rows(rows, dtype):
    """Rows `[.., 576]` of a cache of any format in a 16-bit dtype or float32, but for `k_scale`.

    Products with the scales of `FP8_BLOCK` are computed in float32; all else is exact.
    """
    format = format_of(rows)
    if not format.scale_block:
        return rows[..., :HEAD_DIM].astype(dtype)
    *leading, _ = rows.shape
    latent = lax.bitcast_convert_type(rows[..., format.latent_bytes], format.latent_dtype)
    scales = _from_bytes(rows[..., format.scale_bytes], jnp.float32)
    rope = _from_bytes(rows[..., format.rope_bytes], format.rope_dtype)
    blocks = latent.astype(jnp.float32).reshape(*leading, format.scales_per_row, format.scale_block)
    latent = (blocks * scales[..., None]).reshape(*leading, LATENT_DIM)
    return jnp.concatenate([latent.astype(dtype), rope.astype(dtype)], axis=-1)


def _scales(largest, power_of_two):
    """The float32 scales of values of at most these magnitudes."""
    # Times the reciprocal: XLA rewrites a quotient to this, on some platforms.
    scales = jnp.maximum(largest * np.float32(1 / E4M3_MAX), MIN_SCALE)
    if power_of_two:  # the exponent's next step, unless all bits behind it are zero
        bits = lax.bitcast_convert_type(scales, jnp.int32)
        scales = lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    # What is smaller is a zero on platforms that flush subnormal numbers.
    return jnp.where(largest < jnp.finfo(jnp.float32).tiny, jnp.float32(1), scales)


def _finite_magnitudes(x):
    x = jnp.abs(x.astype(jnp.float32))
    return jnp.where(jnp.isfinite(x), x, 0)


def _to_e4m3(x, scales):
    """To the nearest; what is beyond the range, to its end: the conversion would give NaN."""
    x = x * (1 / scales)
    return jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(E4M3)


# By shifts: bitcasts between elements of different sizes cannot be exported for any batch.


def _to_bytes(x, leading):
    """`x [*leading, ..]` as bytes `[*leading, n]`, little-endian."""
    size = x.dtype.itemsize
    bits = lax.bitcast_convert_type(x, f"uint{8 * size}")
    if size > 1:
        bits = bits[..., None] >> (8 * jnp.arange(size, dtype=bits.dtype))
    return bits.astype(jnp.uint8).reshape(*leading, math.prod(bits.shape[len(leading) :]))


def _from_bytes(x, dtype):
    """The last axis, read as little-endian numbers of several bytes."""
    size = jnp.dtype(dtype).itemsize
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // size, size).astype(f"uint{8 * size}")
    bits = functools.reduce(jnp.bitwise_or, (parts[..., i] << (8 * i) for i in range(size)))
    return lax.bitcast_convert_type(bits, dtype)


def _beside(k_scale, rows):
    """`k_scale [*G]`, to be broadcast to `rows [*G, ..]`."""
    return k_scale.reshape(*k_scale.shape, *[1] * (rows.ndim - k_scale.ndim))
