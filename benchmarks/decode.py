"""Time of decode, against its bounds and other implementations: `python -m benchmarks.decode`.

Every implementation is checked against float32 first. The implementations of a case, and cases that
are compared with each other, are then timed in turns in one process, beside the chip's ceilings,
which drift with its temperature. Without a Hopper GPU it runs small cases through XLA.
"""

import functools
import pathlib

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import cases, implementations, peers, report
from benchmarks.flags import parse, record_name
from benchmarks.implementations import KEYS
from benchmarks.operands import check, make_operands, make_pool
from benchmarks.ratios import add_over_equal, add_ratios, ours, ours_key, speeds
from benchmarks.timing import HOT_CALLS, MATMUL, READ_BYTES, measure_ceilings, measure_matmul

ROUNDS = 3
WHAT = (
    "Paged MLA decode, page size 64, one KV head, causal. tokens: of each sequence, or the mean "
    "where seqlens says how unequal lengths were given. decode_us: split and combine kernel; "
    "split_us, combine_us: each alone; floor_us: the loads of the split kernel alone (up to 64 "
    "query rows). xla_us: the library through XLA; plain_xla_us: gather + einsum; *_here_us: "
    "FlashMLA and FlashInfer in this process; timing: how each was taken. All checked against "
    "float32 first. tflops, gb_per_s and the ratios over_* are of the first of these that the run "
    "has. bound_us: its loads alone, or else its bytes at the run's reading speed, or its products "
    "at the speed of a large product, if that is longer. over_equal: over equal lengths of as many "
    "tokens, timed in turns with it. flashmla_us, fa3_us: from peers_h200.json, another run on the "
    "same kind of chip (fa3_us: good to 8 % in the large rows, and without ceilings of its own: "
    "those of the other are taken). over_*_normalised: the ratio after scaling each time by its "
    "run's ceiling, where the batch fills the chip: above 64 query rows the matrix product of a "
    "chip under load (hot_matmul_tflops, between a row's samples; theirs after their rows), else "
    "reading. "
    f"ceilings: a bfloat16 product of {MATMUL}^3, a sum of {READ_BYTES / 2**30:.0f} GiB of float32."
)
NO_GPU = (
    "Small cases on a CPU: they show that everything runs and is right, and say nothing about the "
    "speed of a GPU."
)


def measure(group, args):
    """Returns a row for each case of a group; they are timed in turns.

    Errors of implementations that were not asked for are noted in the row.
    """
    pages = max(case.pages for case in args.cases if case.dtype == group[0].dtype)
    pool = _pool(pages, group[0].dtype)
    samplers, rows = {}, {}
    for case in group:
        operands, suite = make_operands(case, pool), args.cases[case]
        samplers[case], rows[case] = {}, {"suite": suite} | case.identity()
        # The many cases of a sweep have the kernels alone, unless others were asked for.
        few = suite == "sweep" and not args.implementations
        for name in args.names[:1] if few else args.names:
            try:
                prepared = implementations.prepare(name, case, operands, parts=suite != "sweep")
                if prepared is not None:
                    check(case, operands, *prepared[0])
                    samplers[case] |= prepared[1]
            except Exception as error:  # whatever another project may raise
                if name in args.required:
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                rows[case].setdefault("failed", {})[name] = reason
    times = {case: {key: [] for key in samplers[case]} for case in group}
    hot = {case: [] for case in group if "decode_us" in samplers[case] and case.bounded_by_products}
    if hot:
        measure_matmul(HOT_CALLS)  # no round on a cooler chip than the others
    for number in range(ROUNDS):
        turn = -1 if number % 2 else 1  # there and back, so that nothing is always the first
        for case in group[::turn]:
            for key, sampler in list(samplers[case].items())[::turn]:
                times[case][key] += sampler()
            if case in hot:
                hot[case].append(measure_matmul(HOT_CALLS))
    for case, row in rows.items():
        row |= {key: report.summary(values) for key, values in times[case].items()}
        if case in hot:
            row["hot_matmul_tflops"] = report.summary(hot[case])
        if ours_key(row):
            row |= speeds(case, ours(row))
    add_over_equal(rows.values())
    return list(rows.values())


