"""What the layout of a cache costs: `python -m benchmarks.layouts`.

Decode from pages of other sizes than 64, from one contiguous cache, from rows of 640 columns, and
of a batch half of which is padding, beside the same work in pages of 64: checked, then timed in
turns in one process. Needs a Hopper GPU and the native module.
"""

import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.cases import SEED, make_case
from benchmarks.implementations import prepare_cuda
from benchmarks.operands import check, make_operands
from jax_flashmla.arguments import PAGE_BLOCK_SIZE

BASE = "pages of 64"
PAGES = (1, 16, 32, 128, 256, 1024)
WIDTH = 640
SHAPES = [(128, 16, 4096), (64, 32, 8192), (128, 64, 4096), (32, 128, 4096)]
PADDED = [(64, 16, 4096), (64, 128, 2048)]  # as many padding sequences beside them
ROUNDS = 8


def in_pages(operands, size):
    """The same pool in pages of another size, each sequence's in random order."""
    q, pool, _, lengths = operands
    pool = pool.reshape(-1, size, *pool.shape[2:])
    columns = int(lengths.max()) // size
    ids = np.random.default_rng(SEED).permutation(len(lengths) * columns)
    return q, pool, jnp.asarray(ids.reshape(len(lengths), columns), jnp.int32), lengths


def contiguous(operands):
    """The same pool as one cache, sequence after sequence, which the kernel sees in large pages."""
    q, pool, _, lengths = operands
    pool = pool.reshape(-1, max(PAGES), *pool.shape[2:])
    table = jnp.arange(len(pool), dtype=jnp.int32).reshape(len(lengths), -1)
    return q, pool, table, lengths


def widened(operands):
    """The same with rows of 640 columns, the last of them NaN."""
    q, pool, table, lengths = operands
    spare = ((0, 0),) * (pool.ndim - 1) + ((0, WIDTH - pool.shape[-1]),)
    return q, jnp.pad(pool, spare, constant_values=jnp.nan), table, lengths


def with_padding(operands):
    """As many sequences again, of length 0 and with no page."""
    q, pool, table, lengths = operands
    return (
        jnp.concatenate([q, q]),
        pool,
        jnp.concatenate([table, jnp.full_like(table, -1)]),
        jnp.concatenate([lengths, jnp.zeros_like(lengths)]),
    )


def layouts(batch, heads, tokens):
    """The variants of a case, by name: `(case, operands)`."""
    case = make_case(batch, 1, heads, f"{tokens}")
    base = make_operands(case)
    made = {BASE: base}
    made |= {f"pages of {size}": in_pages(base, size) for size in PAGES}
    made |= {"one contiguous cache": contiguous(base), f"rows of {WIDTH} columns": widened(base)}
    return {name: (case, operands) for name, operands in made.items()}


def padded(batch, heads, tokens):
    """A batch and the same with padding."""
    case = make_case(batch, 1, heads, f"{tokens}")
    base = make_operands(case)
    return {BASE: (case, base), f"{batch} padding sequences more": (case, with_padding(base))}


def measure(batch, heads, tokens, variants):
    """A row for each variant, with its time over that of the first."""
    runs = {}
    for name, (case, operands) in variants.items():
        outputs, samplers = prepare_cuda(case, operands, parts=False)
        check(case, operands, *outputs)
        runs[name] = samplers["decode_us"]
    samples = {name: [] for name in runs}
    for turn in range(ROUNDS):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            samples[name] += runs[name]()
    base = np.median(samples[BASE])
    return [
        {
            "batch": batch,
            "heads": heads,
            "tokens": tokens,
            "layout": name,
            "decode_us": report.summary(times),
            "over_base": round(float(np.median(times) / base), 4),
        }
        for name, times in samples.items()
    ]


def main():
    """Measures, prints, writes layouts.json."""
    directory = report.output_directory(__spec__.name, __doc__, "decode")
    start = report.gpu_state()
    rows = []
    for shape in SHAPES:
        rows += measure(*shape, layouts(*shape))
    for shape in PADDED:
        rows += measure(*shape, padded(*shape))
    what = (
        "Decode in one CUDA graph, time of a launch, by the layout of the cache; over_base: over "
        f"the time in pages of {PAGE_BLOCK_SIZE} tokens, of samples taken in turns."
    )
    report.write("layouts", what, rows, directory, start)
    report.print_table(
        "Decode by the layout of the cache",
        ["batch", "heads", "tokens", "layout", "µs", "over pages of 64"],
        [
            [
                *(row[key] for key in ("batch", "heads", "tokens", "layout")),
                f"{row['decode_us']['median']:.1f}",
                f"{row['over_base']:.3f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
