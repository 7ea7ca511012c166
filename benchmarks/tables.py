"""Writes tables from benchmarks/results/ into README.md and docs/fp8.md.

`python -m benchmarks.tables [--check]`
"""

import argparse
import json
import pathlib
import re
import sys

from benchmarks import cases, report

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
FP8_PAGE = ROOT / "docs" / "fp8.md"
MARKED = r"(<!-- table:{name}: made by `make figures` -->\n).*?(<!-- end -->)"


def load(name):
    """The record that a benchmark wrote."""
    return json.loads((report.RESULTS / f"{name}.json").read_text())


def markdown_table(columns, rows):
    """A right-aligned Markdown table."""
    lines = [columns, ["---:"] * len(columns), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def source(name, folder=""):
    """One line: where and with what it was measured. `folder`: from the page to the repository."""
    env = load(name)["environment"]
    where = env["device"]
    if "driver_version" in env:
        where += f", driver {env['driver_version']}, CUDA {env['cuda_built_with']}"
    else:
        where += f", {env['cores']} cores"
    return (
        f"\n{where}; jax {env['jax']}, commit {env['commit']}, {env['date']}; "
        f"[raw samples]({folder}benchmarks/results/{name}.json).\n"
    )


def planner():
    """Time of the plan against the batch."""
    rows = [
        [
            f"{row['batch']:,}",
            f"{row['kernel_us']['median']:.2f}",
            f"{row['program_cuda_us']['median']:.1f}",
            f"{row['program_xla_us']['median']:.0f}",
        ]
        for row in load("planner")["rows"]
    ]
    columns = ["sequences", "kernel, µs", "inside a jitted program, µs", "the same through XLA, µs"]
    return markdown_table(columns, rows) + source("planner")


def xla_decode(platform):
    """The XLA implementation against gather + einsum."""
    name = f"xla_decode_{platform}"
    rows = [
        [
            row["batch"],
            row["heads"],
            f"{row['tokens']:,} of {row['table_tokens']:,}",
            f"{row['ours_us']['median'] / 1e3:.2f}",
            f"{row['plain_us']['median'] / 1e3:.2f}",
            f"{row['ours_temporary_bytes'] / 1e6:,.0f}",
            f"{row['plain_temporary_bytes'] / 1e6:,.0f}",
        ]
        for row in load(name)["rows"]
    ]
    columns = ["sequences", "heads", "tokens", "ours, ms", "plain, ms", "ours, MB", "plain, MB"]
    return markdown_table(columns, rows) + source(name)


def hot_products(record):
    """TFLOP/s of the large matrix product between the samples of decode.json's rows."""
    rows = record["rows"]
    return [row["hot_matmul_tflops"]["median"] for row in rows if "hot_matmul_tflops" in row]


def decode():
    """The decode kernel against its ceilings, the peers and plain XLA."""
    record = load("decode")
    text = markdown_table(*equal_rows(record["rows"]))
    unequal = [row for row in record["rows"] if "seqlens" in row]
    if unequal:
        text += "\nSequences of unequal lengths:\n\n" + markdown_table(*unequal_rows(unequal))
    for when, ceiling in record["ceilings"].items():
        text += (
            f"\nCeilings of the run, {when}: {ceiling['read_gb_per_s']:,.0f} GB/s read, "
            f"{ceiling['matmul_tflops']:.0f} TFLOP/s in a large matrix product."
        )
    hot = hot_products(record)
    text += f"\nThe product under load, between samples: {min(hot):.0f} to {max(hot):.0f}."
    theirs = cases.peers()["ceilings_same_run"]
    read, matmul = (" to ".join(f"{x:,}" for x in values) for values in theirs.values())
    text += f"\nCeilings of the peers' run: {read} GB/s, {matmul} TFLOP/s.\n"
    return text + source("decode")


def equal_rows(rows):
    """Columns and rows of the cases whose times by the peers are recorded."""
    columns = [
        *["sequences", "query tokens", "heads", "keys", "ours, µs", "GB/s", "TFLOP/s"],
        *["loads alone, µs", "plain XLA, µs", "FlashMLA, µs", "FlashAttention-3, µs"],
    ]
    return columns, [
        [
            row["batch"],
            row["s_q"],
            row["heads"],
            f"{row['tokens']:,}",
            *speeds(row),
            f"{report.median(row['plain_xla_us']):,.0f}" if "plain_xla_us" in row else "",
            f"{row['flashmla_us']:.1f}",
            f"{row['fa3_us']:.1f}",
        ]
        for row in rows
        if "flashmla_us" in row
    ]


def unequal_rows(rows):
    """Columns and rows of the cases whose lengths were drawn."""
    columns = [
        *["sequences", "query tokens", "heads", "keys", "ours, µs", "GB/s", "TFLOP/s"],
        *["loads alone, µs", "over equal lengths of as many keys"],
    ]
    return columns, [
        [
            row["batch"],
            row["s_q"],
            row["heads"],
            row["seqlens"].replace("normal", "N").replace("uniform", "U"),
            *speeds(row),
            f"{row['over_equal']:.3f}" if "over_equal" in row else "",
        ]
        for row in rows
    ]


def speeds(row):
    """Time, GB/s, TFLOP/s, and the time of the loads alone where it was taken."""
    return [
        f"{row['decode_us']['median']:.1f}",
        f"{row['gb_per_s']:,.0f}",
        f"{row['tflops']:.0f}",
        f"{row['floor_us']['median']:.1f}" if "floor_us" in row else "",
    ]


def step():
    """What a jitted program of many layers adds to the kernel."""
    columns = {
        "a layer more, µs": "slope_us",
        "new outputs in each call, µs": "new_outputs_us",
        "planning in each layer, µs": "replanned_us",
        "kernels busy, µs": "busy_us",
        "between them, µs": "gaps_us",
    }
    rows = load("step")["rows"]
    columns = {name: key for name, key in columns.items() if any(key in row for row in rows)}
    cells = [
        [
            row["batch"],
            row["heads"],
            f"{row['tokens']:,}",
            f"{row['layer_us']['median']:.1f}",
            f"{row['kernel_us']['median']:.1f}",
            *(f"{report.median(row[key]):.1f}" if key in row else "" for key in columns.values()),
            ", ".join(
                f"{count} x {name.split(' ')[0]}" for name, count in sorted(row["launches"].items())
            ),
        ]
        for row in rows
    ]
    names = [
        *["sequences", "heads", "keys", "in the program, µs a layer", "kernels alone, µs"],
        *columns,
        "launch calls of the program",
    ]
    return markdown_table(names, cells) + source("step")


def sharded(gpus):
    """What several GPUs gain."""
    name = f"sharded_{gpus}"
    times = "all_gpus_us", "part_on_one_us", "whole_on_one_us"
    rows = [
        [
            row["what"],
            *(f"{row[key]['median']:.1f}" if key in row else "" for key in times),
            f"{row['efficiency']:.1%}" if "efficiency" in row else "",
            f"{row['speedup']:.2f}" if "speedup" in row else "",
        ]
        for row in load(name)["rows"]
    ]
    columns = [
        *["shared", f"{gpus} GPUs, µs", "one's part on one, µs", "all on one, µs"],
        *["of perfect scaling", "times faster than one"],
    ]
    return markdown_table(columns, rows) + source(name)


def layouts():
    """What other page sizes, wider rows and padding cost: a row for each layout."""
    rows = load("layouts")["rows"]
    shapes = list(dict.fromkeys((row["batch"], row["heads"], row["tokens"]) for row in rows))
    found = {
        (row["layout"], row["batch"], row["heads"], row["tokens"]): f"{row['over_base']:.3f}"
        for row in rows
        if row["layout"] != "pages of 64"  # what the others are compared with
    }
    names = dict.fromkeys(layout for layout, *_ in found)
    cells = [[name, *(found.get((name, *shape), "") for shape in shapes)] for name in names]
    columns = [f"{batch} x {heads} heads x {tokens:,}" for batch, heads, tokens in shapes]
    return markdown_table(["time over that in pages of 64", *columns], cells) + source("layouts")


def deepseek():
    """A decode step of a whole model."""

    def times(row):
        if "error" in row:
            return [row["error"], "", ""]
        step, attention = (row[key]["median"] / 1e3 for key in ("step_us", "attention_us"))
        return [f"{step:.1f}", f"{attention:.2f}", f"{row['tokens_per_s']:,.0f}"]

    rows = [
        [
            gpus,
            row["implementation"],
            row["batch"],
            f"{row['context']:,}",
            *times(row),
        ]
        for gpus, name in ((1, "deepseek"), (4, "deepseek_1x4"))
        for row in load(name)["rows"]
    ]
    columns = ["GPUs", "implementation", "sequences", "tokens of each"]
    columns += ["step, ms", "attention and plan alone, ms", "tokens/s"]
    return markdown_table(columns, rows) + source("deepseek") + source("deepseek_1x4")


def fp8_accuracy():
    """The error of decode from FP8 caches."""
    keys = "out_rms", "ordinary_rms", "out_max", "lse_max"
    cells = [
        [row["rows"], row["format"], *(f"{row[key]['median']:.1e}" for key in keys)]
        for row in load("fp8_accuracy")["rows"]
    ]
    columns = ["rows", "cache", "error of out", "without the outliers' columns"]
    columns += ["largest of these", "largest error of lse"]
    return markdown_table(columns, cells) + source("fp8_accuracy", "../")


def fp8():
    """Decode from FP8 caches beside bfloat16."""
    cells = [
        [
            *(row["batch"], row["heads"], f"{row['tokens']:,}", row["format"]),
            f"{row['decode_us']['median']:.1f}",
            f"{row['speedup']:.2f}",
            "" if row["over_floor"] is None else f"{row['over_floor']:.2f}",
        ]
        for row in load("fp8")["rows"]
    ]
    columns = ["sequences", "heads", "tokens of each", "cache", "µs"]
    columns += ["times faster than bfloat16", "over the loads"]
    return markdown_table(columns, cells) + source("fp8", "../")


def fp8_deepseek():
    """The logits of a model that reads an FP8 cache."""
    cells = [
        [
            row["cache"],
            f"{row['logits_rms']:.1e}",
            f"{row['kl_mean']:.1e}",
            f"{row['kl_max']:.1e}",
            f"{row['same_token']:.1%}",
        ]
        for row in load("fp8_deepseek")["rows"]
    ]
    columns = ["cache", "error of the logits", "mean divergence, nats", "largest"]
    return markdown_table([*columns, "same most likely token"], cells) + source(
        "fp8_deepseek", "../"
    )


TABLES = {
    "decode": decode,
    "layouts": layouts,
    "step": step,
    "deepseek": deepseek,
    "planner": planner,
    "sharded_4": lambda: sharded(4),
    "xla_decode_cpu": lambda: xla_decode("cpu"),
    "xla_decode_gpu": lambda: xla_decode("gpu"),
}


FP8_TABLES = {"fp8": fp8, "fp8_accuracy": fp8_accuracy, "fp8_deepseek": fp8_deepseek}
PAGES = {README: TABLES, FP8_PAGE: FP8_TABLES}


def main():
    """Rewrites the tables, or with --check exits non-zero if one is not what the JSON says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    args = parser.parse_args()
    for page, tables in PAGES.items():
        name = page.relative_to(ROOT)
        text = page.read_text()
        new = with_tables(text, tables, name)
        if args.check and new != text:
            sys.exit(f"{name}'s tables differ from benchmarks/results/: run `make figures`")
        if not args.check:
            page.write_text(new)


def with_tables(text, tables, page):
    """A page with its tables made anew."""
    for name, make in tables.items():
        pattern = re.compile(MARKED.format(name=name), re.DOTALL)
        text, found = pattern.subn(lambda m, make=make: m[1] + make() + m[2], text)
        if found != 1:
            sys.exit(f"{page}: expected one table {name!r}, found {found}")
    return text


if __name__ == "__main__":
    main()
