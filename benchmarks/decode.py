"""Time of the decode kernel: `python -m benchmarks.decode`.

Runs the shapes of `peers_h200.json`, which has the times of FlashMLA and FlashAttention-3 on an
H200. Each shape is checked against float32 first, then timed alone (split and combine kernels, many
launches in one CUDA graph), against the time of its loads alone, and against plain gather + einsum
through XLA. The chip's ceilings are measured in the same run, since they drift with temperature.
Needs a Hopper GPU and the native module.
"""

import functools
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.xla_decode import SCALE, make_operands, plain_decode
from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata, native, planner
from jax_flashmla.decode import partial_types

ROUNDS = 3
REPLAYS = 8
GRAPH_MICROSECONDS = 10_000  # about as long as one graph should run
MATMUL = 8192
READ_BYTES = 8 * 2**30
HOT_CALLS = 100  # of the product, between samples: 0.15 s
FULL_BATCH = 32  # from here on, the chip's ceilings bound the shapes, and not latency
# The plain version gathers the whole cache; above this it is not worth the memory.
PLAIN_BYTES = 8 * 2**30


def check(operands, metadata):
    """Raises unless the first and last sequence's outputs are close to float32's."""
    q, k_cache, table, lengths = operands
    out, lse = flash_mla_with_kvcache(*operands, 512, *metadata, causal=True, implementation="cuda")
    s_q, length = q.shape[1], int(lengths[0])
    hidden = s_q - 1 - jnp.arange(s_q)
    seen = jnp.arange(length) < length - hidden[:, None, None]
    with jax.default_matmul_precision("highest"):
        for i in (0, -1):
            keys = k_cache[table[i]].reshape(length, 576).astype(jnp.float32)
            scores = jnp.einsum("shd,td->sht", q[i].astype(jnp.float32), keys) * SCALE
            scores = jnp.where(seen, scores, -jnp.inf)
            want = jnp.einsum("sht,tv->shv", jax.nn.softmax(scores, axis=-1), keys[:, :512])
            error = float(jnp.linalg.norm(out[i] - want) / jnp.linalg.norm(want))
            lse_error = float(jnp.abs(lse[i].T - jax.nn.logsumexp(scores, axis=-1)).max())
            if not (error < 1e-2 and lse_error < 1e-3):
                raise AssertionError(f"relative error {error:.1e}, lse error {lse_error:.1e}")


def time_kernels(operands, metadata, what, launches):
    """Microseconds per launch of "decode", "split", "combine" or "floor", a sample per replay.

    `q` may have a leading axis: launches then take queries, and outputs, in turn.
    """
    q, k_cache, table, _ = operands
    *copies, batch, s_q, heads, _ = q.shape
    parts = metadata.tile_scheduler_metadata.shape[0]
    slots = batch + parts
    results = (
        jnp.zeros((*copies, batch, s_q, heads, 512), jnp.bfloat16),
        jnp.zeros((batch, heads, s_q)),
        *(jnp.zeros(x.shape, x.dtype) for x in partial_types((slots, 1), s_q * heads)),
    )
    arrays = jax.block_until_ready((*operands, *metadata, *results))
    return native.module.bench.time_decode(
        [array.unsafe_buffer_pointer() for array in arrays],
        batch=batch,
        s_q=s_q,
        h_q=heads,
        h_kv=1,
        num_blocks=k_cache.shape[0],
        max_blocks=table.shape[1],
        num_parts=parts,
        slots=slots,
        causal=True,
        what=what,
        launches=launches,
        replays=REPLAYS,
        copies=math.prod(copies),
    )


def time_wall(fun, *args, calls):
    """Microseconds per call of a compiled function, `calls` in flight."""
    jax.block_until_ready(fun(*args))
    begin = time.perf_counter()
    for _ in range(calls):
        out = fun(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - begin) / calls * 1e6


@functools.cache
def large_product():
    """A compiled product of large bfloat16 matrices, and its operand."""
    x = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL), jnp.bfloat16)
    return jax.jit(jnp.matmul).lower(x, x).compile(), x


def measure_matmul(calls=20):
    """TFLOP/s of a large bfloat16 product on random data: the ceiling at this temperature."""
    product, x = large_product()
    return 2 * MATMUL**3 / time_wall(product, x, x, calls=calls) / 1e6


