"""What moved between two runs of a benchmark: `python -m benchmarks.compare A.json B.json`.

A time has moved if the spreads of its samples, from the 10th to the 90th percentile, do not
overlap. Prints what moved, and exits with 1 if anything became slower by more than the threshold.
"""

import argparse
import json
import pathlib
import sys
from typing import NamedTuple

from benchmarks import report

# What says which case a row is; the rest of a row was measured.
IDENTITY = (
    *("what", "batch", "s_q", "heads", "tokens", "seqlens", "table_tokens", "dtype"),
    *("layout", "context", "implementation", "format"),
)
# Of rows that do not say: older ones of decode. In the name of a case it is left out.
DEFAULTS = {"dtype": "bfloat16"}
# Of the environment: what explains a difference.
MACHINE = "device", "driver_version", "jax", "jaxlib"


class Change(NamedTuple):
    """A time of one case in two runs: medians in microseconds."""

    case: str
    time: str
    before: float
    after: float
    moved: bool  # beyond the spreads

    @property
    def ratio(self):
        """Above 1: slower."""
        return self.after / self.before


def load(path):
    """A benchmark's environment, and its rows by identity. Leaves with a sentence if it is none."""
    try:
        record = json.loads(pathlib.Path(path).read_text())
        return record["environment"], {identity(row): row for row in record["rows"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f"{path}: expected the JSON of a benchmark, got {type(error).__name__}: {error}")


def identity(row):
    """What tells a row's case from others."""
    return tuple((key, row.get(key, DEFAULTS.get(key))) for key in IDENTITY)


def times(row):
    """The measured times of a row: summaries of samples, in microseconds."""
    return {key: value for key, value in row.items() if key.endswith("_us") and _is_summary(value)}


def _is_summary(value):
    return isinstance(value, dict) and {"median", "p10", "p90"} <= value.keys()


def changes(before, after):
    """Every time that both runs have, what grew most first."""
    found = []
    for key in before.keys() & after.keys():
        case = ", ".join(
            f"{name} {value}" for name, value in key if value not in (None, DEFAULTS.get(name))
        )
        old_times, new_times = times(before[key]), times(after[key])
        for name in old_times.keys() & new_times.keys():
            old, new = old_times[name], new_times[name]
            moved = new["p10"] > old["p90"] or new["p90"] < old["p10"]
            found.append(Change(case, name, old["median"], new["median"], moved))
    return sorted(found, key=lambda change: change.ratio, reverse=True)


def main(arguments=None):
    """Compares, prints, exits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument(
        "--threshold", type=float, default=3, help="percent that a time may grow (default: 3)"
    )
    args = parser.parse_args(arguments)
    (old_machine, old), (new_machine, new) = load(args.before), load(args.after)
    for key in MACHINE:
        if old_machine.get(key) != new_machine.get(key):
            print(f"not the same {key}: {old_machine.get(key)} and {new_machine.get(key)}")
    for which, alone in (
        ("before", old.keys() - new.keys()),
        ("after", new.keys() - old.keys()),
    ):
        if alone:
            print(f"{len(alone)} of the cases are only in the run {which}")
    found = changes(old, new)
    if not found:
        sys.exit("the two runs have no time of the same case in common")
    moved = [change for change in found if change.moved]
    if moved:
        report.print_table(
            f"moved: {len(moved)} of {len(found)} times",
            ["case", "time", "before, µs", "after, µs", "after / before"],
            [
                [c.case, c.time, f"{c.before:.2f}", f"{c.after:.2f}", f"{c.ratio:.3f}"]
                for c in moved
            ],
        )
    else:
        print(f"none of {len(found)} times moved beyond its spread")
    slower = [change for change in moved if change.ratio > 1 + args.threshold / 100]
    if slower:
        sys.exit(f"slower by more than {args.threshold:g} %: {len(slower)} of {len(found)} times")


if __name__ == "__main__":
    main()
