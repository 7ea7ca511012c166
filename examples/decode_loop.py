"""A decode loop of one MLA attention layer over the bytes of a text file: `make demo`.

The layer has DeepSeek-V2-Lite's dimensions and random weights. 32 sequences, up to 8,192 bytes long
in the end, start at different places of the text; each step feeds every sequence its next byte. The
step is one jitted function: projections, RoPE, weight absorption, the append to a paged cache and
`flash_mla_with_kvcache`. At the end the last step is compared with the same layer written the
textbook way, in float32: keys and values expanded per head, no absorption, no cache.
"""

import argparse
import functools
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jax_flashmla import (
    append_kv_cache,
    flash_mla_with_kvcache,
    get_mla_metadata,
    show_config,
)

TEXT = pathlib.Path(__file__).parent.parent / "LICENSE"
HIDDEN, HEADS, LATENT, ROPE, NOPE, VALUE = 2048, 16, 512, 64, 128, 128
PAGE = 64
SOFTMAX_SCALE = (NOPE + ROPE) ** -0.5
TOLERANCE = 0.02  # largest error, as a share of the largest output


class Layer(NamedTuple):
    """Weights with bfloat16 values; see `working_dtype`."""

    embedding: jax.Array  # [256, hidden]
    query: jax.Array  # [hidden, heads, nope + rope]
    latent: jax.Array  # [hidden, latent + rope]
    key: jax.Array  # [heads, nope, latent]: latent -> a head's key
    value: jax.Array  # [heads, latent, value]: latent -> a head's value
    output: jax.Array  # [heads, value, hidden]


def working_dtype():
    """Of weights and activations. XLA:CPU also sums in bfloat16 where it multiplies bfloat16."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def make_layer(key):
    """Random weights that keep the activations near unit variance."""

    def draw(key, shape, fan_in):
        weights = jax.random.normal(key, shape) * fan_in**-0.5
        return weights.astype(jnp.bfloat16).astype(working_dtype())

    keys = jax.random.split(key, 6)
    return Layer(
        embedding=draw(keys[0], (256, HIDDEN), 1),
        # Larger than usual, so that the softmax is not nearly uniform.
        query=draw(keys[1], (HIDDEN, HEADS, NOPE + ROPE), HIDDEN / 4),
        latent=draw(keys[2], (HIDDEN, LATENT + ROPE), HIDDEN),
        key=draw(keys[3], (HEADS, NOPE, LATENT), LATENT),
        value=draw(keys[4], (HEADS, LATENT, VALUE), LATENT),
        output=draw(keys[5], (HEADS, VALUE, HIDDEN), HEADS * VALUE),
    )


def rms_norm(x):
    """Scales the last axis to unit mean square."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def rotate(x, positions):
    """Rotary embedding of the last axis; `positions` matches the axes before it."""
    frequencies = 10000.0 ** (-jnp.arange(0, ROPE, 2) / ROPE)
    angles = positions[..., None] * frequencies
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1).astype(x.dtype)


def cache_rows(layer, tokens, positions):
    """What the cache keeps of each token: its normalised latent and its rotated key part."""
    row = rms_norm(layer.embedding[tokens]) @ layer.latent
    latent, rope = row[..., :LATENT], row[..., LATENT:]
    rows = jnp.concatenate([rms_norm(latent), rotate(rope, positions)], axis=-1)
    return rows.astype(jnp.bfloat16)


@functools.partial(jax.jit, donate_argnames="k_cache")
def decode_step(layer, k_cache, block_table, lengths, tokens):
    """Attends from one new token per sequence. Returns the layer's output and the new cache."""
    rows = cache_rows(layer, tokens, lengths)[:, None, None]
    k_cache = append_kv_cache(k_cache, rows, block_table, lengths + 1)
    query = jnp.einsum("bd,dhk->bhk", rms_norm(layer.embedding[tokens]), layer.query)
    q_nope = jnp.einsum("bhn,hnl->bhl", query[..., :NOPE], layer.key)  # weight absorption
    q_rope = rotate(query[..., NOPE:], lengths[:, None])
    metadata = get_mla_metadata(lengths + 1, HEADS, 1)
    out, _ = flash_mla_with_kvcache(
        tuple(part[:, None].astype(k_cache.dtype) for part in (q_nope, q_rope)),
        k_cache,
        block_table,
        lengths + 1,
        LATENT,
        *metadata,
        softmax_scale=SOFTMAX_SCALE,
    )
    values = jnp.einsum("bhl,hlv->bhv", out[:, 0].astype(layer.value.dtype), layer.value)
    return jnp.einsum("bhv,hvd->bd", values, layer.output), k_cache


@jax.jit
def prefill(layer, tokens, lengths, block_table):
    """The cache rows of each sequence's first tokens, in the pages that the table names.

    The table is a permutation of the pages. Rows not yet written are NaN: nothing may read them.
    """
    positions = jnp.arange(tokens.shape[1])

    def rows_of(sequence):
        tokens, length = sequence
        rows = cache_rows(layer, tokens, positions)
        return jnp.where(positions[:, None] < length, rows, jnp.nan)

    pages = jax.lax.map(rows_of, (tokens, lengths)).reshape(-1, PAGE, 1, LATENT + ROPE)
    return pages[jnp.argsort(block_table.reshape(-1))]


