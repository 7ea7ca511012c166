"""How long something takes, in microseconds, and the chip's ceilings."""

import functools
import math
import time

import jax
import jax.numpy as jnp

from jax_flashmla import native
from jax_flashmla.decode_local import partial_types

REPLAYS = 8
MATMUL = 8192
READ_BYTES = 8 * 2**30
FORMATS = {"float8_e4m3fn": "fp8_per_tensor", "uint8": "fp8_block"}
HOT_CALLS = 100  # of the product, between samples: 0.15 s


def time_kernels(operands, metadata, what, launches, k_scale=None):
    """Microseconds per launch of "decode", "split", "combine" or "floor", a sample per replay.

    In a CUDA graph of so many launches. `q` may have a leading axis: launches then take queries,
    and outputs, in turn. `k_scale`: of an FP8 cache that has one.
    """
    q, k_cache, table, _ = operands
    *copies, batch, s_q, heads, _ = q.shape
    parts = metadata.tile_scheduler_metadata.shape[0]
    slots = batch + parts
    results = (
        jnp.zeros((*copies, batch, s_q, heads, 512), q.dtype),
        jnp.zeros((batch, heads, s_q)),
        *(jnp.zeros(x.shape, x.dtype) for x in partial_types((slots, 1), s_q * heads)),
    )
    scale = () if k_scale is None else (k_scale.reshape(1),)
    arrays = jax.block_until_ready((*operands, *metadata, *results, *scale))
    return native.module.bench.time_decode(
        [array.unsafe_buffer_pointer() for array in arrays],
        batch=batch,
        s_q=s_q,
        h_q=heads,
        h_kv=1,
        num_blocks=k_cache.shape[0],
        page_tokens=k_cache.shape[1],
        key_stride=k_cache.shape[-1],
        max_blocks=table.shape[1],
        num_parts=parts,
        slots=slots,
        causal=True,
        dtype=q.dtype.name,
        what=what,
        launches=launches,
        replays=REPLAYS,
        copies=math.prod(copies),
        key_format=FORMATS.get(k_cache.dtype.name, "plain"),
    )


def time_wall(fun, *args, calls):
    """Microseconds per call of a compiled function, `calls` in flight."""
    jax.block_until_ready(fun(*args))
    begin = time.perf_counter()
    for _ in range(calls):
        out = fun(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - begin) / calls * 1e6


def chained(fun, first, *rest):
    """A function of no arguments: `fun(first, *rest)`, then of its own result, which is donated.

    So it is in a decode loop: addresses stay the same, and XLA launches its CUDA graphs again as
    they are, where it would otherwise capture every layer anew, on all devices. `first` and results
    are arrays alike, in any structure; `first` itself is kept.
    """
    shardings = jax.tree.map(lambda x: x.sharding, first)
    # `fun` may only want the memory of what it is given.
    program = jax.jit(fun, donate_argnums=0, keep_unused=True, out_shardings=shardings)
    result = jax.tree.map(jnp.copy, first)

    def run():
        nonlocal result
        result = program(result, *rest)
        return result

    return run


@functools.cache
def large_product():
    """A compiled product of large bfloat16 matrices, and its operand."""
    x = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL), jnp.bfloat16)
    return jax.jit(jnp.matmul).lower(x, x).compile(), x


def measure_matmul(calls=20):
    """TFLOP/s of a large bfloat16 product on random data: the ceiling at this temperature."""
    product, x = large_product()
    return 2 * MATMUL**3 / time_wall(product, x, x, calls=calls) / 1e6


def measure_read():
    """GB/s of reading a large float32 array: the run's other ceiling."""
    x = jax.random.normal(jax.random.key(0), (READ_BYTES // 4,), jnp.float32)
    total = jax.jit(jnp.sum).lower(x).compile()
    return READ_BYTES / time_wall(total, x, calls=20) / 1e3


def measure_ceilings():
    """Both ceilings."""
    return {"matmul_tflops": round(measure_matmul(), 1), "read_gb_per_s": round(measure_read(), 1)}
