"""What the rows of a cache are made of, byte by byte.

A row holds one token's 512 latent and 64 rotary values. In 16 bits they are written as they are:

    bytes     0 ................ 1023   1024 ... 1151
              512 latent values         64 rotary values       bfloat16 or float16, as the queries

`FP8_PER_TENSOR`, float8_e4m3fn: a value is the stored one times the cache's scale, a float32 that
is an argument of its own (`k_scale`).

    bytes     0 ................. 511   512 ..... 575
              512 latent values         64 rotary values       e4m3

`FP8_BLOCK`, uint8: the format of DeepSeek-V3.2's cache, as FlashMLA reads it. Latent values are the
stored ones times the scale of their 128; rotary values stay in 16 bits.

    bytes     0 .. 127   128 .. 255   256 .. 383   384 .. 511  latent values, e4m3
              512..515   516 .. 519   520 .. 523   524 .. 527  their scales, float32
              528 .......................................655   64 rotary values, bfloat16

Numbers of several bytes are little-endian. e4m3 has no infinity, its largest value is 448, its
smallest 2**-9, and its NaN 0x7f and 0xff.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jax_flashmla.arguments import HEAD_DIM, LATENT_DIM, ROPE_DIM

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
E4M3_MAX = 448.0
ROW_ALIGNMENT = 16  # bytes: what the copy engine moves


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """How a row of a cache is written.

    Attributes:
      name: what messages call it.
      dtype: of the cache.
      latent_dtype: of the 512 latent values of a row, which come first.
      rope_dtype: of its 64 rotary values, which come last.
      scale_block: so many latent values share a float32 scale, written behind them; 0: none is in
        the row.
      scale_per_cache: whether a float32 scale of the whole cache is passed beside it.
    """

    name: str
    dtype: np.dtype
    latent_dtype: np.dtype
    rope_dtype: np.dtype
    scale_block: int = 0
    scale_per_cache: bool = False

    @property
    def latent_bytes(self) -> slice:
        """Where in a row its latent values are."""
        return slice(0, LATENT_DIM * self.latent_dtype.itemsize)

    @property
    def scale_bytes(self) -> slice:
        """Where in a row its scales are; empty if it has none."""
        start = self.latent_bytes.stop
        return slice(start, start + 4 * self.scales_per_row)

    @property
    def rope_bytes(self) -> slice:
        """Where in a row its rotary values are."""
        start = self.scale_bytes.stop
        return slice(start, start + ROPE_DIM * self.rope_dtype.itemsize)

    @property
    def row_bytes(self) -> int:
        """Of one token, without padding."""
        return self.rope_bytes.stop

    @property
    def row_width(self) -> int:
        """Elements of the cache's last axis that a row takes; what follows is padding."""
        return self.row_bytes // self.dtype.itemsize

    @property
    def width_multiple(self) -> int:
        """The cache's last axis is a multiple of it."""
        return ROW_ALIGNMENT // self.dtype.itemsize

    @property
    def scales_per_row(self) -> int:
        """Scales in a row."""
        return LATENT_DIM // self.scale_block if self.scale_block else 0

    def __str__(self):
        """The name, for messages."""
        return self.name


def _plain(dtype):
    dtype = jnp.dtype(dtype)
    return CacheFormat(dtype.name, dtype, dtype, dtype)


BFLOAT16 = _plain(jnp.bfloat16)
FLOAT16 = _plain(jnp.float16)
FP8_PER_TENSOR = CacheFormat("fp8_per_tensor", E4M3, E4M3, E4M3, scale_per_cache=True)
FP8_BLOCK = CacheFormat(
    "fp8_block", jnp.dtype(jnp.uint8), E4M3, jnp.dtype(jnp.bfloat16), scale_block=128
)
FP8_FORMATS = (FP8_PER_TENSOR, FP8_BLOCK)

_OF_DTYPE = {kind.dtype: kind for kind in (BFLOAT16, FLOAT16, *FP8_FORMATS)}

assert BFLOAT16.row_width == FP8_PER_TENSOR.row_width == FP8_PER_TENSOR.row_bytes == HEAD_DIM
assert FP8_BLOCK.row_width == FP8_BLOCK.row_bytes == 656


def format_of(k_cache) -> CacheFormat:
    """The format of a cache, which its dtype says.

    Raises:
      TypeError: caches have no such dtype.
    """
    if k_cache.dtype not in _OF_DTYPE:
        fp8 = " or ".join(f"{kind.dtype} ({kind})" for kind in FP8_FORMATS)
        raise TypeError(
            f"k_cache: expected dtype bfloat16 or float16, or {fp8}, got {k_cache.dtype}"
        )
    return _OF_DTYPE[k_cache.dtype]


def described(format: CacheFormat) -> str:
    """The extent of a cache's rows, for messages."""
    unit = "bytes" if format.scale_block else "columns"
    return f"{format.row_width} {unit}" + (f" ({format})" if format in FP8_FORMATS else "")
