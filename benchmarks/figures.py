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
from benchmarks.cases import FULL_BATCH
from benchmarks.ratios import ours

SOURCE = "decode"
FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "_static"
# Those whose times are drawn over ours, and the keys of their times.
RECORDED = {"FlashMLA": "flashmla_us", "FlashAttention-3": "fa3_us"}
HERE = {"FlashMLA, same process": "flash_mla_here_us", "FlashInfer": "flashinfer_here_us"}
PLAIN = {"plain XLA": "plain_xla_us"}


def thousands(tokens):
    """A number of tokens in a few characters."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"


def label(row):
    """A case in a few characters."""
    tokens = row.get("seqlens", thousands(row["tokens"]))
    several = f", {row['s_q']} query tokens" if row["s_q"] > 1 else ""
    dtype = f", {row['dtype']}" if row.get("dtype", "bfloat16") != "bfloat16" else ""
    return f"{row['batch']} x {tokens}, {row['heads']} heads{several}{dtype}"


def draw_ratios(record, figure):
    """How much longer the others take; nothing where there are none."""
    timed = [row for row in record["rows"] if ours(row)]
    # Plain XLA takes many times longer, and would leave the others no room.
    others = {
        name: key for name, key in (RECORDED | HERE).items() if any(key in row for row in timed)
    } or PLAIN
    rows = [row for row in timed if any(key in row for key in others.values())]
    if not rows:
        return False
    figure.set_figheight(1.2 + 0.31 * len(rows))
    axes = figure.subplots()
    height = 0.8 / len(others)
    for i, (name, key) in enumerate(others.items()):
        found = [(j, row) for j, row in enumerate(rows) if key in row]
        places = [j + (i - (len(others) - 1) / 2) * height for j, _ in found]
        ratios = [report.median(row[key]) / ours(row) for _, row in found]
        bars = axes.barh(places, ratios, height, label=name)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the line at 1
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7, bbox=white)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("time of the other / ours (above 1: ours is faster)")
    axes.legend(loc="lower right")
    return True


def draw_roofline(record, figure):
    """Every case, under the chip's ceilings of the run where there were any."""
    axes = figure.subplots()
    rows = [row for row in record["rows"] if ours(row)]
    if not rows:
        return False
    points = {id(row): (row["tflops"] * 1e3 / row["gb_per_s"], row["tflops"]) for row in rows}
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.6 * min(y for _, y in points.values()))
    if record["ceilings"]:
        draw_ceilings(record, axes, max(x for x, _ in points.values()))
    kinds = {True: ("x", "few sequences"), False: ("o", f"batch of {FULL_BATCH} and more")}
    colors = {heads: f"C{i}" for i, heads in enumerate(sorted({r["heads"] for r in rows}))}
    cases = collections.defaultdict(list)
    for row in rows:
        cases[row["batch"] < FULL_BATCH, row["heads"]].append(points[id(row)])
    for (few, heads), places in sorted(cases.items()):
        marker, kind = kinds[few]
        axes.scatter(
            *zip(*places, strict=True),
            s=24,
            marker=marker,
            color=colors[heads],
            alpha=0.8,
            label=f"{heads} heads, {kind}",
        )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("FLOP per byte of the cache")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.grid(alpha=0.3)
    return True


def draw_ceilings(record, axes, most):
    """Reading speed and a large product; that under load, where the run has it."""
    read = statistics.mean(c["read_gb_per_s"] for c in record["ceilings"].values())
    hot = tables.hot_products(record)
    matmul = statistics.mean(hot or [c["matmul_tflops"] for c in record["ceilings"].values()])
    ridge = matmul * 1e3 / read
    end = max(600, 1.3 * most)
    axes.plot([10, ridge, end], [10 * read / 1e3, matmul, matmul], color="black", linewidth=1)
    axes.annotate(f"{read:,.0f} GB/s read", (11, 0.029 * read), fontsize=8)
    what = f"{matmul:.0f} TFLOP/s, a large product" + " under load" * bool(hot)
    axes.annotate(what, (end, matmul * 1.08), fontsize=8, ha="right")
    axes.set_ylim(top=matmul * 1.8)


def draw_sweep(record, figure):
    """Time against length for one sequence, and against the batch; nothing without such cases."""
    rows = [
        row
        for row in record["rows"]
        if ours(row) and row["s_q"] == 1 and "seqlens" not in row and row["heads"] in (16, 128)
    ]
    rows = [row for row in rows if row.get("dtype") == rows[0].get("dtype")]
    length = [row for row in rows if row["batch"] == 1], "tokens", "keys of one sequence"
    batch = [row for row in rows if row["tokens"] == 4096], "batch", "sequences of 4,096 keys"
    if any(len({row[key] for row in some}) < 2 for some, key, _ in (length, batch)):
        return False
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (some, key, name) in zip(panels, (length, batch), strict=True):
        for i, heads in enumerate((16, 128)):
            draw_times(axes, [row for row in some if row["heads"] == heads], key, f"C{i}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter("{x:,g}")
    panels[0].xaxis.set_major_formatter(lambda tokens, _: thousands(int(tokens)))
    panels[1].xaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("µs")
    panels[0].set_ylim(bottom=2)  # a launch takes as long, whatever it does
    panels[1].legend(fontsize=7, loc="lower right")
    return True


def draw_times(axes, rows, key, color):
    """One number of heads: our times against `key`, and their bounds."""
    rows = sorted(rows, key=lambda row: row[key])
    if not rows:
        return
    places, heads = [row[key] for row in rows], f"{rows[0]['heads']} heads"
    times = [ours(row) for row in rows]
    axes.plot(places, times, "o-", markersize=4, color=color, label=heads)
    bounds = (
        ("floor_us", "--", "loads alone"),
        ("bound_us", ":", "the chip's ceilings"),
    )
    for bound, style, name in bounds:
        found = [(row[key], report.median(row[bound])) for row in rows if bound in row]
        if found:
            line = zip(*found, strict=True)
            axes.plot(*line, style, linewidth=1.2, color=color, label=f"{heads}: {name}")
            break


FIGURES = {
    "decode_ratios": ((8, 5.5), draw_ratios),
    "decode_roofline": ((8, 4.2), draw_roofline),
    "decode_sweep": ((8, 3.6), draw_sweep),
}


def save(name, record, folder, source):
    """Draws a figure of a record and writes it; the same record gives the same file.

    Returns whether there was anything to draw.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = name
    size, draw = FIGURES[name]
    figure = Figure(size, layout="tight")
    if not draw(record, figure):
        return False
    metadata = {"Description": source, "Date": None, "Creator": None}
    figure.savefig(folder / f"{name}.svg", metadata=metadata)
    return True


def main():
    """Draws, or with --check exits non-zero if a picture is not of the present JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    check = parser.parse_args().check
    path = report.RESULTS / f"{SOURCE}.json"
    source = f"sha256 of {path.name}: {hashlib.sha256(path.read_bytes()).hexdigest()}"
    record = tables.load(SOURCE)
    for name in FIGURES:
        target = FOLDER / f"{name}.svg"
        if not check:
            if not save(name, record, FOLDER, source):
                sys.exit(f"{path.name} has no cases for {name}: measure the suite all")
        elif not target.exists() or source not in target.read_text():
            sys.exit(f"{target.name} is not of the present {path.name}: run `make figures`")


if __name__ == "__main__":
    main()
