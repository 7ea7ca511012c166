"""`implementation="xla"` against plain gather + einsum: `python -m benchmarks.xla_decode`.

Runs on any platform. Checks both against float32 first, then times them in turn and compares the
memory that XLA plans for their temporaries.
"""

import time

import jax

from benchmarks import report
from benchmarks.cases import make_case
from benchmarks.implementations import plain_decode
from benchmarks.operands import check, make_operands
from jax_flashmla import flash_mla_with_kvcache

# batch, heads, tokens of each sequence, tokens that the table can hold.
CPU_CASES = [(32, 16, 4096, 16384), (32, 16, 4096, 4096), (4, 128, 2048, 8192)]
GPU_CASES = [
    (32, 16, 4096, 16384),
    (32, 16, 4096, 4096),
    (128, 16, 4096, 4096),
    (128, 128, 4096, 4096),
    (1, 16, 65536, 65536),
]


def our_decode(q, k_cache, block_table, cache_seqlens):
    """The library, held to its XLA implementation."""
    return flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, implementation="xla")[0]


def measure(shape, rounds):
    """Returns a row of the report."""
    batch, heads, length, capacity = shape
    case = make_case(batch, 1, heads, length)
    operands = make_operands(case, table_tokens=capacity)
    gathered = batch * capacity * 576 * 2
    programs = {
        name: jax.jit(fun).lower(*operands).compile()
        for name, fun in (("ours", our_decode), ("plain", plain_decode))
    }
    for program in programs.values():
        check(case, operands, program(*operands))
    samples = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(*operands))
            samples[name].append((time.perf_counter() - begin) * 1e6)
    row = {"batch": batch, "heads": heads, "tokens": length, "table_tokens": capacity}
    for name, program in programs.items():
        row[f"{name}_us"] = report.summary(samples[name])
        temporaries = program.memory_analysis().temp_size_in_bytes
        row[f"{name}_temporary_bytes"] = temporaries
        row[f"{name}_temporaries_over_gathered_cache"] = round(temporaries / gathered, 4)
    return row


def main():
    """Measures, prints, writes xla_decode_<platform>.json."""
    directory = report.Parser(__doc__).parse_args().out
    platform = jax.default_backend()
    on_gpu = platform == "gpu"
    rows = [measure(shape, 20 if on_gpu else 7) for shape in (GPU_CASES if on_gpu else CPU_CASES)]
    what = (
        'Paged MLA decode, bfloat16, page size 64: implementation="xla" (ours) against gather + '
        "einsum over the whole table (plain). Wall time of one jitted call; temporaries from the "
        "compiled program's memory analysis. Both checked against float32 first."
    )
    report.write(f"xla_decode_{platform}", what, rows, directory)
    report.print_table(
        f"decode through XLA on {platform}",
        ["batch", "heads", "tokens / table", "ours ms", "plain ms", "ratio", "ours MB", "plain MB"],
        [
            [
                row["batch"],
                row["heads"],
                f"{row['tokens']} / {row['table_tokens']}",
                f"{row['ours_us']['median'] / 1e3:.2f}",
                f"{row['plain_us']['median'] / 1e3:.2f}",
                f"{row['plain_us']['median'] / row['ours_us']['median']:.1f}x",
                f"{row['ours_temporary_bytes'] / 1e6:.0f}",
                f"{row['plain_temporary_bytes'] / 1e6:.0f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
