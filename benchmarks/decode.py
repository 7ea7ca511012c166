"""Time of the decode kernel: `python -m benchmarks.decode`.

Runs the shapes of `peers_h200.json`, which has the times of FlashMLA and FlashAttention-3 on an
H200. Each shape is checked against float32 first, then timed alone (split and combine kernels, many
launches in one CUDA graph) and against plain gather + einsum through XLA. Needs a Hopper GPU and
the native module.
"""

import argparse
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.xla_decode import SCALE, make_operands, plain_decode
from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata, native

PEERS = pathlib.Path(__file__).parent / "peers_h200.json"
ROUNDS = 3
REPLAYS = 8
GRAPH_MICROSECONDS = 10_000  # about as long as one graph should run
MATMUL = 8192
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


def time_kernels(operands, metadata, combine, launches):
    """Microseconds per decode, one sample per replay."""
    q, k_cache, table, _ = operands
    batch, s_q, heads, _ = q.shape
    parts = metadata.tile_scheduler_metadata.shape[0]
    slots = batch + parts
    results = (
        jnp.zeros((batch, s_q, heads, 512), jnp.bfloat16),
        jnp.zeros((batch, heads, s_q)),
        jnp.zeros((slots, 1, s_q * heads, 512)),
        jnp.zeros((slots, 1, s_q * heads)),
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
        combine=combine,
        launches=launches,
        replays=REPLAYS,
    )


def time_wall(fun, *args, calls):
    """Microseconds per call of a compiled function, `calls` in flight."""
    jax.block_until_ready(fun(*args))
    begin = time.perf_counter()
    for _ in range(calls):
        out = fun(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - begin) / calls * 1e6


def measure_matmul():
    """TFLOP/s of a large bfloat16 product on random data: the run's ceiling."""
    x = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL), jnp.bfloat16)
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    return 2 * MATMUL**3 / time_wall(product, x, x, calls=20) / 1e6


def measure(peer):
    """Returns a row of the report."""
    batch, s_q, heads, length = (peer[key] for key in ("b", "s_q", "h_q", "s_k"))
    operands = make_operands(batch, heads, length, length, s_q)
    metadata = get_mla_metadata(operands[3], s_q * heads, 1)
    check(operands, metadata)
    launches = int(np.clip(GRAPH_MICROSECONDS / peer["decode_us"], 4, 200))
    samples = {"split": [], "decode": []}
    for _ in range(ROUNDS):
        samples["split"] += time_kernels(operands, metadata, False, launches)
        samples["decode"] += time_kernels(operands, metadata, True, launches)
    row = {"batch": batch, "s_q": s_q, "heads": heads, "tokens": length}
    row |= {f"{name}_us": report.summary(values) for name, values in samples.items()}
    decode_us = row["decode_us"]["median"]
    row["tflops"] = round(2 * s_q * heads * batch * length * 1088 / decode_us / 1e6, 1)
    row["gb_per_s"] = round(batch * length * 1152 / decode_us / 1e3, 1)
    row["flashmla_us"] = peer["decode_us"]
    row["fa3_us"] = peer["fa3_decode_us"]
    if s_q == 1 and batch * length * 1152 <= PLAIN_BYTES:
        plain = jax.jit(plain_decode).lower(*operands).compile()
        row["plain_xla_us"] = round(time_wall(plain, *operands, calls=10), 1)
    return row


def main():
    """Measures, prints, writes decode.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="directory of the JSON (default: benchmarks/results)")
    args = parser.parse_args()
    reason = native.why_no_kernel("decode")
    if reason is not None:
        sys.exit(f"benchmarks.decode times the CUDA kernel, and there is none here: {reason}.")
    before = measure_matmul()
    rows = [measure(peer) for peer in json.loads(PEERS.read_text())["rows"]]
    after = measure_matmul()
    what = (
        "Paged MLA decode, bfloat16, page size 64, equal lengths: split_us the split kernel, "
        "decode_us split and combine, in a CUDA graph; checked against float32 first. flashmla_us "
        "and fa3_us: from peers_h200.json, another run on the same kind of chip. plain_xla_us: "
        "gather + einsum, wall time of pipelined calls. bfloat16 matrix product of "
        f"{MATMUL}^3 before and after: {before:.0f} and {after:.0f} TFLOP/s."
    )
    report.write("decode", what, rows, args.out)
    report.print_table(
        "decode, µs",
        [
            "batch",
            "s_q",
            "heads",
            "tokens",
            "split",
            "decode",
            "TFLOP/s",
            "GB/s",
            "FlashMLA",
            "FA3",
            "plain XLA",
            "FlashMLA / ours",
        ],
        [
            [
                row["batch"],
                row["s_q"],
                row["heads"],
                row["tokens"],
                f"{row['split_us']['median']:.1f}",
                f"{row['decode_us']['median']:.1f}",
                f"{row['tflops']:.0f}",
                f"{row['gb_per_s']:.0f}",
                row["flashmla_us"],
                row["fa3_us"],
                row.get("plain_xla_us", ""),
                f"{row['flashmla_us'] / row['decode_us']['median']:.2f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
