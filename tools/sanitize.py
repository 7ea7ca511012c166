"""Decodes a few small problems, for compute-sanitizer to watch.

  JAX_PLATFORMS=cpu compute-sanitizer --tool racecheck python tools/sanitize.py

Needs a Hopper GPU, jax_flashmla with kernels, and cupy, whose arrays keep XLA's own kernels out of
the report. The plan comes from JAX on the CPU. Checks the results, so that a tool that breaks the
kernel is noticed.
"""

import sys

import cupy
import jax.numpy as jnp
import numpy as np

from jax_flashmla import get_mla_metadata, native
from jax_flashmla.decode import partial_types

SCALE = 1 / 24  # what the launch uses
# lengths, s_q, h_q, h_kv, num_sms: few SMs, so that a thread block has several sequences; and
# perhaps tokens of a page, columns of a row, window.
CASES = [
    ([0, 1, 64, 65, 400], 1, 16, 1, 3),
    ([130, 0, 700], 1, 128, 1, 6),
    ([70, 200], 2, 6, 2, 4),
    ([300, 20], 3, 126, 3, 18),
    ([70, 0, 300], 1, 40, 1, 3),
    # Many splits, of few rows and of many, also more than are combined at a time.
    ([1300], 1, 16, 1, 20),
    ([2600], 1, 128, 1, 80),
    # Parts of a block a page and several blocks, in either kernel; a window.
    ([0, 1, 64, 65, 400], 1, 16, 1, 3, 16, 640),
    ([130, 0, 700], 1, 128, 1, 6, 32),
    ([70, 0, 300], 2, 16, 1, 3, 128),
    ([300, 0, 1300], 2, 16, 2, 3, 256, 584, 100),
    ([300, 0, 1300], 1, 128, 1, 6, 64, 576, 200),
]


def bits(x):
    """float32 rounded to bfloat16, as 16-bit integers."""
    return x.astype(jnp.bfloat16).view(np.uint16)


def values(x):
    """The reverse."""
    return x.view(jnp.bfloat16).astype(np.float64)


def decode(lengths, s_q, h_q, h_kv, num_sms, page=64, width=576, window=0):
    """Decodes random data; returns the largest error of the outputs."""
    rng = np.random.default_rng()
    batch, pages = len(lengths), -(-max(lengths) // page)
    rows = s_q * h_q // h_kv
    table = rng.permutation(batch * pages).reshape(batch, pages).astype(np.int32)
    q = bits(rng.standard_normal((batch, s_q, h_q, 576), np.float32))
    pool = bits(rng.standard_normal((batch * pages, page, h_kv, width), np.float32))
    seqlens = np.asarray(lengths, np.int32)
    metadata = [np.asarray(x) for x in get_mla_metadata(seqlens, rows, h_kv, num_sms=num_sms)]
    parts = len(metadata[0])
    slots = batch + parts
    operands = [cupy.asarray(x) for x in (q, pool, table, seqlens, *metadata)]
    out = cupy.full((batch, s_q, h_q, 512), 0x7FC0, np.uint16)  # NaN
    lse = cupy.full((batch, h_q, s_q), np.nan, np.float32)
    workspace = [
        cupy.full(buffer.shape, np.nan, np.float32) for buffer in partial_types((slots, h_kv), rows)
    ]
    cupy.cuda.Device().synchronize()
    native.module.bench.time_decode(
        [x.data.ptr for x in (*operands, out, lse, *workspace)],
        batch=batch,
        s_q=s_q,
        h_q=h_q,
        h_kv=h_kv,
        num_blocks=len(pool),
        max_blocks=pages,
        num_parts=parts,
        slots=slots,
        causal=False,
        page_tokens=page,
        key_stride=width,
        sliding_window=window,
        what="decode",
        launches=1,
        replays=1,
    )
    got, error = values(cupy.asnumpy(out)), 0.0
    for i, length in enumerate(lengths):
        keys = values(pool[table[i]]).reshape(-1, h_kv, width)[:length, :, :576]
        keys = keys[max(length - window, 0) if window else 0 :]
        for head in range(h_kv):
            heads = slice(head * h_q // h_kv, (head + 1) * h_q // h_kv)
            scores = SCALE * values(q[i, :, heads]) @ keys[:, head].T
            weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e9))
            total = weights.sum(-1, keepdims=True)
            want = weights @ keys[:, head, :512] / np.where(total > 0, total, 1)
            error = max(error, float(np.abs(got[i, :, heads] - want).max(initial=0)))
    return error


def main():
    """Runs every case; exits non-zero on a wrong result."""
    errors = [decode(*case) for case in CASES]
    print("largest errors:", errors)
    if not max(errors) < 3e-2:
        sys.exit("wrong results")


if __name__ == "__main__":
    main()
