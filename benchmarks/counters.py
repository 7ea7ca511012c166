"""Hardware counters of the kernels, one case of each suite: `python -m benchmarks.counters`.

Runs itself under Nsight Compute (`ncu`), which wants the right to read counters, and writes what
its sections say of the split and the combine kernel: how busy memory, caches and SMs were, and what
warps waited for. Clocks are left as they are.
"""

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys

import jax

from benchmarks import report
from benchmarks.cases import make_case
from benchmarks.operands import make_operands
from benchmarks.timing import time_kernels
from jax_flashmla import get_mla_metadata

CASES = {
    "small": (8, 1, 16, "4096"),
    "memory": (128, 1, 16, "4096"),
    "compute": (128, 1, 128, "4096"),
    "varlen": (64, 1, 128, "normal(4096,2048)"),
}
SECTIONS = (
    *("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats"),
    "LaunchStats",
)
KERNELS = "narrow_kernel|split_kernel|combine_tiles|combine_slices"


def decode_once(batch, s_q, heads, seqlens):
    """What is watched: a warm-up, and a replay of a graph with one decode."""
    operands = make_operands(make_case(int(batch), int(s_q), int(heads), seqlens))
    metadata = get_mla_metadata(operands[3], int(s_q) * int(heads), 1)
    jax.block_until_ready((operands, metadata))
    time_kernels(operands, metadata, "decode", 1)


def parse(text):
    """Rows of `ncu --csv --page details`: a dict for each kernel, in the order in which they ran.

    `counters` of it are `{metric: "value unit"}`; what ncu advises is left out.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        name = re.search(KERNELS, row["Kernel Name"])[0]
        kernel = kernels.setdefault(row["ID"], {"kernel": name, "counters": {}})
        if row["Metric Name"]:
            value = f"{row['Metric Value']} {row['Metric Unit']}".strip()
            kernel["counters"][row["Metric Name"]] = value
    return list(kernels.values())


def watch(shape):
    """Runs a case under ncu; returns a row for each kernel of one decode."""
    command = [
        *("ncu", "--csv", "--page", "details", "--clock-control", "none"),
        *("--graph-profiling", "node", "--kernel-name", f"regex:{KERNELS}"),
        # The first decode brings the caches to what they are between decodes.
        *("--launch-skip", "2", "--launch-count", "2"),
        *(word for section in SECTIONS for word in ("--section", section)),
        *(sys.executable, "-m", __spec__.name, "--watched", *map(str, shape)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = parse(done.stdout)
    if not found:
        sys.exit(f"ncu: expected rows of two kernels, got:\n{done.stdout}{done.stderr}")
    batch, s_q, heads, seqlens = shape
    case = {"batch": batch, "s_q": s_q, "heads": heads, "seqlens": seqlens}
    return [case | kernel for kernel in found]


def main():
    """Watches all cases, prints, writes counters.json."""
    parser = report.Parser(__doc__.splitlines()[0])
    parser.add_argument("--watched", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.watched:
        decode_once(*args.watched)
        return
    if shutil.which("ncu") is None:
        sys.exit("benchmarks.counters needs Nsight Compute, and there is no ncu in PATH.")
    start = report.gpu_state()
    rows = [{"suite": suite} | row for suite, shape in CASES.items() for row in watch(shape)]
    what = (
        "Counters of one decode's kernels by Nsight Compute (sections "
        f"{', '.join(SECTIONS)}), clocks as they were. A kernel that is watched runs alone and "
        "after a pause: its duration is longer than in a sequence of decodes."
    )
    report.write("counters", what, rows, args.out, start)
    columns = {
        "µs": "Duration",
        "DRAM %": "DRAM Throughput",
        "L2 %": "L2 Cache Throughput",
        "L1 %": "L1/TEX Cache Throughput",
        "SM %": "Compute (SM) Throughput",
    }
    report.print_table(
        "Counters",
        ["suite", "case", "kernel", *columns],
        [
            [
                row["suite"],
                f"{row['batch']} x {row['s_q']} x {row['heads']} x {row['seqlens']}",
                row["kernel"],
                *(row["counters"].get(name, "") for name in columns.values()),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
