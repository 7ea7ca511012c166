"""What a jitted program adds to the decode kernel: `python -m benchmarks.layers`.

One jitted program decodes 61 layers that share their plan, as a model's step does. Its time per
layer is compared with the kernels' own in a CUDA graph, and a profile of one run says whether XLA
launched the program as command buffers (CUDA graphs). Needs a Hopper GPU and the native module.
"""

import collections
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp

from benchmarks import report
from benchmarks.decode import time_kernels, time_wall
from benchmarks.xla_decode import make_operands
from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata

LAYERS = 61  # DeepSeek-V3's
CASES = [(1, 16, 4096), (8, 16, 4096), (32, 16, 4096), (128, 16, 4096), (32, 128, 4096)]
ROUNDS = 15


@functools.partial(jax.jit, static_argnums=4)
def step(queries, k_cache, block_table, cache_seqlens, heads):
    """Plans once, decodes every layer's queries."""
    metadata = get_mla_metadata(cache_seqlens, heads, 1)
    return [
        flash_mla_with_kvcache(
            q, k_cache, block_table, cache_seqlens, 512, *metadata, implementation="cuda"
        )[0]
        for q in queries
    ]


def count_launches(run):
    """Profiles `run()` and counts the driver's launches by their names."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        counts = collections.Counter()
        for path in pathlib.Path(directory).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for line in plane.lines:
                    counts.update(
                        event.name
                        for event in line.events
                        if event.name.startswith(("cuLaunch", "cudaLaunch", "cuGraph", "cudaGraph"))
                    )
    return dict(counts)


def measure(batch, heads, tokens):
    """Returns a row of the report."""
    operands = make_operands(batch, heads, tokens, tokens)
    metadata = get_mla_metadata(operands[3], heads, 1)
    shape = LAYERS, *operands[0].shape
    queries = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
    run = functools.partial(step, list(queries), *operands[1:], heads)
    samples, kernel = [], []
    for _ in range(ROUNDS):
        samples.append(time_wall(run, calls=10) / LAYERS)
        kernel += time_kernels((queries, *operands[1:]), metadata, "decode", LAYERS)
    row = {"batch": batch, "heads": heads, "tokens": tokens}
    row["layer_us"] = report.summary(samples)
    row["kernel_us"] = report.summary(kernel)
    row["added_us"] = round(row["layer_us"]["median"] - row["kernel_us"]["median"], 2)
    row["launches"] = count_launches(run)
    return row


def main():
    """Measures, prints, writes layers.json."""
    directory = report.output_directory(__spec__.name, __doc__, "decode")
    rows = [measure(*case) for case in CASES]
    what = (
        f"One jitted program that decodes {LAYERS} layers with one plan: layer_us is its wall time "
        "per layer, with several calls in flight; kernel_us the same decodes alone in a CUDA "
        "graph, also each with queries and outputs of its own. "
        "launches: the driver's launch calls in a profile of one run of the program."
    )
    report.write("layers", what, rows, directory)
    report.print_table(
        f"{LAYERS} layers in one program, µs per layer",
        ["batch", "heads", "tokens", "in the program", "kernels alone", "added", "launches"],
        [
            [
                *(row[key] for key in ("batch", "heads", "tokens")),
                f"{row['layer_us']['median']:.1f}",
                f"{row['kernel_us']['median']:.1f}",
                row["added_us"],
                " ".join(f"{name}:{count}" for name, count in sorted(row["launches"].items())),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
