"""Draws docs/_static/*.svg from benchmarks/results/: `python -m benchmarks.figures [--check]`.

A picture carries the digest of the JSON that it was drawn from, so that `--check` can tell, without
drawing, whether it is current.
"""

import argparse
import hashlib
import json
import pathlib
import sys

from benchmarks import report

FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "_static"
BYTES_PER_KEY = 576 * 2
FLOP_PER_KEY = 2 * (576 + 512)  # of a query row: its score, and its share of the output


def label(row):
    """A case in a few characters."""
    tokens = f"{row['tokens'] // 1024}k"
    several = f", {row['s_q']} query tokens" if row["s_q"] > 1 else ""
    return f"{row['batch']} x {tokens}, {row['heads']} heads{several}"


def draw_ratios(rows, figure):
    """How much longer the others take."""
    axes = figure.subplots()
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
    ceilings = record["ceilings"].values()
    read = sum(c["read_gb_per_s"] for c in ceilings) / len(ceilings)
    hot = [r["hot_matmul_tflops"]["median"] for r in record["rows"] if "hot_matmul_tflops" in r]
    matmul = sum(hot) / len(hot)
    ridge = matmul * 1e3 / read
    axes.plot([10, ridge, 600], [10 * read / 1e3, matmul, matmul], color="black", linewidth=1)
    axes.annotate(f"{read:,.0f} GB/s read", (11, 125), fontsize=8)
    axes.annotate(
        f"{matmul:.0f} TFLOP/s, a large product under load", (130, matmul * 1.08), fontsize=8
    )
    for batched, marker in ((True, "o"), (False, "x")):
        for heads in sorted({row["heads"] for row in record["rows"]}):
            rows = [
                r for r in record["rows"] if r["heads"] == heads and (r["batch"] >= 32) == batched
            ]
            axes.scatter(
                [r["s_q"] * heads * FLOP_PER_KEY / BYTES_PER_KEY for r in rows],
                [r["tflops"] for r in rows],
                marker=marker,
                color={16: "C0", 32: "C1", 64: "C2", 128: "C3"}[heads],
                label=f"{heads} heads, {'batch of 32 and more' if batched else 'few sequences'}"
                if rows
                else None,
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


FIGURES = {
    "decode_ratios": (
        "decode",
        (8, 5.5),
        lambda record, figure: draw_ratios(record["rows"], figure),
    ),
    "decode_roofline": ("decode", (7, 4.2), draw_roofline),
}


def digest(path):
    """What a picture says of its JSON."""
    return f"sha256 of {path.name}: {hashlib.sha256(path.read_bytes()).hexdigest()}"


def main():
    """Draws, or with --check exits non-zero if a picture is not of the present JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    check = parser.parse_args().check
    for name, (result, size, draw) in FIGURES.items():
        source = report.RESULTS / f"{result}.json"
        target = FOLDER / f"{name}.svg"
        if check:
            if not target.exists() or digest(source) not in target.read_text():
                sys.exit(f"{target.name} is not of the present {source.name}: run `make figures`")
            continue
        import matplotlib as mpl
        from matplotlib.figure import Figure

        mpl.rcParams["svg.hashsalt"] = name  # the same drawing gives the same file
        figure = Figure(size, layout="tight")
        draw(json.loads(source.read_text()), figure)
        metadata = {"Description": digest(source), "Date": None, "Creator": None}
        figure.savefig(target, metadata=metadata)


if __name__ == "__main__":
    main()
