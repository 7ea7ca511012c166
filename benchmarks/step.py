"""A whole decode step in one jitted program: `python -m benchmarks.step`.

A program decodes 61 layers that share their plan, as a model's step does, and writes to the outputs
of its call before, which are donated. Its time per layer is compared with that of the kernels alone
in a CUDA graph, of a program of fewer layers, which tells the cost of a layer from that of the
program, of one with new outputs in every call, and of one that plans in every layer. A profile of
one run says whether XLA launched it as command buffers (CUDA graphs), how long kernels ran and how
long none did. Needs a Hopper GPU and the native module.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks import report
from benchmarks.cases import make_case
from benchmarks.implementations import decode_layers
from benchmarks.operands import check, make_operands
from benchmarks.timeline import busy_and_gaps, count_launches, kernels, profile
from benchmarks.timing import chained, time_kernels, time_wall
from jax_flashmla import get_mla_metadata

LAYERS = 61  # DeepSeek-V3's
FEW_LAYERS = 21
CASES = [(1, 16, 4096), (8, 16, 4096), (32, 16, 4096), (128, 16, 4096), (32, 128, 4096)]
ROUNDS = 15
CALLS = 10  # in flight


def donating(*operands):
    """A function of no arguments that decodes all layers, into the outputs of its call before."""
    outputs = jax.jit(decode_layers)(*operands)
    return chained(lambda old, *operands: decode_layers(*operands), outputs, *operands)


def measure(batch, heads, tokens):
    """Returns a row of the report."""
    case = make_case(batch, 1, heads, tokens)
    operands = q, *_, lengths = make_operands(case)
    stacked = jax.random.normal(jax.random.key(1), (LAYERS, *q.shape), q.dtype)
    metadata = get_mla_metadata(lengths, heads, 1)
    queries, few = list(stacked), list(stacked[:FEW_LAYERS])
    # As many arrays of lengths as layers: equal plans of one array could be made only once.
    each = [jnp.copy(lengths) for _ in queries]
    programs = {
        "layer_us": (LAYERS, donating(queries, *operands[1:])),
        "few_layers_us": (FEW_LAYERS, donating(few, *operands[1:])),
        "new_outputs_us": (
            LAYERS,
            functools.partial(jax.jit(decode_layers), queries, *operands[1:]),
        ),
        "replanned_us": (LAYERS, donating(queries, *operands[1:3], each)),
    }
    for layers, run in programs.values():
        check(case, (queries[layers - 1], *operands[1:]), run()[layers - 1])
    samples, alone = {name: [] for name in programs}, []
    for _ in range(ROUNDS):
        for name, (layers, run) in programs.items():
            samples[name].append(time_wall(run, calls=CALLS) / layers)
        alone += time_kernels((stacked, *operands[1:]), metadata, "decode", LAYERS)
    row = {"batch": batch, "heads": heads, "tokens": tokens}
    row |= {name: report.summary(values) for name, values in samples.items()}
    row["kernel_us"] = report.summary(alone)
    row |= costs(row)
    for name, prefix in (("layer_us", ""), ("replanned_us", "replanned_")):
        times = device_times(profile(programs[name][1]))
        row |= {f"{prefix}{key}": value for key, value in times.items()}
    return row


def costs(row):
    """What the program adds to a layer, and its fixed cost and that of a layer more."""
    layer, few, replanned, alone = (
        row[key]["median"] for key in ("layer_us", "few_layers_us", "replanned_us", "kernel_us")
    )
    slope = (layer * LAYERS - few * FEW_LAYERS) / (LAYERS - FEW_LAYERS)
    return {
        "added_us": round(layer - alone, 2),
        "slope_us": round(slope, 2),
        "fixed_us": round((few - slope) * FEW_LAYERS, 1),
        "plan_in_each_us": round(replanned - layer, 2),
    }


def device_times(planes):
    """Launch calls, and from the device's timeline kernels, busy time and gaps.

    Where the profiler shows graphs as a whole, there are fewer events than layers: then only how
    many.
    """
    found = kernels(planes)
    times = {"launches": count_launches(planes), "kernels": len(found)}
    if len(found) >= LAYERS:
        busy, gaps = busy_and_gaps(found)
        times["busy_us"] = round(busy / LAYERS, 2)
        times["gaps_us"] = round(sum(gaps) / LAYERS, 2)
        if gaps:
            times["gap_us"] = report.summary(gaps)
    return times


def main():
    """Measures, prints, writes step.json."""
    directory = report.output_directory(__spec__.name, __doc__, "decode")
    start = report.gpu_state()
    rows = [measure(*case) for case in CASES]
    what = (
        f"One jitted program that decodes {LAYERS} layers with one plan: layer_us is its wall time "
        "per layer, with several calls in flight; kernel_us the same decodes alone in a CUDA "
        "graph, also each with queries and outputs of its own; added_us: their difference. The "
        "outputs of a call are donated to the next; new_outputs_us: of a program where they are "
        "not, so that addresses change. "
        f"few_layers_us: a program of {FEW_LAYERS} layers, per layer; slope_us: what a layer more "
        "costs, fixed_us what a program of none would cost. replanned_us: a plan in every layer; "
        "plan_in_each_us: what that adds. From a profile of one run (replanned_*: with a plan in "
        "every layer): launches, the driver's launch calls; kernels, how many; busy_us, time per "
        "layer in which kernels ran; gaps_us, time per layer between them; gap_us, each gap. "
        "Without the last three the profile shows a graph as a whole."
    )
    report.write("step", what, rows, directory, start)
    columns = {
        "batch": "batch",
        "heads": "heads",
        "tokens": "tokens",
        "in the program": "layer_us",
        "kernels alone": "kernel_us",
        "added": "added_us",
        "a layer more": "slope_us",
        "fixed": "fixed_us",
        "new outputs": "new_outputs_us",
        "planning in each": "replanned_us",
        "busy": "busy_us",
        "gaps": "gaps_us",
    }
    report.print_table(
        f"{LAYERS} layers in one program, µs per layer",
        [*columns, "launches"],
        [
            [
                *(report.median(row.get(key, "")) for key in columns.values()),
                " ".join(f"{name}:{count}" for name, count in sorted(row["launches"].items())),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
