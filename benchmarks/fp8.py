"""What FP8 caches gain: `python -m benchmarks.fp8`.

Decode from either format beside the same rows in bfloat16, and beside the loads alone of as many
bytes: checked, then timed in turns in one process. Needs a Hopper GPU and the native module.
"""

import functools

import jax
import numpy as np

from benchmarks import report
from benchmarks.cases import make_case
from benchmarks.operands import check, make_operands
from benchmarks.timing import time_kernels
from jax_flashmla import (
    FP8_BLOCK,
    FP8_PER_TENSOR,
    dequantize_kv_cache,
    flash_mla_with_kvcache,
    get_mla_metadata,
    quantize_kv_cache,
)

BASE = "bfloat16"
SHAPES = [
    (64, 16, 4096),
    (128, 16, 4096),
    (128, 16, 16384),
    (64, 32, 8192),
    (128, 64, 4096),
    (128, 128, 4096),
]
ROUNDS = 6
LAUNCHES = 40


def quantized(operands, kind):
    """The case's operands with an FP8 cache, and its scale."""
    q, pool, table, lengths = operands
    cache, k_scale = jax.jit(quantize_kv_cache, static_argnums=1)(pool, kind)
    return (q, cache, table, lengths), k_scale


def prepare(case, operands, k_scale=None):
    """Checks what the kernel gives; returns a sampler of its time."""
    q, cache, *rest = operands
    is_fp8 = cache.dtype != q.dtype
    metadata = get_mla_metadata(operands[3], case.s_q * case.heads, 1, is_fp8_kvcache=is_fp8)
    decode = functools.partial(flash_mla_with_kvcache, causal=True, implementation="cuda")
    outputs = decode(*operands, 512, *metadata, k_scale=k_scale)
    if is_fp8:
        cache = dequantize_kv_cache(cache, k_scale, dtype=q.dtype)
    check(case, (q, cache, *rest), *outputs)
    return functools.partial(time_kernels, operands, metadata, "decode", LAUNCHES, k_scale=k_scale)


def loads_of(case, row_bytes):
    """A sampler of the loads alone of as many bytes: of 16-bit rows, so many fewer sequences."""
    batch = round(case.batch * row_bytes / 1152)
    less = make_case(batch, case.s_q, case.heads, str(case.lengths[0]))
    operands = make_operands(less)
    metadata = get_mla_metadata(operands[3], less.s_q * less.heads, 1)
    scale = case.batch * row_bytes / (batch * 1152)
    sample = functools.partial(time_kernels, operands, metadata, "floor", LAUNCHES)
    return lambda: [time * scale for time in sample()]


def measure(batch, heads, tokens):
    """A row for each format."""
    case = make_case(batch, 1, heads, f"{tokens}")
    base = make_operands(case)
    runs = {BASE: prepare(case, base)}
    for kind in (FP8_PER_TENSOR, FP8_BLOCK):
        runs[kind.name] = prepare(case, *quantized(base, kind))
        if heads <= 64:
            runs[f"{kind.name} loads"] = loads_of(case, kind.row_bytes)
    samples = {name: [] for name in runs}
    for turn in range(ROUNDS):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            samples[name] += runs[name]()
    rows = []
    for name, times in samples.items():
        if name.endswith("loads"):
            continue
        median = np.median(times)
        floor = samples.get(f"{name} loads")
        rows.append(
            {
                "batch": batch,
                "heads": heads,
                "tokens": tokens,
                "format": name,
                "decode_us": report.summary(times),
                "speedup": round(float(np.median(samples[BASE]) / median), 3),
                "over_floor": round(float(median / np.median(floor)), 3) if floor else None,
            }
        )
    return rows


def main():
    """Measures, prints, writes fp8.json."""
    directory = report.output_directory(__spec__.name, __doc__, "decode")
    start = report.gpu_state()
    rows = []
    for shape in SHAPES:
        rows += measure(*shape)
    what = (
        "Decode in one CUDA graph, time of a launch, by the format of the cache; speedup: over "
        "bfloat16, of samples taken in turns; over_floor: over the loads alone of as many bytes."
    )
    report.write("fp8", what, rows, directory, start)
    report.print_table(
        "Decode by the format of the cache",
        ["batch", "heads", "tokens", "format", "µs", "speedup", "over the loads"],
        [
            [
                *(row[key] for key in ("batch", "heads", "tokens", "format")),
                f"{row['decode_us']['median']:.1f}",
                f"{row['speedup']:.2f}",
                "" if row["over_floor"] is None else f"{row['over_floor']:.2f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
