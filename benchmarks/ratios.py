"""What times of decode are compared with: other implementations, bounds, recorded peers."""

import numpy as np

from benchmarks import cases, report
from benchmarks.implementations import KEYS


def ours_key(row):
    """The key of the time that the others are compared with; None if nothing ran."""
    return next((key for key in KEYS.values() if key in row), None)


def ours(row):
    """That time's median, in microseconds; None if nothing ran."""
    key = ours_key(row)
    return report.median(row[key]) if key else None


def speeds(case, microseconds):
    """What a time of a case means, in four digits."""
    tflops, gb_per_s = case.flops / microseconds / 1e6, case.read_bytes / microseconds / 1e3
    return {"tflops": float(f"{tflops:.4g}"), "gb_per_s": float(f"{gb_per_s:.4g}")}


def add_over_equal(rows):
    """Adds the ratio to equal lengths, in the rows of cases of as many tokens (`cases.groups`)."""
    timed = [row for row in rows if ours_key(row)]
    for equal in (row for row in timed if "seqlens" not in row):
        for row in (row for row in timed if "seqlens" in row):
            row["over_equal"] = round(ours(row) / ours(equal), 3)


def add_ratios(rows, ceilings, recorded):
    """Adds what needs a row's other times, the ceilings, or the recorded times of peers.

    Args:
      rows: all of them so far.
      ceilings: of the run, by when they were taken; empty where there were none.
      recorded: `cases.peers()` if it is of this kind of chip, else None.
    """
    for row in (row for row in rows if ours_key(row)):
        for name, key in KEYS.items():
            if key in row and key != ours_key(row):
                row[f"over_{name}"] = round(ours(row) / report.median(row[key]), 3)
        if "floor_us" in row and "decode_us" in row:
            row["over_floor"] = round(ours(row) / row["floor_us"]["median"], 3)
        if ceilings:
            row["bound_us"] = round(_bound(row, ceilings), 2)
            row["share_of_bound"] = round(row["bound_us"] / ours(row), 3)
        if ceilings and recorded:
            _add_recorded(row, ceilings, recorded)


def recorded_row(row, recorded):
    """The recorded times (`cases.peers()`) of a row's case; None if there are none."""
    shape = {"b": row["batch"], "s_q": row["s_q"], "h_q": row["heads"], "s_k": row["tokens"]}
    return next((peer for peer in recorded["rows"] if shape.items() <= peer.items()), None)


def _mean(ceilings, key):
    return float(np.mean([ceiling[key] for ceiling in ceilings.values()]))


def _bound(row, ceilings):
    """Microseconds of a row's loads, or of its products if they need longer."""
    work = ours(row)  # times a speed: what was done
    loads = row["gb_per_s"] * work / _mean(ceilings, "read_gb_per_s")
    if "floor_us" in row:
        loads = row["floor_us"]["median"]
    product = _mean(ceilings, "matmul_tflops")
    if "hot_matmul_tflops" in row:
        product = row["hot_matmul_tflops"]["median"]
    return max(loads, row["tflops"] * work / product)


def _add_recorded(row, ceilings, recorded):
    """Adds the recorded times of the same case, and the ratios to them.

    The normalised ones are as if both runs had had the same ceilings. The product that is compared
    is that of a chip under load: ours between samples; theirs, presumably, after their rows.
    """
    if "seqlens" in row or row["dtype"] != "bfloat16" or "decode_us" not in row:
        return
    found = recorded_row(row, recorded)
    if found is None:
        return
    theirs = recorded["ceilings_same_run"]
    scale = 1.0
    if "hot_matmul_tflops" in row:
        matmul = theirs["matmul_bf16_8192_tflops_before_and_after"][1]
        scale = row["hot_matmul_tflops"]["median"] / matmul
    elif row["batch"] >= cases.FULL_BATCH:
        scale = _mean(ceilings, "read_gb_per_s") / np.mean(theirs["hbm_read_gb_per_s"])
    row["flashmla_us"], row["fa3_us"] = found["decode_us"], found["fa3_decode_us"]
    for peer, key in (("flashmla", "decode_us"), ("best_peer", "best_peer_decode_us")):
        ratio = ours(row) / found[key]
        row[f"over_{peer}"] = round(ratio, 3)
        row[f"over_{peer}_normalised"] = round(float(ratio * scale), 3)