def measure_read():
    """GB/s of reading a large float32 array: the run's other ceiling."""
    x = jax.random.normal(jax.random.key(0), (READ_BYTES // 4,), jnp.float32)
    total = jax.jit(jnp.sum).lower(x).compile()
    return READ_BYTES / time_wall(total, x, calls=20) / 1e3


def measure_ceilings():
    """Both ceilings."""
    return {"matmul_tflops": round(measure_matmul(), 1), "read_gb_per_s": round(measure_read(), 1)}


def bounded_by_products(batch, s_q, heads):
    """Whether the chip's tensor cores, and so its power, bound a shape."""
    return batch >= FULL_BATCH and s_q * heads > planner.ROWS_PER_TILE


def measure(peer):
    """Returns a row of the report."""
    batch, s_q, heads, length = (peer[key] for key in ("b", "s_q", "h_q", "s_k"))
    operands = make_operands(batch, heads, length, length, s_q)
    metadata = get_mla_metadata(operands[3], s_q * heads, 1)
    check(operands, metadata)
    launches = int(np.clip(GRAPH_MICROSECONDS / peer["decode_us"], 4, 200))
    kinds = ["split", "combine", "decode"] + ["floor"] * (s_q * heads <= planner.ROWS_PER_TILE)
    samples, matmul = {kind: [] for kind in kinds}, []
    for _ in range(ROUNDS):
        for kind in kinds:
            samples[kind] += time_kernels(operands, metadata, kind, launches)
        if bounded_by_products(batch, s_q, heads):
            matmul.append(measure_matmul(HOT_CALLS))
    row = {"batch": batch, "s_q": s_q, "heads": heads, "tokens": length}
    row |= {f"{name}_us": report.summary(values) for name, values in samples.items()}
    if matmul:
        row["hot_matmul_tflops"] = report.summary(matmul)
    decode_us = row["decode_us"]["median"]
    row["tflops"] = round(2 * s_q * heads * batch * length * 1088 / decode_us / 1e6, 1)
    row["gb_per_s"] = round(batch * length * 1152 / decode_us / 1e3, 1)
    if "floor" in samples:
        row["over_floor"] = round(decode_us / row["floor_us"]["median"], 3)
    row["flashmla_us"] = peer["decode_us"]
    row["over_flashmla"] = round(decode_us / peer["decode_us"], 3)
    row["fa3_us"] = peer["fa3_decode_us"]
    if s_q == 1 and batch * length * 1152 <= PLAIN_BYTES:
        plain = jax.jit(plain_decode).lower(*operands).compile()
        row["plain_xla_us"] = round(time_wall(plain, *operands, calls=10), 1)
    return row


def add_normalised_ratios(rows, ceilings, peer_ceilings):
    """Adds the ratios to FlashMLA's times as if both runs had had the same ceilings.

    The product that is compared is that of a chip under load, in both runs: theirs after the rows,
    ours between the samples of a row.
    """
    peer_matmul = peer_ceilings["matmul_bf16_8192_tflops_before_and_after"][1]
    peer_read = np.mean(peer_ceilings["hbm_read_gb_per_s"])
    read = np.mean([ceiling["read_gb_per_s"] for ceiling in ceilings.values()])
    for row in rows:
        scale = 1.0
        if "hot_matmul_tflops" in row:
            scale = row["hot_matmul_tflops"]["median"] / peer_matmul
        elif row["batch"] >= FULL_BATCH:
            scale = read / peer_read
        row["over_flashmla_normalised"] = round(float(row["over_flashmla"] * scale), 3)


def main():
    """Measures, prints, writes decode.json."""
    directory = report.output_directory(__spec__.name, __doc__, "decode")
    peers = json.loads(report.PEERS.read_text())
    what = (
        "Paged MLA decode, bfloat16, page size 64, equal lengths: split_us the split kernel, "
        "combine_us the combine kernel, decode_us both, floor_us the loads of the split kernel "
        "alone, in a CUDA graph; checked against float32 first. flashmla_us and fa3_us: from "
        "peers_h200.json, another run on the same kind of chip; over_flashmla_normalised: the "
        "ratio after scaling each time by its run's ceiling, where the batch fills the chip: above "
        "64 query rows the matrix product of a chip under load (hot_matmul_tflops, between a row's "
        "samples; theirs after their rows), else reading. plain_xla_us: gather + einsum, wall time "
        f"of pipelined calls. ceilings: a bfloat16 product of {MATMUL}^3, a sum of "
        f"{READ_BYTES / 2**30:.0f} GiB of float32."
    )
    rows, ceilings = [], {"before": measure_ceilings()}
    for peer in peers["rows"]:
        rows.append(measure(peer))
        add_normalised_ratios(rows, ceilings, peers["ceilings_same_run"])
        # After each row, so that a run that is cut short leaves what it has.
        report.write("decode", what, rows, directory, ceilings=ceilings)
    ceilings["after"] = measure_ceilings()
    add_normalised_ratios(rows, ceilings, peers["ceilings_same_run"])
    report.write("decode", what, rows, directory, ceilings=ceilings)
    print(f"ceilings: {ceilings}")
    columns = {
        "batch": "batch",
        "s_q": "s_q",
        "heads": "heads",
        "tokens": "tokens",
        "split": "split_us",
        "combine": "combine_us",
        "decode": "decode_us",
        "TFLOP/s": "tflops",
        "GB/s": "gb_per_s",
        "/ floor": "over_floor",
        "FlashMLA": "flashmla_us",
        "FA3": "fa3_us",
        "plain XLA": "plain_xla_us",
        "hot TFLOP/s": "hot_matmul_tflops",
        "/ FlashMLA": "over_flashmla",
        "normalised": "over_flashmla_normalised",
    }
    report.print_table(
        "decode, µs",
        list(columns),
        [[cell(row.get(key, "")) for key in columns.values()] for row in rows],
    )


def cell(value):
    """A table's entry: of several samples, the median."""
    return f"{value['median']:.1f}" if isinstance(value, dict) else value


if __name__ == "__main__":
    main()
