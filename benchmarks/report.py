"""What every benchmark records: the machine, the versions, the commit, the raw samples."""

import argparse
import datetime
import functools
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


class Parser(argparse.ArgumentParser):
    """A benchmark's command line; says what is wrong with it in one sentence, without the usage."""

    def __init__(self, description: str):
        """Every benchmark writes JSON."""
        super().__init__(description=description)
        self.add_argument(
            "--out", type=directory, help="directory of the JSON (default: benchmarks/results)"
        )

    def error(self, message):
        """Leaves with status 2."""
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}\n")


def directory(text: str) -> str:
    """A flag's directory, made if it is missing: before anything is measured."""
    try:
        os.makedirs(text, exist_ok=True)
    except OSError as error:
        message = f"expected a directory, got {text!r} ({error.strerror})"
        raise argparse.ArgumentTypeError(message) from error
    return text


def output_directory(name: str, description: str, operation: str) -> str | None:
    """Parses the command line of benchmark `name`: where its JSON goes.

    Leaves with a sentence where `operation` has no CUDA kernel to time.
    """
    out = Parser(description).parse_args().out
    reason = native.why_no_kernel(operation)
    if reason is not None:
        sys.exit(f"{name} times the CUDA kernel, and there is none here: {reason}.")
    return out


@functools.cache
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
        found |= _nvidia_smi("driver_version", "power.limit")
    else:
        found["cores"] = os.cpu_count()
    return found


def gpu_state() -> dict:
    """What a GPU's speed depends on at this moment; empty where there is none."""
    return _nvidia_smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def _nvidia_smi(*fields: str) -> dict:
    """Fields of the first GPU, with their units; empty where there is no nvidia-smi."""
    values = _first_line("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    return dict(zip(fields, (v.strip() for v in values.split(",")), strict=False)) if values else {}


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


def median(time) -> float:
    """Of a summary; a number is what it is."""
    return time["median"] if isinstance(time, dict) else time


def write(name, what, rows, directory, start=None, done=True, **extra) -> dict:
    """Writes `<directory>/<name>.json` and returns the record.

    Args:
      name: of the benchmark.
      what: was measured, and what the keys of the rows mean.
      rows: dicts.
      directory: None for benchmarks/results.
      start: the `gpu_state` when the benchmark began.
      done: False for what there is so far, in case the run is cut short.
      **extra: more keys of the record.
    """
    path = pathlib.Path(directory or RESULTS) / f"{name}.json"
    states = {"start": start, "end": gpu_state() if done else None}
    record = {"what": what, "environment": environment()}
    record |= {"gpu_state": {when: state for when, state in states.items() if state}}
    record |= {**extra, "rows": rows}
    text = json.dumps(record, indent=1)
    # Lists of samples on one line, so that a diff shows rows.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    path.write_text(text + "\n")
    if done:
        print(f"wrote {path} ({len(rows)} rows)", flush=True)
    return record


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    """Prints right-aligned columns."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # Wide enough for a log file, where there is no terminal to ask.
    Console(width=None if os.isatty(1) else 180).print(table)
