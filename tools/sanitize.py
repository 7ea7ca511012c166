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
from jax_flashmla.decode_local import partial_types

SCALE = 1 / 24  # what the launch uses
# lengths, s_q, h_q, h_kv, num_sms: few SMs, so that a thread block has several sequences; and
# perhaps tokens of a page, columns of a row, window, FP8 format.
CASES = [
    ([0, 1, 64, 65, 400], 1, 16, 1, 3),
    ([130, 0, 700], 1, 128, 1, 6),
    ([70, 200], 2, 6, 2, 4),
    ([300, 20], 3, 126, 3, 18),
    ([70, 0, 300], 1, 40, 1, 3),
    # Many splits, of few rows and of many, also more than are combined at a time.
    ([1300], 1, 16, 1, 20),
    ([2600], 1, 128, 1, 80),
    # Many of one sequence among others.
    ([5, 1300, 70], 1, 40, 1, 20),
    # Parts of a block a page and several blocks, in either kernel; a window.
    ([0, 1, 64, 65, 400], 1, 16, 1, 3, 16, 640),
    ([130, 0, 700], 1, 128, 1, 6, 32),
    ([0, 1, 64, 65, 400], 1, 16, 2, 3, 1, 584),
    ([70, 0, 300], 1, 40, 1, 3, 1),
    ([70, 0, 300], 2, 16, 1, 3, 128),
    ([300, 0, 1300], 2, 16, 2, 3, 256, 584, 100),
    ([300, 0, 1300], 1, 128, 1, 6, 64, 576, 200),
    ([0, 1, 64, 65, 400], 1, 16, 1, 3, 64, 576, 0, "fp8_per_tensor"),
    ([300, 20], 3, 30, 3, 18, 16, 592, 100, "fp8_per_tensor"),
    ([0, 1, 64, 65, 400], 1, 16, 1, 3, 64, 656, 0, "fp8_block"),
    ([300, 20], 3, 30, 3, 18, 1, 672, 100, "fp8_block"),
    ([300, 0, 1300], 2, 8, 1, 6, 128, 672, 100, "fp8_block"),
    # FP8 in CTAs of 32 rows and of 64.
    ([70, 0, 300], 1, 24, 1, 3, 64, 656, 0, "fp8_block"),
    ([130, 0, 700], 1, 126, 1, 6, 64, 576, 0, "fp8_per_tensor"),
    ([300, 0, 1300], 2, 24, 1, 6, 128, 656, 100, "fp8_block"),
]
K_SCALE = 0.02


def bits(x):
    """float32 rounded to bfloat16, as 16-bit integers."""
    return x.astype(jnp.bfloat16).view(np.uint16)


def values(x):
    """The reverse."""
    return x.view(jnp.bfloat16).astype(np.float64)


def fp8(x, name):
    """float32 rows as an FP8 cache, with the same scale everywhere, and their values."""
    latent, rope = x[..., :512], x[..., 512:]
    stored = (latent / K_SCALE).astype(jnp.float8_e4m3fn)
    if name == "fp8_per_tensor":
        rope = (rope / K_SCALE).astype(jnp.float8_e4m3fn)
        read = np.concatenate([stored, rope], -1).astype(np.float64) * np.float32(K_SCALE)
        return np.concatenate([stored, rope], -1).view(np.uint8), read
    scales = np.full((*x.shape[:-1], 4), K_SCALE, np.float32)
    parts = stored.view(np.uint8), scales.view(np.uint8), bits(rope).view(np.uint8)
    read = stored.astype(np.float64) * np.float32(K_SCALE), values(bits(rope))
    return np.concatenate(parts, -1), np.concatenate(read, -1)


def decode(lengths, s_q, h_q, h_kv, num_sms, page=64, width=576, window=0, form="plain"):
    """Decodes random data; returns the largest error of the outputs."""
    rng = np.random.default_rng()
    batch, pages = len(lengths), -(-max(lengths) // page)
    rows = s_q * h_q // h_kv
    table = rng.permutation(batch * pages).reshape(batch, pages).astype(np.int32)
    q = bits(rng.standard_normal((batch, s_q, h_q, 576), np.float32))
    rows_of = batch * pages, page, h_kv
    if form == "plain":
        pool = bits(rng.standard_normal((*rows_of, width), np.float32))
        all_keys = values(pool)[..., :576]
    else:
        rows_in_use, all_keys = fp8(rng.standard_normal((*rows_of, 576), np.float32), form)
        pool = np.full((*rows_of, width), 0xFF, np.uint8)
        pool[..., : rows_in_use.shape[-1]] = rows_in_use
    seqlens = np.asarray(lengths, np.int32)
    metadata = [np.asarray(x) for x in get_mla_metadata(seqlens, rows, h_kv, num_sms=num_sms)]
    parts = len(metadata[0])
    slots = batch + parts
    operands = [cupy.asarray(x) for x in (q, pool, table, seqlens, *metadata)]
    out = cupy.full((batch, s_q, h_q, 512), 0x7FC0, np.uint16)  # NaN
    lse = cupy.full((batch, h_q, s_q), np.nan, np.float32)
    workspace = [cupy.full(x.shape, np.nan, x.dtype) for x in partial_types((slots, h_kv), rows)]
    scale = [cupy.full(1, K_SCALE, np.float32)] if form == "fp8_per_tensor" else []
    cupy.cuda.Device().synchronize()
    native.module.bench.time_decode(
        [x.data.ptr for x in (*operands, out, lse, *workspace, *scale)],
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
        key_format=form,
        what="decode",
        launches=1,
        replays=1,
    )
    got, error = values(cupy.asnumpy(out)), 0.0
    for i, length in enumerate(lengths):
        keys = all_keys[table[i]].reshape(-1, h_kv, 576)[:length]
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
