"""What decode is to reach on an H200, and what it reaches: `python -m benchmarks.bars`.

Reads decode.json, an earlier run of the same program (repeated_decode.json, copied there by hand)
and the plan's times from benchmarks/results/; prints the table and writes bars.json, or with
`--check` says whether it is current. A bar is reached if every run reaches it. A ratio to the best
peer is theirs over ours, normalised by the ceilings of the runs, but for plan and decode together,
which no ceiling bounds; peers were not measured with unequal lengths.
"""

import argparse
import json
import math
import sys

from benchmarks import ratios, report, tables
from benchmarks.cases import FULL_BATCH, peers

RUNS = "decode", "repeated_decode"
MICROSECONDS = {(1, 16, 4096): 9, (1, 16, 65536): 26, (8, 16, 4096): 14.5, (1, 128, 4096): 11}


def faster(rows):
    """How many times faster than the best peer."""
    return [1 / row["over_best_peer_normalised"] for row in rows]


def geometric_mean(values):
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def beside_peers(rows, suite):
    """Those of a suite that peers were measured with."""
    return [row for row in rows if row["suite"] == suite and "over_best_peer_normalised" in row]


def figures(rows):
    """Yields (set, what, bar, figure, whether it is reached) of one run."""

    def at_least(kind, what, bar, figure):
        return kind, what, f">= {bar}", round(figure, 3), figure >= bar

    def at_most(kind, what, bar, figure):
        return kind, what, f"<= {bar}", round(figure, 3), figure <= bar

    sets = {"small": (1.5, 1.25), "memory": (1.03, 1.0), "compute": (1.03, 0.98)}
    for kind, (mean, least) in sets.items():
        chosen = beside_peers(rows, kind)
        if not chosen:
            sys.exit("decode.json has no times of peers beside ours: it is of another kind of chip")
        times = faster(chosen)
        yield at_least(kind, "best peer / ours, mean", mean, geometric_mean(times))
        yield at_least(kind, "best peer / ours, least", least, min(times))
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


def plan_and_decode(rows, plans):
    """How many times faster than the better peer's sum, for each case of few sequences."""
    plan_us = {row["batch"]: row["kernel_us"]["median"] for row in plans}
    faster_by = []
    for row in beside_peers(rows, "small"):
        theirs = ratios.recorded_row(row, peers())
        sums = (theirs[f"{peer}decode_us"] + theirs[f"{peer}plan_us"] for peer in ("", "fa3_"))
        faster_by.append(min(sums) / (row["decode_us"]["median"] + plan_us[row["batch"]]))
    return faster_by


def make_record():
    """The table, and of which commits it is."""
    records = {name: tables.load(name) for name in (*RUNS, "planner")}
    runs = [list(figures(records[name]["rows"])) for name in RUNS]
    rows = [
        {"set": kind, "what": what, "bar": bar, "reached": all(run[i][4] for run in runs)}
        | {name: run[i][3] for name, run in zip(RUNS, runs, strict=True)}
        for i, (kind, what, bar, *_) in enumerate(runs[0])
    ]
    plans = records["planner"]["rows"]
    worst = max(row["kernel_us"]["median"] for row in plans if row["batch"] <= 256)
    rows.append(
        {"set": "plan", "what": "up to 256 sequences, worst, µs", "bar": "<= 3"}
        | {"reached": worst <= 3, "planner": worst}
    )
    together = {
        name: round(geometric_mean(plan_and_decode(records[name]["rows"], plans)), 3)
        for name in RUNS
    }
    rows.append(
        {"set": "plan", "what": "plan + decode of few sequences, better peer / ours, mean"}
        | {"bar": ">= 1.5", "reached": min(together.values()) >= 1.5}
        | together
    )
    commits = {name: record["environment"]["commit"] for name, record in records.items()}
    return {"what": __doc__.splitlines()[0], "commits": commits, "rows": rows}


def main(arguments=None):
    """Prints, writes or checks bars.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="whether bars.json is current")
    record, path = make_record(), report.RESULTS / "bars.json"
    text = json.dumps(record, indent=1) + "\n"
    if parser.parse_args(arguments).check:
        if not path.exists() or path.read_text() != text:
            sys.exit(f"{path.name} is not what the other results say: run `make figures`")
        return
    path.write_text(text)
    names = ["set", "what", "bar", *RUNS, "planner", "reached"]
    commits = ", ".join(f"{name} {commit}" for name, commit in record["commits"].items())
    rows = [[row.get(name, "") for name in names] for row in record["rows"]]
    report.print_table(f"bars; commits: {commits}", names, rows)


if __name__ == "__main__":
    main()
