"""What decode is to reach on an H200, and what it reaches: `python -m benchmarks.bars`.

Reads two runs of `benchmarks.decode` and the plan's times from benchmarks/results/; prints the
table and writes bars.json. A ratio to the best peer is theirs over ours, normalised by the ceilings
of the runs; peers were not measured with unequal lengths.
"""

import json
import math

from benchmarks import report, tables
from benchmarks.cases import FULL_BATCH

RUNS = "decode", "repeated_decode"
MICROSECONDS = {(1, 16, 4096): 9, (1, 16, 65536): 26, (8, 16, 4096): 14.5, (1, 128, 4096): 11}


def faster(rows):
    """How many times faster than the best peer."""
    return [1 / row["over_best_peer_normalised"] for row in rows]


def geometric_mean(values):
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def figures(rows):
    """Yields (set, what, bar, figure, whether it is reached) of one run."""

    def at_least(kind, what, bar, figure):
        return kind, what, f">= {bar}", round(figure, 3), figure >= bar

    def at_most(kind, what, bar, figure):
        return kind, what, f"<= {bar}", round(figure, 3), figure <= bar

    sets = {"small": (1.5, 1.25), "memory": (1.03, 1.0), "compute": (1.03, 0.98)}
    for kind, (mean, least) in sets.items():
        chosen = [r for r in rows if r["suite"] == kind and "over_best_peer_normalised" in r]
        ratios = faster(chosen)
        yield at_least(kind, "best peer / ours, mean", mean, geometric_mean(ratios))
        yield at_least(kind, "best peer / ours, least", least, min(ratios))
        if kind == "small":
            for row in chosen:
                shape = row["batch"], row["heads"], row["tokens"]
                what = "{} x {} heads x {:,}, µs".format(*shape)
                yield at_most(kind, what, MICROSECONDS[shape], row["decode_us"]["median"])
        if kind == "memory":
            filled = [row for row in chosen if row["batch"] >= 2 * FULL_BATCH]
            worst = max(row["over_floor"] for row in filled)
            yield at_most(kind, f"over the loads, batch >= {2 * FULL_BATCH}, worst", 1.07, worst)
    for heads in (16, 128):
        unequal = [row for row in rows if row["heads"] == heads and "over_equal" in row]
        worst = max(row["over_equal"] for row in unequal)
        yield at_most("unequal lengths", f"over equal ones, {heads} heads, worst", 1.03, worst)


def main():
    """Prints, writes bars.json."""
    records = [tables.load(name) for name in RUNS]
    runs = [list(figures(record["rows"])) for record in records]
    rows = [
        {"set": kind, "what": what, "bar": bar, "reached": reached}
        | {name: run[i][3] for name, run in zip(RUNS, runs, strict=True)}
        for i, (kind, what, bar, _, reached) in enumerate(runs[0])
    ]
    plan = tables.load("planner")
    worst = max(row["kernel_us"]["median"] for row in plan["rows"] if row["batch"] <= 256)
    rows.append(
        {"set": "plan", "what": "up to 256 sequences, worst, µs", "bar": "<= 3"}
        | {"reached": worst <= 3, "planner": worst}
    )
    commits = {name: tables.load(name)["environment"]["commit"] for name in (*RUNS, "planner")}
    record = {"what": __doc__.splitlines()[0], "commits": commits, "rows": rows}
    (report.RESULTS / "bars.json").write_text(json.dumps(record, indent=1) + "\n")
    names = ["set", "what", "bar", *RUNS, "planner", "reached"]
    report.print_table(
        "bars; commits: " + ", ".join(f"{name} {commit}" for name, commit in commits.items()),
        names,
        [[row.get(name, "") for name in names] for row in rows],
    )


if __name__ == "__main__":
    main()
