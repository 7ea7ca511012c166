"""What every benchmark records: the machine, the versions, the commit, the raw samples."""

import argparse
import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import sys

import jax
import jaxlib
import numpy as np
from rich.console import Console
from rich.table import Table

import jax_flashmla
from jax_flashmla import native

RESULTS = pathlib.Path(__file__).parent / "results"
PEERS = pathlib.Path(__file__).parent / "peers_h200.json"


def output_directory(name: str, description: str, operation: str) -> str | None:
    """Parses the command line of benchmark `name`: where its JSON goes.

    Leaves with a sentence where `operation` has no CUDA kernel to time.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", help="directory of the JSON (default: benchmarks/results)")
    directory = parser.parse_args().out
    reason = native.why_no_kernel(operation)
    if reason is not None:
        sys.exit(f"{name} times the CUDA kernel, and there is none here: {reason}.")
    return directory


def environment() -> dict:
    """The machine and the software, as far as a figure depends on them."""
    device = jax.devices()[0]
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": device.device_kind if device.platform == "gpu" else _cpu_name(),
        "platform": device.platform,
        "jax_flashmla": jax_flashmla.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    if native.module is not None:
        found["cuda_built_with"] = ".".join(map(str, native.module.cuda_version()))
    if device.platform == "gpu":
        fields = ("driver_version", "power.limit", "clocks.sm", "temperature.gpu", "power.draw")
        values = _first_line(
            "nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"
        )
        found |= dict(zip(fields, (v.strip() for v in values.split(",")), strict=False))
    else:
        found["cores"] = os.cpu_count()
    return found


def _commit() -> str:
    """The checkout's commit; JAX_FLASHMLA_COMMIT where the files travelled without git."""
    here = pathlib.Path(__file__).parent
    commit = _first_line("git", "-C", str(here), "rev-parse", "--short=12", "HEAD")
    if not commit:
        return os.environ.get("JAX_FLASHMLA_COMMIT", "unknown")
    changed = _first_line("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if changed else "")


def _cpu_name() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return (done.stdout.splitlines() or [""])[0]


def summary(samples) -> dict:
    """Median and spread (10th to 90th percentile) of samples, with the samples."""
    low, median, high = np.percentile(samples, (10, 50, 90))
    return {
        "median": round(float(median), 3),
        "p10": round(float(low), 3),
        "p90": round(float(high), 3),
        "samples": [round(float(sample), 3) for sample in samples],
    }


def write(name: str, what: str, rows: list[dict], directory: str | None, **extra) -> None:
    """Writes `<directory>/<name>.json`, with `extra`; default directory: benchmarks/results."""
    path = pathlib.Path(directory or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"what": what, "environment": environment(), **extra, "rows": rows}
    text = json.dumps(record, indent=1)
    # Lists of samples on one line, so that a diff shows rows.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    path.write_text(text + "\n")
    print(f"wrote {path} ({len(rows)} rows)", flush=True)


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    """Prints right-aligned columns."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # Wide enough for a log file, where there is no terminal to ask.
    Console(width=None if os.isatty(1) else 140).print(table)
