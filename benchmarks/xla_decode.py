"""`implementation="xla"` against plain gather + einsum: `python -m benchmarks.xla_decode`.

Runs on any platform. Checks both against float32 first, then times them in turn and compares the
memory that XLA plans for their temporaries.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from jax_flashmla import flash_mla_with_kvcache

# batch, heads, tokens of each sequence, tokens that the table can hold.
CPU_CASES = [(32, 16, 4096, 16384), (32, 16, 4096, 4096), (4, 128, 2048, 8192)]
GPU_CASES = [
    (32, 16, 4096, 16384),
    (32, 16, 4096, 4096),
    (128, 16, 4096, 4096),
    (128, 128, 4096, 4096),
    (1, 16, 65536, 65536),
]
SCALE = 576**-0.5


def plain_decode(q, k_cache, block_table, cache_seqlens):
    """What one writes first: gather all pages of the table, then two einsums and a softmax."""
    batch = q.shape[0]
    keys = k_cache[block_table].reshape(batch, -1, 576)
    scores = jnp.einsum("bshd,btd->bsht", q, keys, preferred_element_type=jnp.float32) * SCALE
    valid = jnp.arange(keys.shape[1]) < cache_seqlens[:, None]
    weights = jax.nn.softmax(jnp.where(valid[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum(
        "bsht,btv->bshv",
        weights.astype(q.dtype),
        keys[..., :512],
        preferred_element_type=jnp.float32,
    )
    return out.astype(q.dtype)


def our_decode(q, k_cache, block_table, cache_seqlens):
    """The library, held to its XLA implementation."""
    return flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, implementation="xla")[0]


def make_operands(batch, heads, length, capacity, s_q=1):
    """Random operands on the default device; pages in random order."""
    pages = batch * length // 64
    keys = jax.random.split(jax.random.key(0), 2)
    q = jax.random.normal(keys[0], (batch, s_q, heads, 576), jnp.bfloat16)
    k_cache = jax.random.normal(keys[1], (pages, 64, 1, 576), jnp.bfloat16)
    table = np.zeros((batch, capacity // 64), np.int32)
    table[:, : length // 64] = np.random.default_rng(0).permutation(pages).reshape(batch, -1)
    return q, k_cache, jnp.asarray(table), jnp.full(batch, length, jnp.int32)


def check(outs, operands, length):
    """Raises unless each output is close to float32's, for the last sequence."""
    q, k_cache, table, _ = operands
    keys = k_cache[table[-1, : length // 64]].reshape(length, 576).astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        scores = q[-1, 0].astype(jnp.float32) @ keys.T * SCALE
        want = np.asarray(jax.nn.softmax(scores, axis=-1) @ keys[:, :512])
    for name, out in outs.items():
        error = np.linalg.norm(np.asarray(out[-1, 0], np.float32) - want) / np.linalg.norm(want)
        if not error < 1e-2:
            raise AssertionError(f"{name}: relative error {error:.1e} against float32")


def measure(case, rounds):
    """Returns a row of the report."""
    batch, heads, length, capacity = case
    operands = make_operands(*case)
    gathered = batch * capacity * 576 * 2
    programs = {
        name: jax.jit(fun).lower(*operands).compile()
        for name, fun in (("ours", our_decode), ("plain", plain_decode))
    }
    outs = {name: program(*operands) for name, program in programs.items()}
    check(outs, operands, length)
    del outs
    samples = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(*operands))
            samples[name].append((time.perf_counter() - begin) * 1e6)
    row = {"batch": batch, "heads": heads, "tokens": length, "table_tokens": capacity}
    for name, program in programs.items():
        row[f"{name}_us"] = report.summary(samples[name])
        temporaries = program.memory_analysis().temp_size_in_bytes
        row[f"{name}_temporary_bytes"] = temporaries
        row[f"{name}_temporaries_over_gathered_cache"] = round(temporaries / gathered, 4)
    return row


def main():
    """Measures, prints, writes xla_decode_<platform>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="directory of the JSON (default: benchmarks/results)")
    args = parser.parse_args()
    platform = jax.default_backend()
    on_gpu = platform == "gpu"
    rows = [measure(case, 20 if on_gpu else 7) for case in (GPU_CASES if on_gpu else CPU_CASES)]
    what = (
        'Paged MLA decode, bfloat16, page size 64: implementation="xla" (ours) against gather + '
        "einsum over the whole table (plain). Wall time of one jitted call; temporaries from the "
        "compiled program's memory analysis. Both checked against float32 first."
    )
    report.write(f"xla_decode_{platform}", what, rows, args.out)
    report.print_table(
        f"decode through XLA on {platform}",
        ["batch", "heads", "tokens / table", "ours ms", "plain ms", "ratio", "ours MB", "plain MB"],
        [
            [
                row["batch"],
                row["heads"],
                f"{row['tokens']} / {row['table_tokens']}",
                f"{row['ours_us']['median'] / 1e3:.2f}",
                f"{row['plain_us']['median'] / 1e3:.2f}",
                f"{row['plain_us']['median'] / row['ours_us']['median']:.1f}x",
                f"{row['ours_temporary_bytes'] / 1e6:.0f}",
                f"{row['plain_temporary_bytes'] / 1e6:.0f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
