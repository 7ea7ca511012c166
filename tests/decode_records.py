"""Records of `benchmarks.decode` as a Hopper GPU would give them, from a model of one."""

import random

from benchmarks import cases, report
from benchmarks.ratios import add_ratios, speeds

READ, MATMUL, HOT = 4500.0, 810.0, 710.0
CEILINGS = {when: {"matmul_tflops": MATMUL, "read_gb_per_s": READ} for when in ("before", "after")}
ENVIRONMENT = {
    "device": "NVIDIA H200",
    "driver_version": "1.2",
    "cuda_built_with": "13.0",
    "jax": "0.11.2",
    "jaxlib": "0.11.2",
    "commit": "0123456789ab",
    "date": "2026-01-01",
}


def samples(microseconds, count=8):
    draw = random.Random(microseconds)
    return report.summary([microseconds * draw.uniform(0.99, 1.01) for _ in range(count)])


def make_row(case, suite):
    """A row: launches and a chain of latencies, then loads or products."""
    loads, products = case.read_bytes / READ / 1e3, case.flops / HOT / 1e6
    row = {"suite": suite} | case.identity()
    row["decode_us"] = samples(9 + max(1.01 * loads, 1.2 * products))
    if case.s_q * case.heads <= 64:
        row["floor_us"] = samples(3 + loads)
    if case.bounded_by_products:
        row["hot_matmul_tflops"] = samples(HOT)
    if suite != "sweep" and case.s_q == 1:
        row["plain_xla_us"] = samples(30 + 7 * loads)
    return row | speeds(case, row["decode_us"]["median"])


def make_record(suite="all"):
    rows = [make_row(case, member) for case, member in cases.suite(suite).items()]
    add_ratios(rows, CEILINGS, cases.peers())
    return {"what": "", "environment": ENVIRONMENT, "ceilings": CEILINGS, "rows": rows}