@functools.lru_cache(maxsize=1)
def _pool(pages, dtype):
    return make_pool(pages, dtype)


def run(args):
    """Measures; returns the record, which it has written."""
    start, hopper = report.gpu_state(), implementations.why_not("cuda") is None
    rows, ceilings = [], {"before": measure_ceilings()} if hopper else {}
    recorded = cases.peers()
    if not recorded["gpu"].startswith(jax.devices()[0].device_kind):
        recorded = None
    timing = {KEYS[name]: implementations.timing(name) for name in args.names}
    what = WHAT if jax.default_backend() == "gpu" else f"{NO_GPU} {WHAT}"
    versions = {name: peers.version(name) for name in args.names if name in peers.PREPARE}
    write = functools.partial(
        report.write, record_name(args), what, rows, args.out, start, timing=timing, peers=versions
    )
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    progress = Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    )
    with progress:
        task = progress.add_task("", total=len(args.cases))
        for group in cases.groups(args.cases):
            progress.update(task, description=" and ".join(map(str, group)))
            rows += measure(group, args)
            add_ratios(rows, ceilings, recorded)
            # So that a run that is cut short leaves what it has.
            write(done=False, ceilings=ceilings)
            progress.advance(task, len(group))
    _pool.cache_clear()
    if hopper:
        ceilings["after"] = measure_ceilings()
    add_ratios(rows, ceilings, recorded)
    return write(ceilings=ceilings)


def print_rows(record):
    """Prints the table, the ceilings and what failed."""
    rows = [
        row
        | {"µs": f"{ours(row):.1f}", "tokens": row.get("seqlens", f"{row['tokens']:,}")}
        | {"GB/s": f"{row['gb_per_s']:,.0f}", "TFLOP/s": f"{row['tflops']:,.0f}"}
        | {"p10-p90": "-".join(f"{row[ours_key(row)][key]:.1f}" for key in ("p10", "p90"))}
        for row in record["rows"]
        if ours_key(row)
    ]
    columns = {
        **{key: key for key in ("batch", "s_q", "heads", "tokens", "dtype")},
        **{key: key for key in ("µs", "p10-p90", "GB/s", "TFLOP/s")},
        "of bound": "share_of_bound",
        "/ floor": "over_floor",
        "/ equal": "over_equal",
        **{f"/ {name}": f"over_{name}" for name in KEYS},
        "/ FlashMLA*": "over_flashmla_normalised",
        "/ best peer*": "over_best_peer_normalised",
    }
    columns = {name: key for name, key in columns.items() if any(key in row for row in rows)}
    report.print_table(
        "decode, µs; ratios: our time over theirs; * recorded times, scaled by both runs' ceilings",
        list(columns),
        [[row.get(key, "") for key in columns.values()] for row in rows],
    )
    for when, ceiling in record["ceilings"].items():
        print(f"ceilings {when}: {ceiling}")
    for row in record["rows"]:
        for name, reason in row.get("failed", {}).items():
            print(f"{name} failed at {row['batch']} x {row['tokens']}: {reason}")


def main(arguments=None):
    """Measures, prints, writes the JSON and the pictures."""
    args = parse(arguments)
    record = run(args)
    print_rows(record)
    if args.plots:
        from benchmarks import figures  # which wants matplotlib

        folder = pathlib.Path(args.plots)
        for name in figures.FIGURES:
            if figures.save(name, record, folder, "benchmarks.decode"):
                print(f"drew {folder / name}.svg")
    if jax.default_backend() == "cpu":
        print(NO_GPU)


if __name__ == "__main__":
    main()
