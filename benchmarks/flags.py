"""The command line of `benchmarks.decode`."""

import argparse
import itertools
import os

import jax

from benchmarks import cases, implementations, peers, report
from benchmarks.implementations import KEYS

MOST = 2**20  # sequences, query tokens, heads
# What describes own cases, and what is taken where it is left out. Batch: as a file has lengths.
OWN = {"batch": None, "s_q": 1, "heads": 16, "seqlens": "4096"}


def parse(arguments):
    """The command line: what to run. Leaves with a sentence if it makes no sense."""
    parser = report.Parser("Time of decode, against its bounds and other implementations.")
    kernel = implementations.why_not("cuda") is None
    parser.add_argument(
        "--suite",
        type=_one_of(*cases.SUITES, "all", "tiny"),
        help=f"{', '.join(cases.SUITES)}, all, or tiny (default: {'all' if kernel else 'tiny'})",
    )
    number = {"type": _positive, "nargs": "+", "metavar": "N"}
    parser.add_argument("--batch", **number, help="own cases: sequences")
    parser.add_argument("--s_q", **number, help="query tokens of each (default: 1)")
    parser.add_argument("--heads", **number, help="query heads (default: 16)")
    parser.add_argument(
        "--seqlens",
        nargs="+",
        help="tokens: 4096, normal(8192,4096), uniform(300,1000), or a file (default: 4096)",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        type=_one_of(*cases.DTYPES),
        default=["bfloat16"],
        help=", ".join(cases.DTYPES),
    )
    parser.add_argument("--implementations", nargs="+", type=_one_of(*KEYS), help=", ".join(KEYS))
    parser.add_argument(
        "--plots", type=report.directory, help="a directory for pictures of this run"
    )
    args = parser.parse_args(arguments)

    own = [flag for flag in OWN if getattr(args, flag)]
    if own and args.suite:
        parser.error(f"--suite: expected a suite or cases of your own, got --{own[0]} beside it")
    if own:
        args.suite, args.cases = "own", {}
        lists = (getattr(args, flag) or [default] for flag, default in OWN.items())
        for *shape, dtype in itertools.product(*lists, args.dtype):
            try:
                args.cases[cases.make_case(*shape, dtype)] = "own"
            except ValueError as error:
                parser.error(f"--seqlens: {error}")
    else:
        args.suite = args.suite or ("all" if kernel else "tiny")
        args.cases = {}
        for dtype in args.dtype:
            args.cases |= cases.suite(args.suite, dtype)
    memory = memory_bytes()
    for case in args.cases:
        if cases.bytes_needed(case) > memory:
            which = "--batch, --s_q, --heads, --seqlens" if own else "--suite"
            flag = f"{which}: expected cases that fit into {memory / 2**30:.0f} GiB"
            parser.error(f"{flag}, got {case}: {cases.bytes_needed(case) / 2**30:.0f} GiB")

    args.required = args.implementations or (["cuda", "plain"] if kernel else ["xla", "plain"])
    for name in args.required:
        if reason := implementations.why_not(name):
            parser.error(f"--implementations: {name} cannot run: {reason}")
    args.names = [name for name in KEYS if name in args.required]
    if not args.implementations and kernel:
        missing = {name: implementations.why_not(name) for name in peers.PREPARE}
        args.names += [name for name, reason in missing.items() if reason is None]
        if absent := [f"{name} ({reason})" for name, reason in missing.items() if reason]:
            print(f"not compared with {', '.join(absent)}")
    return args


def _one_of(*names):
    def convert(text):
        if text in names:
            return text
        expected = f"{', '.join(names[:-1])} or {names[-1]}"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return convert


def _positive(text):
    if text.isdecimal() and 1 <= int(text) <= MOST:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number from 1 to {MOST:,}, got {text!r}")


def memory_bytes():
    """What cases may fill: nine tenths of what the device's allocator, or the machine, has."""
    found = jax.devices()[0].memory_stats() or {}
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0.9 * found.get("bytes_limit", machine)


def record_name(args):
    """`decode` for what the project keeps; other runs have names of their own."""
    parts = ["decode"] + [args.suite] * (args.suite != "all")
    parts += args.dtype * (args.dtype != ["bfloat16"])
    return "_".join(parts + args.names[:1] * (args.names[0] != "cuda"))
