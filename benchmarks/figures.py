"""Draws docs/_static/*.svg from benchmarks/results/: `python -m benchmarks.figures [--check]`.

A picture carries the digest of the JSON that it was drawn from, so that `--check` can tell, without
drawing, whether it is current.
"""

import argparse
import collections
import hashlib
import pathlib
import statistics
import sys

from benchmarks import report, tables
from benchmarks.decode import FULL_BATCH

SOURCE = "decode"
FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "_static"


def label(row):
    """A case in a few characters."""
    tokens = f"{row['tokens'] // 1024}k"
    several = f", {row['s_q']} query tokens" if row["s_q"] > 1 else ""
    return f"{row['batch']} x {tokens}, {row['heads']} heads{several}"


def draw_ratios(record, figure):
    """How much longer the others take."""
    axes, rows = figure.subplots(), record["rows"]
    others = {"FlashMLA": "flashmla_us", "FlashAttention-3": "fa3_us"}
    height = 0.8 / len(others)
    for i, (name, key) in enumerate(others.items()):
        places = [j + (i - 0.5) * height for j in range(len(rows))]
        ratios = [row[key] / row["decode_us"]["median"] for row in rows]
        bars = axes.barh(places, ratios, height, label=name)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("time of the other / ours (above 1: ours is faster)")
    axes.legend(loc="lower right")


def draw_roofline(record, figure):
    """Every case under the chip's ceilings of the run."""
    axes = figure.subplots()
    read = statistics.mean(c["read_gb_per_s"] for c in record["ceilings"].values())
    matmul = statistics.mean(tables.hot_products(record))
    ridge = matmul * 1e3 / read
    axes.plot([10, ridge, 600], [10 * read / 1e3, matmul, matmul], color="black", linewidth=1)
    axes.annotate(f"{read:,.0f} GB/s read", (11, 125), fontsize=8)
    axes.annotate(
        f"{matmul:.0f} TFLOP/s, a large product under load", (130, matmul * 1.08), fontsize=8
    )
    kinds = {True: ("x", "few sequences"), False: ("o", f"batch of {FULL_BATCH} and more")}
    colors = {
        heads: f"C{i}" for i, heads in enumerate(sorted({r["heads"] for r in record["rows"]}))
    }
    cases = collections.defaultdict(list)
    for row in record["rows"]:
        point = row["tflops"] * 1e3 / row["gb_per_s"], row["tflops"]
        cases[row["batch"] < FULL_BATCH, row["heads"]].append(point)
    for (few, heads), points in sorted(cases.items()):
        marker, kind = kinds[few]
        axes.scatter(
            *zip(*points, strict=True),
            marker=marker,
            color=colors[heads],
            label=f"{heads} heads, {kind}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(8, 1300)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("FLOP per byte of the cache")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize=7, loc="lower right")
    axes.grid(alpha=0.3)


FIGURES = {"decode_ratios": ((8, 5.5), draw_ratios), "decode_roofline": ((7, 4.2), draw_roofline)}


def save(name, source):
    """Draws a figure and writes it; the same JSON gives the same file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = name
    size, draw = FIGURES[name]
    figure = Figure(size, layout="tight")
    draw(tables.load(SOURCE), figure)
    metadata = {"Description": source, "Date": None, "Creator": None}
    figure.savefig(FOLDER / f"{name}.svg", metadata=metadata)


def main():
    """Draws, or with --check exits non-zero if a picture is not of the present JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    check = parser.parse_args().check
    path = report.RESULTS / f"{SOURCE}.json"
    source = f"sha256 of {path.name}: {hashlib.sha256(path.read_bytes()).hexdigest()}"
    for name in FIGURES:
        target = FOLDER / f"{name}.svg"
        if not check:
            save(name, source)
        elif not target.exists() or source not in target.read_text():
            sys.exit(f"{target.name} is not of the present {path.name}: run `make figures`")


if __name__ == "__main__":
    main()
