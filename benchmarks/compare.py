"""What moved between two runs of a benchmark: `python -m benchmarks.compare A.json B.json`.

A time has moved if the spreads of its samples, from the 10th to the 90th percentile, do not
overlap. Prints what moved, and exits with 1 if anything became slower by more than the threshold.
"""

import argparse
import json
import pathlib
import sys

from benchmarks import report

# What says which case a row is; the rest of a row was measured.
IDENTITY = "what", "batch", "s_q", "heads", "tokens", "table_tokens"


def load(path):
    """A benchmark's environment, and its rows by identity. Leaves with a sentence if it is none."""
    try:
        record = json.loads(pathlib.Path(path).read_text())
        rows = {tuple((key, row.get(key)) for key in IDENTITY): row for row in record["rows"]}
        return record["environment"], rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f"{path}: expected the JSON of a benchmark, got {type(error).__name__}: {error}")


def times(row):
    """The measured times of a row: summaries of samples, in microseconds."""
    return {key: value for key, value in row.items() if key.endswith("_us") and _is_summary(value)}


def _is_summary(value):
    return isinstance(value, dict) and {"median", "p10", "p90"} <= value.keys()


def changes(before, after):
    """Yields (case, time, before, after, ratio, moved) for every time that both runs have."""
    for identity in before.keys() & after.keys():
        case = ", ".join(f"{key} {value}" for key, value in identity if value is not None)
        new_times = times(after[identity])
        for name, old in times(before[identity]).items():
            if name not in new_times:
                continue
            new = new_times[name]
            moved = new["p10"] > old["p90"] or new["p90"] < old["p10"]
            yield case, name, old["median"], new["median"], new["median"] / old["median"], moved


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
    for key in old_machine.keys() | new_machine.keys():
        pair = old_machine.get(key), new_machine.get(key)
        if key in ("device", "driver_version", "jax", "jaxlib") and pair[0] != pair[1]:
            print(f"not the same {key}: {pair[0]} and {pair[1]}")
    for count, which in (
        (len(old.keys() - new.keys()), "before"),
        (len(new.keys() - old), "after"),
    ):
        if count:
            print(f"{count} of the cases are only in the run {which}")
    all_changes = sorted(changes(old, new), key=lambda change: change[4], reverse=True)
    if not all_changes:
        sys.exit("the two runs have no time of the same case in common")
    moved = [change for change in all_changes if change[5]]
    if moved:
        report.print_table(
            f"moved: {len(moved)} of {len(all_changes)} times",
            ["case", "time", "before, µs", "after, µs", "after / before"],
            [
                [*change[:2], *(f"{x:.2f}" for x in change[2:4]), f"{change[4]:.3f}"]
                for change in moved
            ],
        )
    else:
        print(f"none of {len(all_changes)} times moved beyond its spread")
    slower = [change for change in moved if change[4] > 1 + args.threshold / 100]
    if slower:
        sys.exit(
            f"slower by more than {args.threshold:g} %: {len(slower)} of {len(all_changes)} times"
        )


if __name__ == "__main__":
    main()
