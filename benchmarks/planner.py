"""Time of `get_mla_metadata`: `python -m benchmarks.planner`.

Checks that kernel and reference agree, then times the kernel alone (many launches in one CUDA
graph) and as JAX users run it (many calls in one jitted program, wall time per call, for both
implementations). Needs a Hopper GPU and the native module.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from jax_flashmla import get_mla_metadata, native, planner

BATCHES = (1, 8, 32, 64, 128, 256, 1024, 4096)
CALLS = 16  # per jitted program: more take minutes to compile
LAUNCHES = 200  # per CUDA graph
REPLAYS = 40
ROUNDS = 3


def check(lengths, num_sms):
    """Raises unless the kernel's plan equals the reference's."""
    plans = [
        jax.jit(
            lambda x, implementation=implementation: get_mla_metadata(
                x, 16, 1, num_sms=num_sms, implementation=implementation
            )
        )(lengths)
        for implementation in ("cuda", "xla")
    ]
    for got, want in zip(*plans, strict=True):
        np.testing.assert_array_equal(got, want)


def time_in_graph(lengths, num_sms):
    """Microseconds per launch, one sample per replay."""
    return native.module.bench.time_plan(
        lengths,
        num_parts=planner.num_sm_parts(16, 1, num_sms),
        overhead_blocks=planner.overhead_blocks(16),
        min_split_blocks=planner.min_split_blocks(16),
        split_cost_blocks=planner.SPLIT_COST_BLOCKS,
        launches=LAUNCHES,
        replays=REPLAYS,
    )


def compile_program(batch, num_sms, implementation):
    """CALLS plans in one program, each with lengths that depend on the plan before."""

    def program(lengths):
        for _ in range(CALLS):
            plan = get_mla_metadata(lengths, 16, 1, num_sms=num_sms, implementation=implementation)
            # Never true, which XLA cannot know; it has to compute all of the plan.
            wrong = (plan.tile_scheduler_metadata.min() < 0) | (plan.num_splits.min() < 0)
            lengths = lengths + wrong.astype(jnp.int32)
        return lengths

    return jax.jit(program).lower(jax.ShapeDtypeStruct((batch,), jnp.int32)).compile()


def time_program(program, lengths, repeats=10):
    """Microseconds of wall time per plan, one sample per run of the program."""
    jax.block_until_ready(program(lengths))
    samples = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(program(lengths))
        samples.append((time.perf_counter() - begin) / CALLS * 1e6)
    return samples


def main():
    """Measures, prints, writes planner.json."""
    directory = report.output_directory(__spec__.name, __doc__, "plan")

    num_sms = jax.devices()[0].core_count
    rng = np.random.default_rng(0)
    cases = []
    for batch in BATCHES:
        lengths = rng.normal(4096, 2048, batch).clip(0).astype(np.int32)
        check(jnp.asarray(lengths), num_sms)
        programs = {name: compile_program(batch, num_sms, name) for name in ("cuda", "xla")}
        cases.append((batch, lengths, programs))

    samples = {batch: {"graph": [], "cuda": [], "xla": []} for batch in BATCHES}
    for _ in range(ROUNDS):
        for batch, lengths, programs in cases:
            samples[batch]["graph"] += time_in_graph(lengths, num_sms)
            for name, program in programs.items():
                samples[batch][name] += time_program(program, jnp.asarray(lengths))

    rows = [
        {
            "batch": batch,
            "kernel_us": report.summary(times["graph"]),
            "program_cuda_us": report.summary(times["cuda"]),
            "program_xla_us": report.summary(times["xla"]),
        }
        for batch, times in samples.items()
    ]
    what = (
        f"Time of one plan, lengths drawn from N(4096, 2048), {num_sms} partitions. kernel_us: "
        f"{LAUNCHES} launches in one CUDA graph. program_*_us: wall time per call of {CALLS} calls "
        "in one jitted program, each dependent on the one before through a reduction of its plan; "
        "launch of the program and reductions included. Bits checked equal first."
    )
    report.write("planner", what, rows, directory)
    report.print_table(
        "get_mla_metadata, µs",
        ["batch", "kernel in a CUDA graph", "p10-p90", "in a program, cuda", "in a program, xla"],
        [
            [
                row["batch"],
                f"{row['kernel_us']['median']:.2f}",
                f"{row['kernel_us']['p10']:.2f}-{row['kernel_us']['p90']:.2f}",
                f"{row['program_cuda_us']['median']:.1f}",
                f"{row['program_xla_us']['median']:.1f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