@jax.jit
def textbook_step(layer, tokens, length):
    """The last of `length` tokens through the same layer: no absorption, float32 throughout."""
    layer = jax.tree.map(lambda x: x.astype(jnp.float32), layer)
    # The layer sees 256 different embeddings: project those, then look up.
    embedding = rms_norm(layer.embedding)
    row = embedding @ layer.latent
    latent = rms_norm(row[:, :LATENT])
    keys = jnp.einsum("tl,hnl->thn", latent, layer.key)
    values = jnp.einsum("tl,hlv->thv", latent, layer.value)
    query = jnp.einsum("d,dhk->hk", embedding[tokens[length - 1]], layer.query)

    positions = jnp.arange(tokens.size)
    k_rope = rotate(row[tokens, LATENT:], positions)
    q_rope = rotate(query[:, NOPE:], jnp.full(HEADS, length - 1))
    scores = jnp.einsum("hn,thn->ht", query[:, :NOPE], keys[tokens])
    scores = (scores + q_rope @ k_rope.T) * SOFTMAX_SCALE
    weights = jax.nn.softmax(jnp.where(positions < length, scores, -jnp.inf), axis=-1)
    per_head = jnp.einsum("ht,thv->hv", weights, values[tokens])
    return jnp.einsum("hv,hvd->d", per_head, layer.output)


def step_cost(layer, lengths):
    """Floating-point operations and bytes (weights once, cache rows once) of one step."""
    weights = sum(x.size for x in layer) - layer.embedding.size
    row = LATENT + ROPE
    flops = 2 * weights * len(lengths) + 2 * HEADS * (row + LATENT) * int(lengths.sum())
    return flops, layer.output.dtype.itemsize * weights + 2 * row * int(lengths.sum())


def main():
    """Runs the loop; exits non-zero if the last step's error is out of tolerance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=8192, help="in the end (default: 8192)")
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args()
    capacity = -(-args.max_length // PAGE)
    if args.sequences < 1 or args.steps < 1 or args.max_length <= args.steps:
        parser.error("expected sequences >= 1, steps >= 1 and max-length > steps")

    rng = np.random.default_rng(0)
    start = rng.integers(1, args.max_length - args.steps, args.sequences, endpoint=True)
    start[0] = args.max_length - args.steps
    text = np.frombuffer(TEXT.read_bytes(), np.uint8)
    offsets = np.arange(args.sequences) * len(text) // args.sequences
    tokens = text[(offsets[:, None] + np.arange(capacity * PAGE)) % len(text)]
    table = rng.permutation(args.sequences * capacity).reshape(args.sequences, capacity)

    layer = make_layer(jax.random.key(0))
    tokens, block_table = jnp.asarray(tokens), jnp.asarray(table, jnp.int32)
    lengths = jnp.asarray(start, jnp.int32)

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("prefill", total=1)
        k_cache = jax.block_until_ready(prefill(layer, tokens, lengths, block_table))
        progress.advance(task)

        task = progress.add_task("compile", total=1)
        step = decode_step.lower(layer, k_cache, block_table, lengths, tokens[:, 0]).compile()
        progress.advance(task)

        next_tokens = [tokens[jnp.arange(args.sequences), lengths + i] for i in range(args.steps)]
        steps_lengths = [lengths + i for i in range(args.steps)]
        jax.block_until_ready((next_tokens, steps_lengths))
        task = progress.add_task("decode", total=args.steps)
        seconds = 0.0
        for first in range(0, args.steps, 8):  # a few steps in flight between looks at the clock
            some = range(first, min(first + 8, args.steps))
            begin = time.perf_counter()
            for i in some:
                out, k_cache = step(layer, k_cache, block_table, steps_lengths[i], next_tokens[i])
            jax.block_until_ready(out)
            seconds += time.perf_counter() - begin
            progress.advance(task, len(some))

        task = progress.add_task("check", total=args.sequences)
        largest, error = 0.0, 0.0
        # On the CPU, wherever the loop ran: another device, and float32 is float32 there.
        operands = jax.device_put((layer, tokens, lengths), jax.local_devices(backend="cpu")[0])
        cpu_layer, cpu_tokens, cpu_lengths = operands
        with jax.default_matmul_precision("highest"):
            for i in range(args.sequences):
                want = textbook_step(cpu_layer, cpu_tokens[i], cpu_lengths[i] + args.steps)
                want = np.asarray(want)
                got = np.asarray(out[i], np.float32)
                # NaN must not pass: np.maximum keeps it, max() may not.
                error = float(np.maximum(error, np.abs(got - want).max()))
                largest = max(largest, float(np.abs(want).max()))
                progress.advance(task)

    flops, moved = step_cost(layer, start + args.steps / 2)
    per_step = seconds / args.steps
    device = jax.devices()[0]
    implementation = show_config("dicts")["default implementation"]["decode"]
    console.print(f"platform        {device.platform}: {device.device_kind}")
    console.print(f"implementation  {implementation}", soft_wrap=True, markup=False)
    console.print(
        f"step            {per_step * 1e6:,.0f} µs   {moved / per_step / 1e9:,.1f} GB/s   "
        f"{flops / per_step / 1e12:,.3f} TFLOP/s",
        highlight=False,
    )
    console.print(
        f"largest error   {error / largest:.4f} of the largest output, against float32 without "
        f"absorption (tolerance {TOLERANCE})",
        highlight=False,
        soft_wrap=True,
    )
    if not error <= TOLERANCE * largest:
        sys.exit("decode_loop: the error is out of tolerance")


if __name__ == "__main__":
    main()
